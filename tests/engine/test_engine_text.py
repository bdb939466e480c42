"""Text that grows token by token: half characters wait, stop strings are never shown, nothing is lost."""

from __future__ import annotations

import random

import pytest

from tierd_engine.text import Text


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return bytes(tokens).decode("utf-8", "replace")


def shown(data: bytes, stop: tuple[str, ...] = ()) -> tuple[list[str], Text]:
    """The pieces that a reader sees, and the text."""
    text, pieces = Text(Bytes(), stop), []
    for token in data:
        text.add(token)
        pieces.append(text.take(finished=False))
        if text.stopped:
            return pieces, text
    text.finish()
    return [*pieces, text.take(finished=True)], text


def test_a_character_is_shown_when_it_is_whole() -> None:
    """Four bytes make one piece; a broken end is shown as such, at the end."""
    pieces, _ = shown("a🜁b".encode())
    assert pieces == ["a", "", "", "", "🜁", "b", ""]
    assert "".join(shown("a🜁".encode()[:-1])[0]) == "a\ufffd"


@pytest.mark.parametrize("stop", [("END",), ("ENDE", "END"), ("D",), ("xEN", "NDE")])
def test_text_ends_before_the_stop_string(stop: tuple[str, ...]) -> None:
    """Wherever it begins, and no part of it is ever shown."""
    whole = "to the ENxENDE and on"
    pieces, text = shown(whole.encode(), stop)
    first = min(whole.find(one) + len(one) for one in stop if one in whole)
    [ended] = {one for one in stop if whole[:first].endswith(one)}
    assert text.stopped
    assert "".join(pieces) == text.whole == whole[: first - len(ended)]


def test_what_only_looks_like_a_stop_string_is_shown_in_the_end() -> None:
    """A text that ends in the middle of one keeps it."""
    pieces, text = shown(b"this is the EN", ("END",))
    assert pieces[-1] == "EN" and not text.stopped and "".join(pieces) == "this is the EN"


def test_random_texts_come_out_whole() -> None:
    """Characters of all lengths, and stop strings that never come."""
    choose = random.Random(3)
    for _ in range(200):
        whole = "".join(choose.choice("ab é€🜁") for _ in range(choose.randrange(30)))
        pieces, text = shown(whole.encode(), ("aab!", "€€!"))
        assert "".join(pieces) == text.whole == whole
