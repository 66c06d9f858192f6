"""Which settings suit a model, a workload and a machine; pure.

`plan` says what to try, `speed` what to expect of it, `choice` which was best by what was measured, and `file` writes
that as TOML. `sdk.tune` measures.
"""
