"""How a process of `kvstore` begins: the console script, and `python -m kvstore`, as the launcher starts its children.

Promises: Ctrl-C while the modules of a command are still being loaded ends it as later: quietly, with 130.
Leaves to others: everything (`cli`).
"""

import sys


def run() -> None:
    """Run the command line of this process, and end the process with its exit code."""
    try:
        from kvstore.cli import main

        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # cli.EXIT_INTERRUPTED, which may not be loaded yet


if __name__ == "__main__":
    run()
