"""What is measured: `compare` drives this cluster, etcd and Redis side by side with wrk; `peak`, `ring` and `reshard`.

Systems, dialects, workloads, and the report with its charts; the modules of the same names in `loadtest/` start them.
Figures belong into loadtest/MEASURED.md.
"""
