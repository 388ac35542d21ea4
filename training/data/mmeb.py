"""The published MMEB training mix: a YAML of data sets, and rows of `qry, qry_image_path,
pos_text, pos_image_path, neg_text, neg_image_path`.

The reference trainer reads the `neg_*` columns and drops them; here they become negatives. Beside
them, `qry_ecr`, `pos_ecr` and `neg_ecr` are read where a data set has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from training.data.columns import Columns, ColumnSource, data_files
from training.data.mixture import Mixture, Weighted
from tte_jax.errors import InvalidInputError, NotFoundError, UnsupportedError

COLUMNS = Columns(
    query="qry",
    query_image="qry_image_path",
    query_instruction="",
    query_ecr="qry_ecr",
    positive="pos_text",
    positive_image="pos_image_path",
    positive_instruction="",
    positive_ecr="pos_ecr",
    negative="neg_text",
    negative_image="neg_image_path",
    negative_ecr="neg_ecr",
)
PLACEHOLDER = "<|image_1|>"
PARSERS = ("mmeb", "mmeb_neg")
_KNOWN = {
    "dataset_parser", "dataset_name", "subset_name", "dataset_split", "image_dir",
    "num_sample_per_subset", "weight", "global_dataset_name", "num_hardneg",
}  # fmt: skip


def mixture(path: str | Path, *, root: Path | None = None, cache: Path | None = None) -> Mixture:
    """The mix that a YAML file describes.

    Args:
      path: the file.
      root: what relative folders in it are relative to, and where `org/name` of the hub was
        downloaded to; None = the file's folder.

    Raises:
      NotFoundError: the file or a data set is not there.
      InvalidInputError: the file is not such a YAML.
      UnsupportedError: a data set of another parser than `mmeb` and `mmeb_neg`.
    """
    path = Path(path)
    try:
        parsed = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read ({error.strerror})", path=path) from None
    except yaml.YAMLError as error:
        raise InvalidInputError(f"{path} is not YAML: {error}", field=str(path)) from None
    if not isinstance(parsed, Mapping) or not parsed:
        raise InvalidInputError(f"{path}: expected a mapping of data sets", field=str(path))
    parts = [
        _part(str(name), entry, f"{path}: {name}", root or path.parent, cache)
        for name, entry in parsed.items()
    ]
    return Mixture(parts)


def _part(name: str, entry: Any, where: str, root: Path, cache: Path | None) -> Weighted:
    if not isinstance(entry, Mapping):
        raise InvalidInputError(f"{where}: expected a mapping, got {entry!r}", field=where)
    parser = entry.get("dataset_parser", "mmeb")
    if parser not in PARSERS:
        raise UnsupportedError(
            f"{where}: dataset_parser {parser!r} is not read here, only {', '.join(PARSERS)}. "
            "Write its rows as JSON lines (docs/training.md) and name that file instead."
        )
    if unknown := set(entry) - _KNOWN:
        raise InvalidInputError(
            f"{where}: unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(_KNOWN))}",
            field=where,
        )
    weight = float(entry.get("weight", 1))
    if not weight > 0:
        raise InvalidInputError(f"{where}: weight is {weight}, expected more than 0", field=where)
    repo = str(entry.get("dataset_name") or "")
    folder = next((p for p in (root / repo, root / repo.split("/")[-1]) if p.is_dir()), None)
    if folder is None:
        raise NotFoundError(
            f"{where}: the data set {repo!r} is not below {root}. Get: hf download --repo-type "
            f"dataset {repo} --local-dir {root / repo}",
            reason="MISSING_DATA",
        )
    subset = str(entry.get("subset_name") or "")
    files = data_files(folder, str(entry.get("dataset_split") or "original"), subset)
    image_dir = entry.get("image_dir")
    source = ColumnSource(
        files,
        name,
        columns=COLUMNS,
        media=root / image_dir if image_dir else folder,
        limit=int(entry.get("num_sample_per_subset") or 0),
        strip=PLACEHOLDER,
        skip_empty=True,
        cache=cache,
    )
    return Weighted(name, source, weight)
