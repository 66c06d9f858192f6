"""The live page: static files, one stream of looks for all who watch, and a request's timeline.

Flow: the host's telemetry gives a look a second while somebody watches; `feed` hands it to every open page; the page
(`static/`) draws it. Nothing is fetched from outside; Plotly comes from its own package. Imports `gateway` only.
"""
