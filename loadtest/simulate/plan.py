"""What one call of the command simulates.
A cluster or a store, for how long, with which faults, wrong in which way.

Owns: `Plan`: one run of it, making a failed one smaller, the command that replays one.
Promises: the replay command names everything that the run depends on.
Leaves to others: options and reports (`__main__`), the runs (`store_run`, `cluster_run`).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvstore import failpoints
from loadtest.simulate import cluster_faults, process_faults, store_faults
from loadtest.simulate.cluster_clients import CLIENTS
from loadtest.simulate.cluster_run import WHOLE, Cut, scheduled, simulate_cluster
from loadtest.simulate.shrink import shrink
from loadtest.simulate.store_run import Result, simulate

WHAT = {
    "cluster": "routers, shards and a controller with their real services, network, disks and clocks simulated,"
    " engines in memory; no HTTP, no SQLite",
    "store": "one store with its log on a simulated disk, its engine in memory, and clients; no routers, controllers, "
    "network",
}
_SHRINK_RUNS_MAX = 80


class Plan(NamedTuple):
    """`of`: "cluster" or "store"; the members below `seconds` are of a cluster only. `bug`: planted, empty for none."""

    of: str
    seconds: float
    nemeses: Sequence[str] = cluster_faults.USUAL
    cut: Cut = WHOLE
    bug: str = ""
    replicas: int = 1

    @property
    def points(self) -> Sequence[str]:
        """The failpoints that can be hit."""
        return process_faults.POINTS if self.of == "cluster" else store_faults.POINTS

    def run(self, seed: int, trace: Callable[[str], None] | None = None) -> Result:
        with failpoints.planting(self.bug):
            if self.of == "store":
                return simulate(seed, self.seconds, trace)
            return simulate_cluster(seed, self.seconds, trace, self.nemeses, self.cut, self.replicas)

    def smaller(self, failed: Result) -> Plan:
        """With as many faults and clients taken out as that run does not need to fail in the same way."""
        if self.of == "store" or self.cut != WHOLE:
            return self
        way = way_of(failed)

        def fails(cut: Cut) -> bool:
            return way_of(self._replace(cut=cut).run(failed.seed)) == way

        count = scheduled(failed.seed, self.seconds, self.nemeses, self.replicas)
        return self._replace(cut=shrink(fails, count, CLIENTS, _SHRINK_RUNS_MAX))

    def command(self, seed: int) -> str:
        """What shows that run again, event by event."""
        words = [f"python -m loadtest.simulate --seeds 1 --seed {seed} --seconds {self.seconds:g}"]
        if self.of != "cluster":
            words.append(f"--of {self.of}")
        elif list(self.nemeses) != list(cluster_faults.USUAL):
            words.append("--nemesis " + shlex.quote(",".join(self.nemeses)))
        if self.replicas != 1:
            words.append(f"--replicas {self.replicas}")
        if self.cut.faults:
            words.append(f"--without-faults {_listed(self.cut.faults)}")
        if self.cut.clients:
            words.append(f"--without-clients {_listed(self.cut.clients)}")
        if self.bug:
            words.append(f"--bug {self.bug}")
        return " ".join([*words, "--log"])


def way_of(result: Result) -> str:
    """In which way it failed: the first words of the verdict, empty if it did not."""
    return (
        ":".join(result.verdict.split(":")[:2])[:24] if result.verdict.startswith("violation") else result.verdict[:5]
    )


def _listed(numbers: frozenset[int]) -> str:
    return ",".join(map(str, sorted(numbers)))
