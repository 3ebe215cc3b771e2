"""Look further at the scenarios of replication than the tests do, from the repository's root:

python -m tests.unit.replication.deeper [--worlds N] [SCENARIO …]
"""

from __future__ import annotations

import argparse
import time

from tests.unit.replication.explorer import explore
from tests.unit.replication.scenarios import SCENARIOS


def main() -> None:
    parser = argparse.ArgumentParser(description="Explore the scenarios of replication.")
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="all, if none is named")
    parser.add_argument("--worlds", type=int, default=1_000_000, metavar="N", help="at most so many for each")
    arguments = parser.parse_args()
    for name in arguments.scenarios or SCENARIOS:
        begin = time.process_time()
        explored = explore(SCENARIOS[name], arguments.worlds)
        whole = "all of it" if explored.whole else f"to depth {explored.depth}"
        print(f"{explored.worlds:>9} worlds {time.process_time() - begin:6.1f} s  {name}: {whole}", flush=True)


if __name__ == "__main__":
    main()
