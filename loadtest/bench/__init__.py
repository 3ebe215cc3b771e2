"""What `loadtest.compare`, `loadtest.reshard` and `loadtest.peak` are made of.

Systems, dialects, workloads, driving them with wrk, and the report with its charts.
Figures belong into loadtest/MEASURED.md.
"""
