"""`python -m loadtest.ring_benchmark`: whether the ring is fast and even, beside uhashring (`loadtest.bench.ring`)."""

from __future__ import annotations

from loadtest.bench.ring import main

if __name__ == "__main__":
    main()
