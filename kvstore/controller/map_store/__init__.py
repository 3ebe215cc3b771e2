"""Where the controller keeps its state: one document with a revision, changed by compare-and-swap only.

`interface` is what every backend keeps to, and states the atomicity asked for; `sqlite` is the backend that ships.
`tests/conformance/test_map_store.py` holds every backend to the interface.
"""
