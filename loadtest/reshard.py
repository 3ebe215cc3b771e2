"""`python -m loadtest.reshard`: what a new shard costs, beside Redis Cluster (`loadtest.bench.reshard.run`)."""

from __future__ import annotations

from loadtest.bench.reshard.run import main

if __name__ == "__main__":
    main()
