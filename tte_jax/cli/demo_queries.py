"""The questions that `make demo` asks, with the right answers where there are any.

The corpus is drawn by OpenMoji; every query picture is drawn by Twemoji. Twemoji is a style that
the built-in models saw in training; `unseen` marks queries whose answer shows something that was
held out of training in every style: a concept, or a combination of role, gender and skin tone.
"""

from __future__ import annotations

from dataclasses import dataclass

TEXT, IMAGE, COMPOSED = "text", "image", "composed"
KINDS = (TEXT, IMAGE, COMPOSED)


@dataclass(frozen=True)
class DemoQuery:
    """One question.

    Attributes:
      kind: one of `KINDS`.
      text: the text of the query, "" for an image alone.
      picture: hexcode of the Twemoji drawing that is shown, "" for a text alone.
      expected: hexcodes of the right answers, any of which counts.
      unseen: whether the right answer was held out of training.
    """

    kind: str
    text: str
    picture: str
    expected: tuple[str, ...]
    unseen: bool = False

    @property
    def expected_ids(self) -> tuple[str, ...]:
        return tuple(f"openmoji:{hexcode}" for hexcode in self.expected)


QUERIES = (
    DemoQuery(TEXT, "a smiling cat", "", ("1F63A", "1F638", "1F63B", "1F63C")),
    DemoQuery(TEXT, "a red heart", "", ("2764",)),
    DemoQuery(TEXT, "a slice of pizza", "", ("1F355",)),
    DemoQuery(TEXT, "a sunflower", "", ("1F33B",), unseen=True),
    DemoQuery(IMAGE, "", "1F3B8", ("1F3B8",)),
    DemoQuery(IMAGE, "", "1F427", ("1F427",)),
    DemoQuery(IMAGE, "", "1F349", ("1F349",), unseen=True),
    DemoQuery(IMAGE, "", "1F984", ("1F984",), unseen=True),
    DemoQuery(
        COMPOSED,
        "the same, but as a woman with dark skin tone",
        "1F9D1-200D-1F4BB",
        ("1F469-1F3FF-200D-1F4BB",),
    ),
    DemoQuery(
        COMPOSED,
        "the same, but as a man with medium-dark skin tone",
        "1F469-200D-1F33E",
        ("1F468-1F3FE-200D-1F33E",),
        unseen=True,
    ),
    DemoQuery(
        COMPOSED,
        "the same, but as a woman with light skin tone",
        "1F9D1-200D-1F692",
        ("1F469-1F3FB-200D-1F692",),
        unseen=True,
    ),
    DemoQuery(
        COMPOSED, "the same, but with medium skin tone", "1F44D", ("1F44D-1F3FD",), unseen=True
    ),
)
