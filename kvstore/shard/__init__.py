"""The process that keeps keys: a node's stores, its door for routers, its part in moves and recovery.

It owns what happens between messages and a store; the store itself is in `store`. It imports neither router nor
controller.
"""
