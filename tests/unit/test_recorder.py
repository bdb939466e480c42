"""What a recording keeps of what engines ask: whole chains of one namespace, in bounded memory."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from tests.sim.clients import chain
from tierd import recorder as module
from tierd.block import HASH_BYTES, ROOT
from tierd.core.plan import Hint
from tierd.errors import Busy
from tierd.layout import Layout, Namespace
from tierd.recorder import EVENT_BYTES, Recorder
from tierd.space import Space
from tierd.tiers.tier import MemoryTier

LAYOUT = Layout(layers=1, kv_heads=1, head_dim=64, dtype="float16")
HASHES = b"".join(chain(range(20)))
SOON = 0.001


def space(model: str = "model") -> Space:
    """That of a namespace."""
    return Space(Namespace("test", model, LAYOUT), [MemoryTier("cpu", 1 << 20, 1 << 18)], 0.25, write_back=False)


def take(recorder: Recorder, owner: str = "one", namespace: bytes = b"") -> dict[str, Any]:
    """What has come, without waiting for more."""
    return asyncio.run(recorder.take(owner, namespace, SOON))


def test_what_nobody_fetches_is_given_up_over_a_limit() -> None:
    """And counted; what is fetched makes room, a reply at a time, in the order in which it came."""
    recorder, here, size = Recorder(), space(), len(HASHES) + EVENT_BYTES
    assert not recorder.is_on
    take(recorder)
    most = module.BUFFER_BYTES_MAX // size
    for now in range(most + 7):
        recorder.asked(here, HASHES, ROOT, now)
    times: list[int] = []
    while (reply := take(recorder))["events"]:
        assert len(reply["events"]) <= module.REPLY_EVENTS
        assert sum(len(event[1]) for event in reply["events"]) <= module.REPLY_BYTES
        times += [event[0] for event in reply["events"]]
        assert reply["left"] == most - len(times) and reply["missed"] == 7
    assert times == list(range(most))
    recorder.asked(here, HASHES, ROOT, most)
    assert [event[0] for event in take(recorder)["events"]] == [most]


def test_a_recording_ends_with_its_owner_and_leaves_nothing() -> None:
    """Nobody else can have it meanwhile, or end it; the next one begins with nothing."""
    recorder, here = Recorder(), space()
    take(recorder)
    with pytest.raises(Busy, match="one recording at a time"):
        take(recorder, "two")
    recorder.end("two")
    recorder.asked(here, HASHES, ROOT, 1)
    recorder.end("one")
    assert not recorder.is_on
    nothing = {"namespace": b"", "block_tokens": 0, "events": [], "left": 0, "missed": 0, "elsewhere": 0}
    assert take(recorder, "two") == nothing


def test_a_chain_is_whole_wherever_a_request_goes_on_from() -> None:
    """What is behind a known parent comes with all before it; what is behind an unknown one is counted as missed."""
    recorder, here, at = Recorder(), space(), 5 * HASH_BYTES
    index = here.cache.index
    index.extend(index.root, HASHES[: 12 * HASH_BYTES], np.arange(12, dtype=np.int32)[None], 0)
    take(recorder)
    recorder.asked(here, HASHES[at:], HASHES[at - HASH_BYTES : at], 1)
    recorder.asked(here, HASHES[at:], HASHES[-HASH_BYTES:], 2)
    recorder.ended(here, HASHES[at - HASH_BYTES : at], Hint("stop", None), 3)
    recorder.ended(here, ROOT, Hint("stop", None), 4)
    reply = take(recorder)
    assert reply["events"] == [[1, HASHES, None, None], [3, HASHES[:at], "stop", None]] and reply["missed"] == 1


def test_one_namespace_is_recorded() -> None:
    """The one that was chosen by the beginning of its id, or the first in use; what others ask is counted."""
    recorder, here, other = Recorder(), space(), space("other")
    take(recorder)
    recorder.asked(here, HASHES, ROOT, 1)
    recorder.asked(other, HASHES, ROOT, 2)
    reply = take(recorder)
    assert [event[0] for event in reply["events"]] == [1] and reply["elsewhere"] == 1
    assert reply["namespace"] == here.namespace.id and reply["block_tokens"] == LAYOUT.block_tokens
    recorder.end("one")
    take(recorder, namespace=other.namespace.id[:8])
    recorder.asked(here, HASHES, ROOT, 1)
    recorder.asked(other, HASHES, ROOT, 2)
    assert [event[0] for event in take(recorder)["events"]] == [2]


def test_an_answer_waits_for_the_first_request() -> None:
    """Whoever fetches is answered as soon as there is something."""

    async def wait() -> int:
        recorder, here = Recorder(), space()
        await recorder.take("one", b"", SOON)
        waiting = asyncio.ensure_future(recorder.take("one", b"", 60.0))
        await asyncio.sleep(0)
        assert not waiting.done()
        recorder.asked(here, HASHES, ROOT, 1)
        return len((await asyncio.wait_for(waiting, 20))["events"])

    assert asyncio.run(wait()) == 1
