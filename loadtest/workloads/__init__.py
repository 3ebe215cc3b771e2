"""What clients do to a store, without the clients: choice of keys, calls, and what their answers mean. No socket."""
