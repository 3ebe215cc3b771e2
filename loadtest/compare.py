"""`python -m loadtest.compare`: this cluster beside etcd, Redis and a bare handler (`loadtest.bench.compare`)."""

from __future__ import annotations

from loadtest.bench.compare import main

if __name__ == "__main__":
    main()
