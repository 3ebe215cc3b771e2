"""Clusters of real processes for load tests and tests: `local` as `kvstore up` starts one, `armed` with failpoints.

`proxy` has all connections of a cluster pass through this process, where links are cut, slowed and doubled.
`processes` starts, finds and signals processes; `changes` asks for shards to come, go and change weight.
"""
