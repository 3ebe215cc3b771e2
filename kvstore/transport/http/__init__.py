"""HTTP as every process serves it: strict in, problem documents out.

`server` speaks it on aiohttp's low-level server; `requests` takes apart what comes, `responses` writes what is
answered. `routes` is what a call is, and the table from which calls are found and decoded; `openapi` describes the
same table, `schema` the types of its documents.
"""
