"""Lines of a JSON Lines text."""

from __future__ import annotations


def json_lines(text: str) -> list[str]:
    """The lines, without the empty one behind the last newline.

    Not `str.splitlines`: texts in JSON may hold U+2028, U+0085 and other separators unescaped.
    """
    return text.removesuffix("\n").split("\n") if text else []
