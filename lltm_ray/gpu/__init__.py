"""WHICH devices there are, and how they are shared.

Flow: `nvml` lists devices (or says why it cannot) -> `shares` turns demands into shares of devices. May import
`config`, `records`, `errors`, `_optional`; `pynvml` only in `nvml`.
"""
