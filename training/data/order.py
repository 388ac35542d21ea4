"""Which examples a step sees: a pure function of (seed, step, place in the global batch).

Every sub-batch is of one data set, shuffled within it and anew in each epoch; data sets alternate
by weight. Hosts take contiguous shares of a global batch, so the order is the same for any number
of them, and the position in the data is one integer: the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from training.data.examples import Example
from training.data.mixture import Mixture
from tte_jax.errors import InvalidInputError


class BatchOrder:
    """Indices of a mixture's examples by step.

    Args:
      mixture: the data sets with their weights.
      global_batch: examples of one step, all hosts together.
      sub_batch: examples of one data set that stand together; divides `global_batch`.
      seed: another seed is another order.

    Raises:
      InvalidInputError: a size does not fit; a data set is smaller than a sub-batch.
    """

    def __init__(
        self, mixture: Mixture, *, global_batch: int, sub_batch: int, seed: int = 0
    ) -> None:
        if sub_batch < 1 or global_batch < 1 or global_batch % sub_batch:
            raise InvalidInputError(
                f"global_batch {global_batch} is not a multiple of sub_batch {sub_batch}",
                field="sub_batch",
            )
        self.global_batch, self.sub_batch = global_batch, sub_batch
        shuffled = []
        for number, part in enumerate(mixture.parts):
            size = len(part.source)
            if size < sub_batch:
                raise InvalidInputError(
                    f"the data set {part.name} has {size} examples, fewer than a sub-batch of "
                    f"{sub_batch}, which would hold one of them twice. Lower sub_batch, or leave "
                    "the data set out.",
                    field="sub_batch",
                )
            # Batched before it is repeated: a sub-batch never holds an example twice. What an
            # epoch leaves over is sitting this one out, and is drawn anew in the next.
            start = mixture.starts[number]
            indices = grain.MapDataset.range(start, start + size)
            seeded = indices.seed((1000 * seed + number) % 2**32).shuffle()
            shuffled.append(seeded.batch(sub_batch, drop_remainder=True).repeat())
        self._sub_batches: Any = grain.MapDataset.mix(shuffled, [p.weight for p in mixture.parts])

    def step(self, step: int) -> np.ndarray:
        """[global_batch] int64 indices of the mixture's examples in a step, from 0."""
        count = self.global_batch // self.sub_batch
        return np.concatenate(
            [self._sub_batches[n] for n in range(step * count, step * count + count)]
        )

    def share(self, step: int, host: int = 0, hosts: int = 1) -> np.ndarray:
        """[global_batch / hosts] of them: those that a host reads.

        Raises InvalidInputError when the hosts do not divide the global batch.
        """
        if not 0 <= host < hosts or self.global_batch % hosts:
            raise InvalidInputError(
                f"host {host} of {hosts}: expected a divisor of the global batch "
                f"{self.global_batch}",
                field="hosts",
            )
        size = self.global_batch // hosts
        return self.step(step)[host * size : (host + 1) * size]


@dataclass(frozen=True)
class _Steps:
    """One host's examples by step, as grain reads them."""

    mixture: Mixture
    order: BatchOrder
    first: int
    host: int
    hosts: int

    def __len__(self) -> int:
        return 2**31 - 1

    def __getitem__(self, index: int) -> list[Example]:
        step = self.first + int(index)
        return [self.mixture[int(i)] for i in self.order.share(step, self.host, self.hosts)]


def read_steps(
    mixture: Mixture,
    order: BatchOrder,
    *,
    step: int = 0,
    host: int = 0,
    hosts: int = 1,
    threads: int = 4,
    ahead: int = 2,
) -> Iterator[tuple[int, list[Example]]]:
    """(step, this host's examples) from `step` on, without end; media are read by threads.

    To go on after a restart, pass the first step that was not trained on.

    Args:
      threads: that read steps; 0 = reading happens when a step is asked for.
      ahead: steps that are read before they are asked for.
    """
    steps = grain.MapDataset.source(_Steps(mixture, order, step, host, hosts))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead if threads else 0)
    yield from enumerate(steps.to_iter_dataset(options), start=step)
