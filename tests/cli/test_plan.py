"""`tte plan`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny_models
from tests.cli.conftest import Tte, document


def test_tables_and_json_say_the_same(tte: Tte) -> None:
    arguments = ("plan", "--model", "7B", "--mesh", "data=1,fsdp=4,tp=2")
    shown = tte(*arguments)
    assert shown.exit_code == 0, shown.output
    said = document(tte(*arguments, "--json"))
    assert said["mesh"] == {"data": 1, "fsdp": 4, "tp": 2}
    sizes = said["bytes_per_device"]
    assert sizes["total"] == sum(sizes[k] for k in ("weights", "kv_cache", "activations"))
    assert 2 * said["parameters"] / 8 <= sizes["weights"] < 1.02 * 2 * said["parameters"] / 8
    for size in sizes.values():
        assert f"{size:,}" in shown.stdout


def test_a_directory_of_ones_own(tte: Tte) -> None:
    said = document(tte("plan", "--model", tiny_models.text_dir(), "--dtype", "float32", "--json"))
    assert said["patches"] == 0 and said["bytes_per_device"]["weights"] == 4 * said["parameters"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--model", "7B", "--mesh", "tp=8"], "N=28 over tp=8"),
        (["--model", "7B", "--mesh", "tp=2,pp=2"], "pp=2"),
        (["--model", "72B", "--mesh", "tp=8", "--device-memory", "16"], "which has 16"),
        (["--model", "7B", "--dtype", "int4"], "int4"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(
    tte: Tte, arguments: list[str], word: str
) -> None:
    result = tte("plan", *arguments)
    assert result.exit_code == 2
    assert word in result.stderr


def test_a_model_that_is_not_there(tte: Tte, tmp_path: Path) -> None:
    result = tte("plan", "--model", tmp_path / "none")
    assert result.exit_code == 3 and "config.json" in result.stderr
