"""Random damage to the files of killed stores: is each key equal, refused or reported, and never lost in silence?

Owns: the kinds of damage, the cases (one store, a whole cluster), and the verdict over every key that was acknowledged.
Leaves to others: the files (`kvstore.storage`) and starting processes (`loadtest.cluster.processes`).
"""
