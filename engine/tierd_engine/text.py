"""Text that grows with its tokens: what can be shown already, and where a stop string ends it."""

from __future__ import annotations

from typing import Any

HALF_CHARACTER = "\ufffd"
"""What tokenizers write for bytes that the next token may complete."""


class Text:
    """Decodes only the newest tokens each time; text that may become a stop string is held back until that is decided.

    `stopped`: a stop string has come; the text ends before it.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self.whole = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._shown = 0
        self._context: list[int] = []
        """Tokens whose text is known, so that the next ones are decoded with what stands before them."""
        self._new: list[int] = []

    def add(self, token: int) -> None:
        """One more token."""
        self._new.append(token)
        self._decode(last=False)

    def finish(self) -> None:
        """No more tokens: nothing is held back."""
        self._decode(last=True)

    def take(self, finished: bool) -> str:
        """What can be shown now and has not been taken before."""
        end = len(self.whole) if finished or self.stopped else len(self.whole) - self._held()
        taken, self._shown = self.whole[self._shown : end], max(self._shown, end)
        return taken

    def _decode(self, last: bool) -> None:
        if not self._new or self.stopped:
            return
        before = self._text(self._context)
        after = self._text(self._context + self._new)
        if after.endswith(HALF_CHARACTER) and not last:
            return
        searched = len(self.whole)
        self.whole += after[len(before) :]
        self._context, self._new = self._new, []
        for stop in self._stop:
            at = self.whole.find(stop, max(0, searched - len(stop)))
            if at >= 0:
                self.whole, self.stopped = self.whole[:at], True

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        return max((size for stop in self._stop for size in range(1, len(stop)) if self.whole.endswith(stop[:size])), default=0)
