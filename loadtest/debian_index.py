"""`python -m loadtest.debian_index`: the Debian package index as import lines (`loadtest.tools.debian_index`)."""

from __future__ import annotations

from loadtest.tools.debian_index import main

if __name__ == "__main__":
    main()
