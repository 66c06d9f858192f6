"""Analytics: rows of telemetry in, answers to an operator's questions out. Knows no Ray and no telemetry package.

One flow: Arrow tables -> `trace.build_trace` (numbers only, on the engine that `frames` chose) -> one module an
analysis -> `report`, which ranks what they found, and `html` and `hints`, which pass it on. May import only `config`
and what is below it.
"""
