"""`python -m loadtest.peak`: what a thousand users do to latency and memory (`loadtest.bench.peak`)."""

from __future__ import annotations

from loadtest.bench.peak import main

if __name__ == "__main__":
    main()
