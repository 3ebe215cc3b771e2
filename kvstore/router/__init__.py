"""The process that clients talk to: HTTP in, operations out, and the coordinator of transactions.

It keeps nothing that is worth keeping: any number may run, any may die.
Its routes are described, for programs, by the modules named *operations and *schemas.
"""
