"""WHERE a request goes. No sockets, no Ray, no clock of its own.

Flow: `router` holds the table of engines and the claims on their slots; `policy` is its pure decision rule, `queue`
what table and queues are made of. May import `config`, `records`, `errors`.
"""
