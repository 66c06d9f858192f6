"""Familiar calls for one program on one machine: an engine to load and ask, conversations, embeddings to search.

Thin faces on `driver.Cluster`: everything they do goes through a fleet's router and shows in its telemetry. Imports
`driver` and what lies below it; nothing but `cli` and users' programs imports this.
"""
