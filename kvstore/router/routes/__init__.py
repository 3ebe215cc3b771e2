"""The calls of the public API, a file for each family.
Its handlers, its documents, and its entries of the route table.

A new call is a method, the types of what it takes and gives, and an entry, in one of these files; `table` has them all.
`words` holds the types, parameters and groups of errors that several families share.
"""
