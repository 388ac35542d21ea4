"""Memory over requests, from curves with known slopes."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import soak

REQUESTS = np.arange(0.0, 6000.0, 10.0)
RESIDENT = 500e6


def memory(slope: float, noise: float, seed: int = 0) -> np.ndarray:
    """A process that settles in the first third, then grows by `slope` bytes a request."""
    rng = np.random.default_rng(seed)
    settling = 100e6 * np.minimum(REQUESTS / 1500.0, 1.0)
    return RESIDENT + settling + slope * REQUESTS + rng.normal(0, noise, len(REQUESTS))


def test_a_cache_that_fills_and_noise_are_no_leak() -> None:
    found = soak.fit(REQUESTS, memory(0.0, noise=1e5))
    assert found.verdict == "flat"
    assert found.low < 0 < found.high


def test_a_leak_is_found_with_its_size() -> None:
    found = soak.fit(REQUESTS, memory(4000.0, noise=1e6))
    assert found.verdict == "grows"
    assert found.low < 4000.0 < found.high and found.slope == pytest.approx(4000.0, rel=0.1)


def test_where_the_noise_hides_a_slope_it_is_not_called_flat() -> None:
    assert soak.fit(REQUESTS, memory(0.0, noise=3e8)).verdict == "too short to say"
    few = REQUESTS / 10  # so few that a cache may still be filling
    assert soak.fit(few, memory(4000.0, noise=1e3)).verdict == "too short to say"
    with pytest.raises(ValueError, match="too few"):
        soak.fit(REQUESTS[:30], memory(0.0, noise=1.0)[:30])


def test_the_table_names_every_process() -> None:
    one = {"memory_mb": 512.3, "growth_in_8_h": 0.011, "growth_interval": [-0.002, 0.024],
           "verdict": "flat"}  # fmt: skip
    text = soak.summary({"services": {"gateway": one, "index": one}})
    assert "| gateway | 512 | +1.1 % (-0.2 to +2.4) | flat |" in text
    assert "| index |" in text
