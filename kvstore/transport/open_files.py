"""How many connections a process can take before it runs out of file descriptors.

Owns: the part of them that is kept for everything else: listening, channels to shards, files, answers of refusal.
Promises: a client beyond the bound is answered (503), because there is a descriptor for that answer, too; without the
bound its connection would be reset, and channels to shards that restart could not be reopened.
Leaves to others: raising the limit of the system (`kvstore.process`), counting connections (`http`).
"""

from __future__ import annotations

import resource

KEPT_MAX = 256


def connections_that_fit(wanted: int) -> int:
    """`wanted`, or fewer if this process may not open so many files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return wanted
    return min(wanted, files - min(KEPT_MAX, files // 2))
