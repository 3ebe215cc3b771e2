"""Replication: the rules by which a shard's primary, its copies and the controller keep one log on several disks.

They are pure: time is an argument, and each function returns the next state. Who is primary and who is a copy stands in
the cluster map, changed by compare-and-swap, as in PacificA (Lin et al., 2008); a log is repaired at an opening as in
Viewstamped Replication. `promise`, `files` and the parts of `copy` do what they say with a copy's files.
"""
