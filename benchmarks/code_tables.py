"""Tables of facts that the code states: settings, ports, limits, errors, exit codes."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import get_type_hints

from benchmarks.markdown import table
from servers.settings import DEFAULT_PORTS, Settings
from tte_jax import errors, limits
from tte_jax.cli import exits, inspection

_LIMITS = {
    "MAX_MESSAGE_BYTES": "bytes of content in one message",
    "MAX_BATCH_ITEMS": "items in a `Reason`, `Embed`, `Upsert` or `Get` request",
    "MAX_DELETE_IDS": "ids in a delete request",
    "MAX_PARTS": "parts of a content",
    "MAX_TEXT_CHARS": "characters of a text part",
    "MAX_INSTRUCTION_CHARS": "characters of an instruction",
    "MAX_REASONING_CHARS": "characters of an ECR or of a text to rerank",
    "MAX_IMAGE_PIXELS": "pixels of an image",
    "MAX_PAGES": "page numbers of a page part",
    "MAX_PAGE_PIXELS": "pixels of a drawn page",
    "MAX_VIDEO_FRAMES": "frames of a video",
    "MAX_ID_CHARS": "characters of a document id",
    "MAX_METADATA_FIELDS": "metadata fields of a document",
    "MAX_METADATA_KEY_CHARS": "characters of a metadata key",
    "MAX_METADATA_TEXT_CHARS": "characters of a metadata text",
    "MAX_FILTER_DEPTH": "levels of a filter",
    "MAX_FILTER_CONDITIONS": "conditions of a filter",
    "MAX_FILTER_VALUES": "values of a one-of condition",
    "MAX_SEARCH_VECTORS": "vectors of a `SearchBatch`",
    "MAX_SEARCH_HITS": "vectors times k of a `SearchBatch`",
    "MAX_TOP_K": "results of a search (`top_k`)",
    "MAX_CANDIDATES": "candidates of the first stage",
    "MAX_REWRITE_DEPTH": "candidates rewritten",
    "MAX_RERANK_CANDIDATES": "candidates reranked",
    "MAX_NEW_TOKENS": "new tokens of one reasoning",
    "MAX_TEMPERATURE": "temperature of sampling",
    "MAX_STOPS": "texts that end a reasoning",
    "MAX_STOP_CHARS": "characters of such a text",
    "MAX_DIMENSION": "dimension of a vector",
    "DEFAULT_TOP_K": "`top_k` when a search does not say",
}


def settings() -> str:
    """Every setting of a server: flag, variable, default, meaning."""
    hints = get_type_hints(Settings)
    rows = []
    for item in fields(Settings):
        if item.name in ("service", "parent_pid"):  # the argument, and the supervisor's own
            continue
        flag, default = item.name.replace("_", "-"), str(item.default)
        rows.append([f"`--{flag}`", f"`TTE_{item.name.upper()}`", hints[item.name].__name__,
                     f"`{default}`" if default else "empty", item.metadata["help"]])  # fmt: skip
    return table(["flag", "variable", "type", "default", "meaning"], rows)


def ports() -> str:
    rows = [
        [name, str(port), f"`{inspection.SERVICES[name]}`"] for name, port in DEFAULT_PORTS.items()
    ]
    return table(["service", "usual port", "gRPC service, also its name in health checks"], rows)


def limits_() -> str:
    """Raises ValueError when a limit has no description here, or a description no limit."""
    known = {name: value for name, value in vars(limits).items() if name.isupper()}
    if known.keys() != _LIMITS.keys():
        odd = ", ".join(sorted(known.keys() ^ _LIMITS.keys()))
        raise ValueError(f"limits and their descriptions differ: {odd}")
    rows = [[_LIMITS[name], f"{value:,}"] for name, value in known.items()]
    return table(["limit", "value"], rows)


def errors_() -> str:
    """Every error type with the gRPC code that it travels as."""
    rows = []
    for kind in vars(errors).values():
        if not (inspect.isclass(kind) and issubclass(kind, errors.TteError)):
            continue
        if kind is errors.TteError:
            continue
        meaning = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
        code = f"`{kind.code}`"
        rows.append([code, f"`{kind.__name__}`", f"`{kind.default_reason}`", meaning])
    return table(["gRPC code", "Python type", "usual reason", "meaning"], rows)


def exit_codes() -> str:
    """The table in the docstring of `tte_jax.cli.exits`."""
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", exits.__doc__ or "", re.MULTILINE)
    return table(["exit code", "meaning"], rows)
