"""Data that earlier programs have written, as they have left them on disk.

`cluster-format3.tar.xz`: a data_dir and its cluster.yaml, killed in the middle of moves, after one shard was given up:
four shards, 64 partitions, keys k1 to k40 with the values new1 to new40. `state.format3.json`: the document in its
controller's file, whose map has no format and names members.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

_HERE = Path(__file__).parent


def state_of_format_3() -> bytes:
    """The document that the controller has stored."""
    return (_HERE / "state.format3.json").read_bytes()


def unpack_cluster_of_format_3(folder: Path) -> None:
    """Put `cluster.yaml` and `data` into the folder."""
    with tarfile.open(_HERE / "cluster-format3.tar.xz") as archive:
        archive.extractall(folder)
