"""WHICH GGUF, and does it fit.

Flow: `resolve` turns a name into a file (`embedded`, `random_weights`, `catalog`, a path, the hub) -> `gguf` reads it
-> `memory` plans context, slots and layers for a share. May import `config`, `records`, `errors`, `_optional`.
"""
