"""`python -m loadtest.chaos`: a cluster, clients and faults by a schedule from a seed, then a verdict.

It starts and breaks real processes; the clients' work is in `workloads`, the judging in `histories`.
One page and the exit code say what came of it.
"""
