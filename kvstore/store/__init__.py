"""One shard's state machine: operations are decided by rules, committed to the log, published, answered, applied.

The pipeline (`pipeline`) drives it; the rules are in `batch` and what it imports; files and rows are in `storage`.
"""
