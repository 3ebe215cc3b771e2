"""`python -m kvstore` is `kvstore`: the launcher starts its children like this, with the very same interpreter."""

import sys

from kvstore.cli import main

if __name__ == "__main__":
    sys.exit(main())
