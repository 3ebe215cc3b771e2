"""`python -m loadtest.reshard`: what it costs when three shards become four, beside Redis Cluster.

Systems, the load beside the move, the figures.
Figures belong into loadtest/MEASURED.md.
"""
