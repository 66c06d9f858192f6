"""What a notebook shows: a chat with its widget, answers that grow, tokens, temperatures, tables and panels.

`integrations.jupyter` is the one door to all of it. `_source` asks a fleet; `_html` escapes what is shown.
"""
