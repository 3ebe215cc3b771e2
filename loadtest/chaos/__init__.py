"""A cluster of real processes under load and under faults, and the verdict on what it answered."""
