"""Any policy over a recorded or synthetic trace, against simulated engines.

Flow: `recorder` or `synthetic` -> `trace` -> `replay`, which runs the router's own objects on `simulated` engines and
`measure`s them.
"""

from lltm_ray.routing.replay.replay import Fleet, Replay, Result

__all__ = ["Fleet", "Replay", "Result"]
