"""kvstore: a sharded, durable key-value store. The version is that of the installed package."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kvstore")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"
