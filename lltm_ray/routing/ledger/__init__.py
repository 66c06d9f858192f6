"""The account of every request's tokens.

Flow: an `entry` for each request, in `progress` cells while it runs, in the SQLite `store` afterwards.
"""

from lltm_ray.routing.ledger.ledger import Attempt, Drift, Ledger, LedgerEntry, Outcome, Sums, find_drift

__all__ = ["Attempt", "Drift", "Ledger", "LedgerEntry", "Outcome", "Sums", "find_drift"]
