"""Ages of events in buckets, as rankers read them: in a batch of training data, and in a request."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

NO_TIME = np.iinfo(np.int64).min
"""The time of an event whose time is not known."""
HISTORY_AGES = 40
"""Values of ``history_age``: 0 where the time is unknown, else 1 + floor(log2(seconds before the event)),
at most 39."""


def age_bucket(now: Array, then: Array) -> Array:
    """Times in seconds, int64, -> :data:`HISTORY_AGES` buckets, int64; 0 where one is :data:`NO_TIME`."""
    known = (then != NO_TIME) & (now != NO_TIME)
    # frexp is exact where log2 may round up: 2**(e-1) <= age < 2**e.
    exponent = np.frexp(np.where(known, now - np.where(known, then, 0), 0).astype(np.float64))[1]
    return np.where(known, np.minimum(exponent, HISTORY_AGES - 1), 0).astype(np.int64)
