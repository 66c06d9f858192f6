"""GPU compute from Python.

Flow: `csrc/` is built into `_native` by `LLTM_RAY_NATIVE=1 pip install .`; `native` is its typed face. May import
`errors` and `_optional`.
"""
