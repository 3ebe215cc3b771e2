"""Benchmark of a growing cluster: three shards become four, beside Redis Cluster's own rebalance."""
