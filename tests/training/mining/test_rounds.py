"""Rounds on disk: killed at every step, torn, damaged, sealed; and one stream for many hosts."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from training.mining import rounds
from training.mining.records import Record, Rules, Scored
from training.mining.rounds import Round, RoundWriter, sealed
from training.mining.stream import Position, RoundStream
from training.mining.workspace import tree_hash
from tte_jax.corpus import durable
from tte_jax.errors import DataLossError, InvalidInputError, PreconditionError

HEADER = {"rules": {"arm": "reranker", "negatives": 2}, "table": "t", "models": {}}


def record(number: int) -> Record:
    return Record(
        "birds",
        f"q{number}",
        positive_score=0.1 * (number % 10),
        negatives=tuple(Scored(f"d{number}-{i}", 1 / (i + 3)) for i in range(number % 3)),
        false_negatives=(Scored("ü\u2028", 0.99),) if number % 4 == 0 else (),
        refused="too long" if number == 5 else "",
    )


def write(root: Path, number: int = 0, count: int = 10, first: int = 0) -> Path:
    """Goes on from whatever is there."""
    with RoundWriter(root, number, HEADER, part_records=3) as writer:
        for i in range(writer.durable, count):
            writer.append(record(first + i))
        return writer.seal()


def test_a_round_says_what_is_in_it(tmp_path):
    made = Round(write(tmp_path))
    assert list(made) == [record(i) for i in range(10)]
    assert made[9] == record(9) and len(made) == 10
    assert made.manifest["counts"] == {
        "records": 10,
        "negatives": sum(i % 3 for i in range(10)),
        "false_negatives": 3,
        "queries_without_negatives": 4,
        "refused": 1,
    }
    assert [p["records"] for p in made.manifest["parts"]] == [3, 3, 3, 1]
    with pytest.raises(IndexError):
        made[10]
    # The same records are the same bytes, wherever and whenever they are written.
    (tmp_path / "elsewhere").mkdir()
    assert tree_hash(write(tmp_path / "elsewhere")) == tree_hash(made.path)
    assert Round(write(tmp_path, 1, first=1)).sha256 != made.sha256


class Crash(BaseException):
    """The process ends here."""


def test_a_crash_at_any_step_leaves_the_same_round(tmp_path, monkeypatch):
    """Every call that makes something durable is once the last, before it as well as after it."""
    whole = tree_hash(write(tmp_path / "whole"))
    crash_at, steps = [10**9], [0]

    def counted(call):
        def run(*arguments, **options):
            steps[0] += 1
            if steps[0] == crash_at[0]:
                raise Crash
            result = call(*arguments, **options)
            steps[0] += 1
            if steps[0] == crash_at[0]:
                raise Crash
            return result

        return run

    monkeypatch.setattr(rounds, "write_atomically", counted(rounds.write_atomically))
    monkeypatch.setattr(os, "rename", counted(os.rename))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "chmod", counted(Path.chmod))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    write(tmp_path / "counting")
    total = steps[0]
    assert total > 30
    for step in range(1, total + 1):
        root = tmp_path / f"crash-{step}"
        crash_at[0], steps[0] = step, 0
        with pytest.raises(Crash):
            write(root)
        crash_at[0] = 10**9
        if sealed(root):
            path = root / "round-00000"
            with pytest.raises(PreconditionError, match="sealed rounds never change"):
                RoundWriter(root, 0, HEADER)
        else:
            path = write(root)
        assert tree_hash(path) == whole, step
        assert sorted(p.name for p in root.iterdir()) == [".writer", "round-00000"]
        assert list(Round(path)) == [record(i) for i in range(10)]


def test_torn_and_open_rounds_are_ignored(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1)
    (tmp_path / "round-00001/manifest.json").unlink()
    writer = RoundWriter(tmp_path, 2, HEADER, part_records=3)
    for i in range(4):
        writer.append(record(i))
    assert sealed(tmp_path) == [0]
    assert sealed(tmp_path / "none") == []
    writer.close()
    # What was not in a whole part is gone, and what was torn is swept up.
    torn = tmp_path / "round-00002.open/.part-00001-x.jsonl.123.tmp"
    torn.write_bytes(b'{"dataset": "bi')
    with RoundWriter(tmp_path, 2, HEADER, part_records=3) as again:
        assert again.durable == 3 and not torn.exists()


def test_sealed_files_cannot_be_written(tmp_path):
    path = write(tmp_path)
    modes = {file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert modes == {0o444}


@pytest.mark.parametrize("file", ["part-00001", "manifest.json"])
def test_a_damaged_round_is_never_read(tmp_path, file):
    path = write(tmp_path)
    victim = next(p for p in path.iterdir() if p.name.startswith(file))
    victim.chmod(0o644)
    data = victim.read_bytes()
    victim.write_bytes(data.replace(b"d4-0", b"d5-0").replace(b'"records": 3', b'"records": 2'))
    assert victim.read_bytes() != data
    with pytest.raises(DataLossError, match="damaged"):
        Round(path)
    victim.unlink()
    with pytest.raises(DataLossError):
        Round(path)


def test_a_damaged_part_is_not_gone_on_with(tmp_path):
    writer = RoundWriter(tmp_path, 0, HEADER, part_records=3)
    for i in range(4):
        writer.append(record(i))
    writer.close()
    (part,) = (tmp_path / "round-00000.open").glob("part-*")
    part.write_bytes(part.read_bytes()[:-2] + b" \n")
    with pytest.raises(DataLossError, match="damaged or out of order"):
        RoundWriter(tmp_path, 0, HEADER, part_records=3)


def test_another_runs_round_is_not_gone_on_with(tmp_path):
    RoundWriter(tmp_path, 0, HEADER).close()
    with pytest.raises(PreconditionError, match="begun with") as raised:
        RoundWriter(tmp_path, 0, HEADER | {"table": "u"})
    assert raised.value.reason == "HEADER_MISMATCH"
    with RoundWriter(tmp_path, 0, HEADER):  # and the lock was let go
        with pytest.raises(PreconditionError) as raised:
            RoundWriter(tmp_path, 0, HEADER)
        assert raised.value.reason == "ROUNDS_IN_USE"


@pytest.mark.parametrize("hosts", [1, 2, 3, 6])
def test_hosts_share_one_stream_without_overlap_or_loss(tmp_path, hosts):
    for number, count in enumerate((10, 4, 11)):
        write(tmp_path, number, count, first=100 * number)
    everything = [record(100 * n + i) for n, c in enumerate((10, 4, 11)) for i in range(c)]
    streams = [RoundStream(tmp_path, batch=6, host=h, hosts=hosts) for h in range(hosts)]
    got: list[Record] = []
    for shares in zip(*streams, strict=True):
        assert len({share.after for share in shares}) == 1
        for share in shares:
            got += share.records
    assert got == everything[:24]
    assert [stream.rest for stream in streams] == [1] * hosts
    assert streams[0].position == Position(2, 10)


def test_the_stream_goes_on_at_a_position_with_other_hosts(tmp_path):
    for number in range(3):
        write(tmp_path, number, 10, first=100 * number)
    first = RoundStream(tmp_path, batch=4)
    got = [record for _ in range(3) for record in first.next().records]  # pyright: ignore
    position = Position(**json.loads(json.dumps(vars(first.position))))
    assert position == Position(1, 2)
    streams = [RoundStream(tmp_path, batch=4, host=h, hosts=4, position=position) for h in range(4)]
    for shares in zip(*streams, strict=True):
        got += [record for share in shares for record in share.records]
    assert got == [record(100 * n + i) for n in range(3) for i in range(10)][:28]


def test_a_trainer_can_wait_for_a_round(tmp_path):
    write(tmp_path, 0, 4)
    stream = RoundStream(tmp_path, batch=4, wait_s=30, poll_s=0.01)
    assert stream.next() is not None

    def later() -> None:
        time.sleep(0.2)
        write(tmp_path, 1, 4, first=50)

    thread = threading.Thread(target=later)
    thread.start()
    share = stream.next()
    thread.join()
    assert share is not None and share.records == tuple(record(50 + i) for i in range(4))


def test_shares_that_do_not_come_out_even(tmp_path):
    write(tmp_path)
    with pytest.raises(InvalidInputError, match="divisor"):
        RoundStream(tmp_path, batch=4, hosts=3)
    with pytest.raises(DataLossError, match="of other rounds"):
        RoundStream(tmp_path, batch=1, position=Position(0, 11)).next()


@pytest.mark.parametrize(
    "wrong",
    [{"arm": "hard"}, {"negatives": 0}, {"percent_of_positive": 1.1}, {"depth": 256}],
)
def test_rules_out_of_range(wrong):
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        Rules(**wrong)


def test_nothing_is_kept_before_it_is_synced():
    """The writer's durability is `write_atomically`'s; this is what it calls."""
    assert rounds.write_atomically is durable.write_atomically
