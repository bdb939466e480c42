"""The library that engines use: blocks in and out of tierd's shared memory, where every failure is a miss.

    with Client(model="...", layout=Layout(...)) as client:
        blocks = client.load(hashes, pool, pages)
        client.store(hashes, pool, pages)

Engines whose pages are tierd's slots use `tierd.client.pages` instead.

It needs MessagePack and numpy only, and blocks for no longer than its deadline on a daemon that does not answer.
"""

from tierd.client.client import KEEP_PRIORITY_MAX, KEEP_SECONDS_MAX, KEEP_SECONDS_MIN, Client
from tierd.client.lookup import LookingUp, Lookup
from tierd.client.removals import Removed
from tierd.client.store import Stored

__all__ = ["KEEP_PRIORITY_MAX", "KEEP_SECONDS_MAX", "KEEP_SECONDS_MIN", "Client", "LookingUp", "Lookup", "Removed", "Stored"]
