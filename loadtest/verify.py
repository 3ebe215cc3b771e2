"""`python -m loadtest.verify`: reads every imported value back (`loadtest.tools.verify`)."""

from __future__ import annotations

from loadtest.tools.verify import main

if __name__ == "__main__":
    main()
