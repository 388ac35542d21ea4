"""One stream of mined records, shared by the hosts of a trainer.

Records of the sealed rounds stand one behind the other. A batch is the next so many of them, and
each host reads its contiguous share, so that no record is read twice or left out, whatever the
number of hosts, and that number may change at any batch. The position is (round, offset), the same
on every host; a checkpoint that keeps it goes on exactly there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from training.mining.records import Record
from training.mining.rounds import Round, name_of, sealed
from tte_jax.errors import DataLossError, InvalidInputError


@dataclass(frozen=True, order=True)
class Position:
    """The next record: `offset` within the sealed round number `round`."""

    round: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Share:
    """One host's part of a batch, and where the batch after it begins."""

    records: tuple[Record, ...]
    after: Position


class RoundStream:
    """Batches of records from the rounds below a folder.

    Args:
      root: folder of the rounds, shared by the hosts.
      batch: records of one batch, all hosts together.
      host, hosts: this host's number and their count, a divisor of `batch`.
      position: of the first record.
      wait_s: how long to wait for a round that is not sealed yet; 0 = the stream ends there. A
        last batch that is not full is left for later: `rest` counts its records.
    """

    def __init__(
        self,
        root: Path,
        *,
        batch: int,
        host: int = 0,
        hosts: int = 1,
        position: Position | None = None,
        wait_s: float = 0.0,
        poll_s: float = 0.5,
    ) -> None:
        if hosts < 1 or not 0 <= host < hosts or batch < 1 or batch % hosts:
            raise InvalidInputError(
                f"host {host} of {hosts}: expected a divisor of the batch of {batch}",
                field="hosts",
            )
        self.root, self.batch, self.host, self.hosts = root, batch, host, hosts
        self.position = position or Position()
        self._wait_s, self._poll_s = wait_s, poll_s
        self._rounds: dict[int, Round] = {}

    def __iter__(self) -> Iterator[Share]:
        while (share := self.next()) is not None:
            yield share

    def next(self) -> Share | None:
        """The next batch's share; None when fewer than a batch of records are sealed."""
        places = self._places()
        if places is None:
            return None
        size = self.batch // self.hosts
        mine = places[self.host * size : (self.host + 1) * size]
        last = places[-1]
        self.position = Position(last.round, last.offset + 1)
        return Share(tuple(self._rounds[p.round][p.offset] for p in mine), self.position)

    @property
    def rest(self) -> int:
        """Sealed records that are left, fewer than a batch when the stream has ended."""
        return sum(
            len(self._round(n)) - (self.position.offset if n == self.position.round else 0)
            for n in sealed(self.root)
            if n >= self.position.round
        )

    def _places(self) -> list[Position] | None:
        places: list[Position] = []
        number, offset = self.position.round, self.position.offset
        while len(places) < self.batch:
            if not self._await(number):
                return None
            size = len(self._round(number))
            if offset > size:
                raise DataLossError(
                    f"the position is record {offset} of round {number}, which has {size}. It is "
                    "of other rounds: restore them, or begin at (0, 0)."
                )
            end = min(size, offset + self.batch - len(places))
            places += [Position(number, i) for i in range(offset, end)]
            offset = end
            if offset == size and len(places) < self.batch:
                number, offset = number + 1, 0
        return places

    def _await(self, number: int) -> bool:
        deadline = time.monotonic() + self._wait_s
        while number not in sealed(self.root):
            if time.monotonic() >= deadline:
                return False
            time.sleep(self._poll_s)
        return True

    def _round(self, number: int) -> Round:
        if number not in self._rounds:
            self._rounds = {n: r for n, r in self._rounds.items() if n >= number - 1}
            self._rounds[number] = Round(self.root / name_of(number))
        return self._rounds[number]
