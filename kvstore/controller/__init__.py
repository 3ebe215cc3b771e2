"""The process that alone writes the cluster map: members, owners, moves.

It decides in `membership`, drives moves in `mover`, and keeps the map in `map_store`.
No read or write of a client passes it.
"""
