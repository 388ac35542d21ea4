"""Rows of image tasks, in the benchmark's columns."""

from __future__ import annotations

from typing import Any

PLACEHOLDER = "<|image_1|>"
REPRESENT = f"{PLACEHOLDER}\nRepresent the picture."


def image_row(**given: Any) -> dict[str, Any]:
    """A row; what is not given is empty. The first candidate is the right one."""
    empty = {"qry_inst": "", "qry_text": "", "qry_img_path": "", "tgt_inst": ""}
    texts, paths = given.get("tgt_text"), given.get("tgt_img_path")
    given["tgt_text"] = texts or [""] * len(paths or ())
    given["tgt_img_path"] = paths or [""] * len(texts or ())
    return empty | given
