"""Load on a cluster, and the proof that it held: benchmarks, real input, crash rounds. Not installed with kvstore."""
