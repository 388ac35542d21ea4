"""Prompts for real checkpoints: a role, the task, the form of the answer and one worked example.

All that is the same for many inputs stands first, so that it can be prefilled once: the system turn
and, in a rewrite, what was searched for.
The reranker's prompt is the one that Qwen3-Reranker was published with: its head was trained on
those words.
"""

from __future__ import annotations

from dataclasses import dataclass

from tte_jax.content import Side, Task
from tte_jax.preprocess.ecr import END_THINK, THINK, plain
from tte_jax.preprocess.template import IM_END, IM_START, Piece, PrefixEnd, Special, Tagged, Turn

NAME = "full"

RERANK_SAME = (
    "Given a description of what is searched for, judge whether the document describes the same "
    "thing: the same kind of object, scene or event, with the attributes that were asked for"
)
"""Instruction of the reranker where query and document are descriptions of media."""

RERANK_ANSWERS = "Given a question, judge whether the document page contains what answers it"
"""Instruction of the reranker for document pages."""


@dataclass(frozen=True)
class Words:
    """The wording of one task on one side.

    Attributes:
      job: what to do, in the reasoner's system turn.
      example_input, cues, answer: the worked example.
      ask: the user turn's request, after media and text.
      label: of the last line, "Answer" or "Summary".
    """

    job: str
    example_input: str
    cues: str
    answer: str
    ask: str
    label: str = "Answer"


_WORDS = {
    (Task.TEXT, Side.QUERY): Words(
        job=(
            "You get a short text with which somebody searches a collection of images. Picture "
            "the image that would satisfy it and say what can be seen there. Add detail only "
            "where it is nearly certain; never change what was asked for."
        ),
        example_input="a dog catching a frisbee at the sea",
        cues=(
            "A dog in mid-leap with its mouth open around a flat round disc. Behind it wet sand, "
            "shallow waves and an open sky, so it is outdoors in daylight."
        ),
        answer="a dog leaping to catch a frisbee on a sandy beach",
        ask="What does the wanted image show?",
    ),
    (Task.TEXT, Side.DOCUMENT): Words(
        job=(
            "You get a text from a collection that is searched. Say what it is about and what "
            "somebody who searches for it would ask."
        ),
        example_input="Preheat to 220 C, stretch the dough thin, bake 8 minutes on a hot stone.",
        cues=(
            "Baking steps: a very hot oven, thinly stretched dough, a short time on a stone. This "
            "is how pizza is made at home."
        ),
        answer="instructions for baking pizza on a stone",
        ask="What is this text about?",
    ),
    (Task.IMAGE, Side.QUERY): Words(
        job=(
            "You get an image with which somebody searches for things of the same kind. Name the "
            "visible cues that tell what it is, then what it is. Leave out style, lighting and "
            "background unless they are the subject."
        ),
        example_input="(a drawing of a small bird with a red breast on a snowy branch)",
        cues=(
            "A small round bird, brown above, with an orange-red breast and a thin beak. It sits "
            "on a twig with snow, as this bird is often shown in winter."
        ),
        answer="European robin",
        ask="What is shown here?",
    ),
    (Task.IMAGE, Side.DOCUMENT): Words(
        job=(
            "You get an image from a collection that is searched. Describe what is in it: the "
            "main subject, its attributes such as number, colour, expression and pose, what "
            "happens, and any text that can be read. Then sum it up in one line that a searcher "
            "might write."
        ),
        example_input="(a photograph of two children building a tower of wooden blocks)",
        cues=(
            "Two small children sit on a carpet; the left one, in a yellow jumper, sets a block on "
            "a tower that already reaches its shoulder. More wooden blocks in four colours lie "
            "around."
        ),
        answer="two children building a tall tower of wooden blocks on a carpet",
        ask="Describe this image for retrieval.",
        label="Summary",
    ),
    (Task.COMPOSED, Side.QUERY): Words(
        job=(
            "You get an image and a change to it. Think of the image after the change and "
            "describe only that one: keep everything that the change leaves alone, replace what "
            "it names, and do not mention how it was before."
        ),
        example_input="(a photograph of a red bicycle leaning on a brick wall) the same, but blue "
        "and with a basket",
        cues=(
            "A bicycle leaning on a brick wall. Its frame is blue, and a basket is fixed in front "
            "of the handlebar."
        ),
        answer="a blue bicycle with a front basket leaning on a brick wall",
        ask="Describe the image after the change.",
    ),
    (Task.REWRITE, Side.DOCUMENT): Words(
        job=(
            "You get what was searched for, an item from the result of that search, and how the "
            "item was described before. Describe the item again with an eye on the points that "
            "the search turns on. Report what is really there: where the item differs from what "
            "was searched for, say so."
        ),
        example_input="Searched for: a black cat lying on a laptop (a photograph of a grey cat "
        "asleep on a keyboard) Described before: a cat resting at a desk",
        cues=(
            "The cat lies across the keys of a laptop, so the place agrees. Its fur is grey with "
            "darker stripes, not black."
        ),
        answer="a grey striped cat asleep on a laptop keyboard",
        ask="Describe the item again in the light of the search.",
    ),
}
# A document with a change makes no sense, and a rewrite has always a candidate before it.
_WORDS[Task.COMPOSED, Side.DOCUMENT] = _WORDS[Task.IMAGE, Side.DOCUMENT]
_WORDS[Task.REWRITE, Side.QUERY] = _WORDS[Task.REWRITE, Side.DOCUMENT]

_EMBED_SYSTEM = (
    "You represent text and images as vectors for retrieval. Read the input and the notes about "
    "it, and gather their meaning in one vector."
)

RERANK_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
)


def reason(turn: Turn) -> list[Piece]:
    """Up to and including `assistant`, a new line; the fixed part ends with the system turn."""
    words = _WORDS[turn.task, turn.side]
    job = f"{turn.instruction}\n{words.job}" if turn.instruction else words.job
    # The caller's instruction stays out of the tagged piece: its text may not make think tokens.
    role = f"system\nYou prepare inputs for a retrieval system. {job}\n"
    form = (
        "Form of your reply, with nothing before or after it:\n"
        f"{THINK}one to three short sentences with the evidence{END_THINK}\n"
        f"{words.label}: one line\n"
        "Example\n"
        f"Input: {words.example_input}\n"
        "Reply:\n"
        f"{THINK}{words.cues}{END_THINK}\n"
        f"{words.label}: {words.answer}"
    )
    return [
        Special(IM_START),
        role,
        Tagged(form),
        Special(IM_END),
        PrefixEnd(),
        "\n",
        *_user(turn, words.ask),
        Special(IM_START),
        "assistant\n",
    ]


def embed(turn: Turn, ecr: str) -> list[Piece]:
    """The whole dialogue with the ECR as the reply; ends in the token that is pooled."""
    words = _WORDS[turn.task, turn.side]
    return [
        Special(IM_START),
        f"system\n{_EMBED_SYSTEM}",
        Special(IM_END),
        PrefixEnd(),
        "\n",
        *_user(turn, turn.instruction or words.ask),
        Special(IM_START),
        "assistant\n",
        Tagged(ecr),
        Special(IM_END),
    ]


def rerank_prefix(query: str, instruction: str) -> list[Piece]:
    """Everything before the document; the part that all candidates share."""
    return [
        Special(IM_START),
        f"system\n{RERANK_SYSTEM}",
        Special(IM_END),
        "\n",
        Special(IM_START),
        f"user\n<Instruct>: {instruction or RERANK_SAME}\n<Query>: {query}\n<Document>:",
        PrefixEnd(),
    ]


def rerank_suffix(document: str) -> list[Piece]:
    """The document and an empty think block; the next token is yes or no."""
    return [
        f" {document}",
        Special(IM_END),
        "\n",
        Special(IM_START),
        "assistant\n",
        Tagged(f"{THINK}\n\n{END_THINK}\n\n"),
    ]


def _user(turn: Turn, ask: str) -> list[Piece]:
    lines: list[Piece] = [Special(IM_START), "user\n"]
    text = f"{turn.text}\n" if turn.text else ""
    if turn.task is Task.REWRITE:
        # What all rewrites of one search share goes before the candidate.
        lines += [f"Searched for: {plain(turn.wanted)}\n", PrefixEnd()]
        text += f"Described before: {plain(turn.seen)}\n"
    return [*lines, *turn.media, f"{text}{ask}", Special(IM_END), "\n"]
