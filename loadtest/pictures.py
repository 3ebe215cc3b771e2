"""`python -m loadtest.pictures`: draws the pictures of the documents (`loadtest.tools.pictures`)."""

from __future__ import annotations

from loadtest.tools.pictures import main

if __name__ == "__main__":
    main()
