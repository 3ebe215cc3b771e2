"""What survives: the records of a store's log, its rows, and the files that both lie in.

It knows rows and records, and neither rules nor the network: `kvstore.store` decides what is written.
What is on disk is in kvstore/storage/README.md.
"""
