"""`kvstore up` and its processes: what is printed, which pid files there are, how things start, end and come back."""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest
import yaml

from tests.cluster.conftest import REPOSITORY, Cluster, free_ports, running, write_config

pytestmark = pytest.mark.timeout(90)

NAMES = ["controller-0", "router-0", "shard-s1", "shard-s2"]
WAIT_S = 30.0
