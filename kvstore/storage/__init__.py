"""What survives: one shard's rows, the batches that change them, and the file that they lie in.

It applies the rules of `transactions` and knows no network; the shard's process passes it operations.
What is on disk is in kvstore/storage/README.md.
"""
