"""The fleet as a Ray Serve application: `serve run lltm_ray.serve:app`.

Flow: `builder.build_app(config)` -> `deployments` (the same ASGI app, the same engine actors).
"""
