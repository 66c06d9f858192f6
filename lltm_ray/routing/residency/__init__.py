"""Where KV caches live, as far as can be told from outside.

Flow: `index` predicts and learns; `radix` is its tree, `slots` llama.cpp's rules, `slot_choice` the slot to name,
`holdings` what changes, `calibration` what was learnt. Pure.
"""

from lltm_ray.routing.residency.index import Held, Match, Residency, SlotChoice

__all__ = ["Held", "Match", "Residency", "SlotChoice"]
