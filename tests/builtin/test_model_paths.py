"""Finding model directories."""

from __future__ import annotations

import pytest

from tte_jax.builtin import models
from tte_jax.errors import NotFoundError


def test_a_name_or_a_directory_is_a_model(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(models, "WEIGHTS_DIR", tmp_path)
    for name in models.NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        assert models.path_of(name) == models.resolve(name) == tmp_path / name
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text("{}")
    assert models.resolve(str(own)) == own


def test_what_is_not_a_model_is_named(tmp_path) -> None:
    with pytest.raises(NotFoundError, match="no-such-dir"):
        models.resolve(str(tmp_path / "no-such-dir"))
    with pytest.raises(NotFoundError, match="config.json"):
        models.resolve(str(tmp_path))
    with pytest.raises(NotFoundError, match="gpt"):
        models.path_of("gpt")


def test_missing_weights_are_told_apart_from_unknown_names(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(models, "WEIGHTS_DIR", tmp_path)
    with pytest.raises(NotFoundError, match="not in this installation"):
        models.path_of("tte-mini-vl")
