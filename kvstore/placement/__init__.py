"""Who owns a key: the ring, the cluster map, and how one map becomes the next.

Pure: no clock, no I/O. The controller writes maps with it, routers and shards look keys up with it.
It does not know how data get to their owner (`shard`, `controller`).
"""
