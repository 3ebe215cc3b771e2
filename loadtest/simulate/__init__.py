"""Stores from a seed: the real code of a store on a simulated clock, disk and scheduler, and a verdict.

Owns: the loop with virtual time, the simulated disk, the faults and when they come, the clients, the invariants.
Promises: the same seed gives the same events in every process. Leaves to others: the code that is tried
(`kvstore.store`, `kvstore.storage`) and the judges of histories (`loadtest.histories`).
"""
