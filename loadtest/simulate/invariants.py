"""What must hold after each event of a simulated cluster, as far as that is cheap to look at.

Owns: which of it is looked at after which event.
Promises: looks at more than numbers only when something has changed that bears on it.
Leaves to others: whose event it was (`cluster`), what clients see (`loadtest.histories`), each part of it
(`store_invariants`, `copy_invariants`, `term_invariants`).

    a store        applied <= visible <= durable, visible <= committed; versions, sequences, floors never fall
    partitions     one owner that may answer; a store is served in a term by one process of one copy, with all of which
                   the controller was told
    copies         have promised what they follow, and never less than before; a snapshot ends with the primary's rows,
                   none newer than the records beside them; nothing but records changes the rows of a copy that is whole
    configuration  terms rise; only a copy in sync is promoted; each one in sync has on disk all that is committed, and
                   so has each that its primary asks to count as in sync; a term begins with all records of each copy in
                   sync; a recovered map knows each term that was served
    lease          a copy that opens a term has granted nothing that lasts, and no primary of a lower one may answer
"""

from __future__ import annotations

from loadtest.simulate.copy_invariants import CopyInvariants, PrimaryInvariants, check_opener, check_opening
from loadtest.simulate.node import NodeServer
from loadtest.simulate.store_invariants import StoreInvariants
from loadtest.simulate.term_invariants import MapInvariants, Owners, Terms
from loadtest.simulate.view import View


class Invariants:
    """All of one cluster's."""

    def __init__(self, view: View) -> None:
        self.stores = StoreInvariants()
        self.copies = CopyInvariants(view)
        self.primaries = PrimaryInvariants(view)
        self.terms = Terms(view)
        self.owners = Owners(view, self.terms)
        self.maps = MapInvariants(view, self.terms, self.owners)
        self._view = view

    def disk_gone(self, node: str) -> None:
        """What comes there is not what was."""
        self.owners.process_ended(node)
        self.stores.disk_gone(node)

    def put_back(self, node: str, copy_id: str) -> None:
        """That copy has other files there, of another time: what it had promised since is not known there."""
        self.disk_gone(node)
        self.copies.put_back(copy_id)

    def check(self, server: NodeServer) -> None:
        """After an event of that node. Raises Violation."""
        assert server.node is not None
        self.maps.check_followed(server.name, server.node.stores.cluster_map)
        for shard_id, resident in server.node.stores.by_shard.items():
            hosted = resident.local.hosted
            if hosted is None:
                if (copy := resident.local.copy) is not None:
                    self.copies.check(shard_id, copy)
                    check_opener(self._view, shard_id, resident, copy)
                continue
            place, store = (server.name, shard_id), hosted.store
            self.stores.check(place, store)
            sender = store.tables.sender
            if hosted.is_open:
                self.owners.check(place, store)
                if sender is not None:
                    self.primaries.check(shard_id, store)
            elif sender is not None:
                check_opening(self._view, shard_id, sender.shipping)
