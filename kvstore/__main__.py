"""How a process of `kvstore` begins: the console script, and `python -m kvstore`, as the launcher starts its children.

Promises: Ctrl-C while the modules of a command are still being loaded ends it as later: quietly, with 130.
Leaves to others: everything (`cli`).
"""

import os
import sys


def _leave_out_working_folder() -> None:
    """`python -m` looks for modules there first: a random.py would be run in place of Python's own."""
    folder_of_kvstore = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 (slow to load)
    if not sys.flags.safe_path and sys.path[0] != folder_of_kvstore:
        del sys.path[0]


def run() -> None:
    """Run the command line of this process, and end the process with its exit code."""
    try:
        from kvstore.cli.commands import main

        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # cli.EXIT_INTERRUPTED, which may not be loaded yet


if __name__ == "__main__":
    _leave_out_working_folder()
    run()
