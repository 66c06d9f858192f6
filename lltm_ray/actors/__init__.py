"""The only Ray actors. Thin: each wraps a plain object.

Flow: `placement` reserves shares -> `engine` (one llama-server each) registers with `directory` -> `gateway` and
drivers watch it; `node` samples slots, one per node. May import everything below `serve`.
"""
