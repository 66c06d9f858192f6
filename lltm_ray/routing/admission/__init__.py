"""Who waits, and who is served next.

Flow: `queue` decides by deadline, tenant (`fairness`) and predicted wait (`lead`); `waiting` carries it out on the
event loop, for each `waiter`.
"""

from lltm_ray.routing.admission.queue import PRIORITIES, Admission, Capacity, Overload, Reason, Ticket

__all__ = ["PRIORITIES", "Admission", "Capacity", "Overload", "Reason", "Ticket"]
