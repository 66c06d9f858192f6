"""WHERE a request goes. No sockets, no Ray, no clock of its own.

Flow: `router` asks `served`, all that is known of one model: its engines (`table`, `rows`), what they hold
(`residency`), how fast they are (`rates`), who waits (`admission`); `policy` decides. `ledger` accounts, `replay` tries
policies out, `scaling` says when engines come and go. May import `config`, `records`, `errors`.
"""
