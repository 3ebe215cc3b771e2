"""kvstore: a sharded, durable key-value store."""
