"""A sealed round decides which concepts meet in a batch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from tests.training.drawings import emoji_data
from training import builtin
from training.builtin.mined import confused
from training.builtin.pairs import Mix, PairSource
from training.builtin.sampling import image_table
from training.data.emoji_examples import EmojiSource
from training.data.mixture import Mixture, Weighted
from training.mining.figures import figures
from training.mining.records import UNFILTERED, Record, Rules, Scored
from training.mining.rounds import Round, RoundWriter
from training.mining.table import Table, save, table_of
from tte_jax.builtin.models import REASONER, path_of
from tte_jax.errors import InvalidInputError, NotFoundError
from tte_jax.preprocess.tokenizer import Tokenizer

DATA = emoji_data(side=8)
KINDS = ("text", "composed")


@pytest.fixture(scope="module")
def table() -> Table:
    return table_of(Mixture([Weighted(k, EmojiSource(DATA, k, 12), 1.0) for k in KINDS]))


def concept_of(group: str) -> str:
    return group.removeprefix("emoji:")


def sealed(folder: Path, table: Table, *, negatives: int) -> Path:
    """A round in which the first documents of a query's data set that are not right are its
    negatives, the last one first."""
    save(table, folder / "table.jsonl")
    writer = RoundWriter(folder / "rounds", 0, {"table": table.fingerprint, "rules": {}})
    with writer:
        for query in table.queries:
            wrong = [
                Scored(d.key, 0.5)
                for i, d in enumerate(table.documents)
                if d.dataset == query.dataset and not table.is_right(query, i)
            ]
            name = table.datasets[query.dataset]
            writer.append(Record(name, query.key, 0.9, tuple(wrong[:negatives][::-1])))
        return writer.seal()


def test_a_query_is_confused_with_what_its_negatives_show(tmp_path: Path, table: Table) -> None:
    concepts = image_table(DATA).concepts
    found = confused(sealed(tmp_path, table, negatives=3), DATA, concepts)
    assert len(found) == len(table.queries)
    for query, group in zip(table.queries, found, strict=True):
        keys = [DATA.concepts[concepts[i]].key for i in group]
        assert keys[0] == concept_of(query.group)
        wrong = [
            concept_of(group)
            for i, d in enumerate(table.documents)
            if d.dataset == query.dataset and not table.is_right(query, i)
            for group in d.groups
        ]
        # The hardest first, and drawings of one concept by two artists count once.
        assert keys[1:] == list(dict.fromkeys(wrong[:3][::-1]))


def test_an_arm_without_the_filter_has_what_the_filter_drops(tmp_path: Path, table: Table) -> None:
    save(table, tmp_path / "table.jsonl")
    rules = Rules(arm=UNFILTERED, negatives=3)
    writer = RoundWriter(
        tmp_path / "rounds", 0, {"table": table.fingerprint, "rules": asdict(rules)}
    )
    with writer:
        for query in table.queries:
            wrong = [
                Scored(d.key, 0.9 - i / 100)
                for i, d in enumerate(table.documents)
                if d.dataset == query.dataset and not table.is_right(query, i)
            ]
            name = table.datasets[query.dataset]
            writer.append(Record(name, query.key, 0.5, tuple(wrong[2:5]), tuple(wrong[:2])))
        folder = writer.seal()
    concepts = image_table(DATA).concepts
    groups_of = {(table.datasets[d.dataset], d.key): d.groups for d in table.documents}
    round = Round(folder)
    for record, group in zip(round, confused(folder, DATA, concepts), strict=True):
        meant = (*record.false_negatives, *record.negatives)[:3]
        shown = [concept_of(g) for one in meant for g in groups_of[record.dataset, one.key]]
        keys = [DATA.concepts[concepts[i]].key for i in group]
        assert keys[1:] == list(dict.fromkeys(shown))
    found = np.zeros((len(table.queries), 1), int)
    told = figures(round, table, found)
    assert told["negatives"] == 3.0 and told["without"] == 0.0
    meant = [(*r.false_negatives, *r.negatives)[:3] for r in round]
    hard = [(one.score or 0) / 0.5 for some in meant for one in some]
    assert told["hardness"] == pytest.approx(np.mean(hard)) and told["hardness"] > 1
    # The same round as the arm with the filter has it.
    assert [len(r.chosen(filtered=True, count=2)) for r in round] == [2] * len(round)


def test_a_round_without_its_table_says_so(tmp_path: Path, table: Table) -> None:
    folder = sealed(tmp_path, table, negatives=3)
    copy = tmp_path / "elsewhere" / "rounds" / folder.name
    copytree(folder, copy)
    with pytest.raises(NotFoundError, match="elsewhere/table.jsonl is not there"):
        confused(copy, DATA, image_table(DATA).concepts)


def test_a_round_without_negatives_is_refused(tmp_path: Path, table: Table) -> None:
    folder = sealed(tmp_path, table, negatives=0)
    with pytest.raises(InvalidInputError, match="no negatives"):
        confused(folder, DATA, image_table(DATA).concepts)


def test_queries_meet_their_negatives_in_a_batch(tmp_path: Path, table: Table) -> None:
    folder = sealed(tmp_path, table, negatives=3)
    concepts = image_table(DATA).concepts
    groups = {tuple(group) for group in confused(folder, DATA, concepts)}
    source = PairSource(
        DATA, Tokenizer.from_dir(path_of(REASONER)), builtin.IMAGES,
        prototypes=None, seed=1, mined=folder,
    )  # fmt: skip
    mix = Mix(text=8, image=0, composed=0, coined=0, corrupt=0, corrupt_text=0, echoed=0)

    def whole_groups(mined: float) -> float:
        """How many batches have the concepts of a whole group among their documents."""
        batches = source.batches(0, Mix(**{**vars(mix), "mined": mined}))
        there = []
        for _ in range(40):
            drawn = set(np.searchsorted(concepts, next(batches).concepts).tolist())
            there.append(any(drawn >= set(group) for group in groups))
        return float(np.mean(there))

    # Four of eight concepts are drawn together: a query's own and its first negatives'.
    assert whole_groups(1.0) > 0.9
    assert whole_groups(0.0) < 0.6
