"""Memory of the router's process: what was freed goes back to the system.

Owns: the settings of glibc's allocator.
Promises: nothing where another C library is at work.
Leaves to others: how much memory there may be (`transport.answers`, `transport.bodies`).
"""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)


def return_large_buffers() -> None:
    """Have glibc give large buffers (1 MiB or more) back to the system when they are freed.
    Else it keeps them in a fragmented heap.

    It would raise that size to 32 MiB by itself as soon as it sees such buffers.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such thing
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1024 * 1024)
        mallopt(_M_TRIM_THRESHOLD, 32 * 1024 * 1024)  # without it the end of the heap comes and goes at each answer
