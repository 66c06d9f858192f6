"""ONE llama-server: find it, start it, supervise it, talk to it.

Flow: `binary` finds a server -> `command` writes its arguments -> `lifecycle` decides, `process` carries out ->
`client` speaks HTTP to it. May import `config`, `records`, `errors`, `_optional`; never Ray, never OpenTelemetry.
"""
