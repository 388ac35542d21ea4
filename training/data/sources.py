"""A source by one line of text, as configurations and commands name it.

    jsonl:data/birds.jsonl
    hf:data/birds?split=train&query=caption&positive_image=image
    mmeb:train_image.yaml?root=/data/hub
    emoji:.data/emoji?text=3000&image=1000&composed=2000&seed=0

Any of them takes `first=N`, `ecrs=FILE` (of `training.reason`), and `mined=FOLDER`, a sealed round
of `training.loop` that was mined from exactly these data.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from urllib.parse import parse_qsl, quote

from training.data.columns import Columns, ColumnSource, data_files
from training.data.ecrs import EcrStore, WithEcrs
from training.data.jsonl import JsonlSource
from training.data.mixture import Mixture, Subset, Weighted
from training.data.rows import ExampleSource
from tte_jax.errors import InvalidInputError, NotFoundError

_COLUMNS = {f.name for f in fields(Columns)}
_OPTIONS = {
    "jsonl": {"media", "dataset"},
    "hf": {"split", "subset", "dataset", "media", "limit", *_COLUMNS},
    "mmeb": {"root"},
    "emoji": {"text", "image", "composed", "seed", "families", "truth"},
}


def open_source(spec: str) -> ExampleSource:
    """The source that `spec` names; see the module's docstring.

    Raises:
      InvalidInputError: no such kind or option.
      NotFoundError, DataLossError, UnsupportedError: as the source.
    """
    kind, colon, rest = spec.partition(":")
    path, _, query = rest.partition("?")
    if not colon or kind not in _OPTIONS or not path:
        raise InvalidInputError(
            f"data {spec!r}: expected KIND:PATH?OPTION=VALUE with a KIND of {', '.join(_OPTIONS)}",
            field="data",
        )
    options = dict(parse_qsl(query, keep_blank_values=True))
    ecrs, first, mined = (options.pop(name, "") for name in ("ecrs", "first", "mined"))
    if unknown := set(options) - _OPTIONS[kind]:
        raise InvalidInputError(
            f"data {spec!r}: {kind} has no option {', '.join(sorted(unknown))}; it has "
            f"{', '.join(sorted(_OPTIONS[kind]))}, ecrs, first, mined",
            field="data",
        )
    source = _open(kind, Path(path), options, spec)
    if first:
        source = Subset(source, range(min(_number(first, "first", spec), len(source))))
    if ecrs:
        source = WithEcrs(source, EcrStore(Path(ecrs)))
    if mined:
        from training.mining.mined_source import MinedSource

        return MinedSource.of(source, Path(mined))
    return source


def mined_round(spec: str) -> str:
    """The sealed round that `spec` reads its negatives from: its number and content, so that a
    checkpoint can say it. "" = none.

    Raises DataLossError when it is not sealed, or damaged.
    """
    folder = dict(parse_qsl(spec.partition("?")[2])).get("mined", "")
    if not folder:
        return ""
    from training.mining.rounds import Round

    round = Round(Path(folder), verify=False)
    return f"{round.number}:{round.sha256[:16]}"


def with_option(spec: str, name: str, value: str) -> str:
    """The same source with one more option behind it."""
    return f"{spec}{'&' if '?' in spec else '?'}{name}={quote(value)}"


def _open(kind: str, path: Path, options: dict[str, str], spec: str) -> ExampleSource:
    media = Path(options["media"]) if "media" in options else None
    if kind == "jsonl":
        return JsonlSource(path, media=media, dataset=options.get("dataset", ""))
    if kind == "hf":
        chosen = {name: options[name] for name in _COLUMNS & set(options)}
        files = (
            [path]
            if path.is_file()
            else data_files(path, options.get("split", "train"), options.get("subset", ""))
        )
        return ColumnSource(
            files,
            options.get("dataset", path.stem),
            columns=Columns(**chosen),
            media=media,
            limit=_number(options.get("limit", "0"), "limit", spec),
        )
    if kind == "mmeb":
        from training.data import mmeb

        root = Path(options["root"]) if "root" in options else None
        return mmeb.mixture(path, root=root)
    from training.data.emoji import load
    from training.data.emoji_examples import KINDS, EmojiSource

    try:
        data = load(path)
    except FileNotFoundError as error:
        raise NotFoundError(str(error), reason="MISSING_DATA") from None
    counts = {k: _number(options.get(k, "0"), k, spec) for k in KINDS}
    if not any(counts.values()):
        counts = {"text": 3000, "image": 1000, "composed": 2000}
    seed = _number(options.get("seed", "0"), "seed", spec)
    truth = options.get("truth", "0") not in ("0", "")
    families = _number(options.get("families", "0"), "families", spec)

    def source(kind: str, count: int) -> EmojiSource:
        return EmojiSource(data, kind, count, seed=seed, families=families, truth=truth)

    return Mixture(
        [
            Weighted(f"emoji-{kind}", source(kind, count), float(count))
            for kind, count in counts.items()
            if count
        ]
    )


def _number(text: str, name: str, spec: str) -> int:
    if not text.isdecimal():
        raise InvalidInputError(
            f"data {spec!r}: {name} is {text!r}, expected a whole number", field="data"
        )
    return int(text)
