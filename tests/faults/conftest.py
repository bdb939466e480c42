"""A house per test, and clients that end with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.house import House
from tests.faults.raw import RawClient


@pytest.fixture
def house(short_path: Path) -> Iterator[House]:
    """A held daemon with 8 MiB of memory (two segments, 254 blocks) and 32 MiB of files; its log must show no bug."""
    with House(short_path, cpu__bytes="8MiB", nvme__bytes="32MiB") as house:
        yield house
        assert house.errors() == []


@pytest.fixture
def client(house: House) -> RawClient:
    """A client by hand, in this process."""
    client = RawClient(house.socket)
    client.hello()
    return client
