"""The process that keeps keys: one store, its door for routers, its part in moves and recovery.

It owns what happens between messages and the store; the store itself is in `storage`.
It imports neither router nor controller.
"""
