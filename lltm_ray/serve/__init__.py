"""The fleet as a Ray Serve application: `serve run lltm_ray.serve:app model=tiny engines=2`.

Flow: `builder.build_app(config)` -> `deployments` (the same ASGI app, the same engine actors).
"""

from lltm_ray.serve.builder import build_app

app = build_app
"""What `serve run` calls with its `name=value` arguments."""

__all__ = ["app", "build_app"]
