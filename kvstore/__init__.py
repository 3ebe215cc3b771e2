"""A sharded, durable key-value store.

The floors, from the words that all share (errors, config, protocol) to the command line, are in kvstore/README.md;
what is promised, and why it holds, is in kvstore/DESIGN.md.
"""
