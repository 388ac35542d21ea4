"""Texts that end a generation, wherever the tokens happen to cut them."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class StopTexts:
    """A generation's stop texts. `decode` turns ids into their text."""

    def __init__(self, texts: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self._texts = tuple(texts)
        self._decode = decode

    def reached(self, ids: list[int]) -> bool:
        """Whether one of them stands in the text of `ids`."""
        text = self._decode(ids)
        return any(stop in text for stop in self._texts)

    def cut(self, text: str) -> str:
        """`text` before the one that is complete first."""
        found = [(i + len(s), i) for s in self._texts if (i := text.find(s)) >= 0]
        return text[: min(found)[1]] if found else text

    def stream(self) -> StopStream:
        """For a text that comes in pieces."""
        return StopStream(self)

    def held(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of one of them."""
        longest = max(map(len, self._texts), default=0)
        for size in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._texts):
                return size
        return 0


class StopStream:
    """Passes pieces on until a stop text; what may be the beginning of one waits for the next.

    The pieces joined are exactly `StopTexts.cut` of the whole text.
    """

    def __init__(self, stops: StopTexts) -> None:
        self._stops = stops
        self._waiting = ""
        self._ended = False

    def push(self, piece: str, *, last: bool = False) -> str:
        """What may be shown now; all of it after the `last` piece."""
        if self._ended:
            return ""
        text = self._waiting + piece
        shown = self._stops.cut(text)
        self._ended = len(shown) < len(text)
        held = 0 if self._ended or last else self._stops.held(shown)
        self._waiting = shown[len(shown) - held :]
        return shown[: len(shown) - held]
