"""`python -m loadtest.compare`: this cluster, etcd and Redis side by side, driven by wrk.

Systems, dialects, workloads, and the report with its charts.
Figures belong into loadtest/MEASURED.md.
"""
