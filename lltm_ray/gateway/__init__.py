"""HTTP to clients. No Ray.

Flow: `app` (ASGI) -> `auth`, body, model -> `routing.router` -> `relay` -> `upstream` (raw HTTP to a llama-server);
`fleet` answers for all engines at once. May import `routing`, `llamacpp`, `config`, `records`, `errors`.
"""
