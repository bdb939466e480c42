"""By what connectors tell the weights of a model from others of the same shape."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tierd_engine.connectors.weights import PIECE_BYTES, PIECES, weights_of

LENGTH = 4 * PIECES * PIECE_BYTES


def write(folder: Path, name: str, content: bytes, time: int = 1) -> str:
    """A model in a folder, all of whose files have one time, as in images of containers."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    os.utime(file, (time, time))
    return str(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model.tensors", "original/consolidated.00.pth"])
@pytest.mark.parametrize("at", [0, LENGTH // 3, LENGTH - 1])
def test_a_training_keeps_names_sizes_and_times_and_is_another_model(name: str, at: int, tmp_path: Path) -> None:
    """Whatever the files are called and wherever they lie; it changes more than a few bytes, somewhere in each quarter."""
    before = bytes(LENGTH)
    after = bytearray(before)
    first = min(at, LENGTH - LENGTH // 4)
    after[first : first + LENGTH // 4] = b"\1" * (LENGTH // 4)
    assert weights_of(write(tmp_path / "a", name, before), None) != weights_of(write(tmp_path / "b", name, bytes(after)), None)


def test_a_copy_with_its_times_is_the_same_model(tmp_path: Path) -> None:
    """Wherever it lies, and whatever lies beside its weights."""
    one, other = (write(tmp_path / name, "model.safetensors", b"weights") for name in "ab")
    write(tmp_path / "a", "README.md", b"text")
    assert weights_of(one, None) == weights_of(other, None)
    assert weights_of(f"{one}/model.safetensors", None) == weights_of(f"{other}/model.safetensors", None)


def test_another_time_is_another_model(tmp_path: Path) -> None:
    """What has changed between the samples is known by it."""
    one, other = (write(tmp_path / name, "model.safetensors", b"weights", time) for name, time in (("a", 1), ("b", 2)))
    assert weights_of(one, None) != weights_of(other, None)


def test_what_is_not_on_this_machine_is_known_by_name_and_revision() -> None:
    """As a model that is fetched by its name."""
    assert weights_of("meta/llama", "main") == "meta/llama@main" != weights_of("meta/llama", "other")
