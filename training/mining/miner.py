"""One round: every query's negatives, from the arm's rules, into a `RoundWriter`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from training.mining.candidates import NONE as NO_CANDIDATE
from training.mining.records import EMBEDDER, NONE, RANDOM, Record, Rules, Scored
from training.mining.rounds import RoundWriter
from training.mining.table import QueryEntry, Table, check_texts
from tte.v1 import reranker_pb2
from tte_jax.client import NegativeMiner, Refused
from tte_jax.errors import InvalidInputError, PreconditionError


def header(table: Table, rules: Rules, *, embedder: str = "", reranker: str = "") -> dict[str, Any]:
    """What a round is made of, for its manifest: rules, data, versions of the models.

    A round that can be read by both reranker arms has the rules of its own.
    """
    models = {"embedder": "" if rules.arm in (NONE, RANDOM) else embedder}
    models["reranker"] = reranker if rules.reranks else ""
    return {"rules": asdict(rules), "table": table.fingerprint, "models": models}


async def mine(
    table: Table,
    found: np.ndarray,
    cosines: np.ndarray,
    rules: Rules,
    writer: RoundWriter,
    *,
    round: int = 0,
    miner: NegativeMiner | None = None,
    version: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Appends the records that the writer lacks; records stand in the order of the queries.

    Args:
      found, cosines: of `candidates.nearest`; unused by the arms "none" and "random".
      round: number of the round, which the random arm draws by.
      miner: of the reranker arms.
      version: of the reranker; another one's answer is not written.

    Raises:
      PreconditionError: the reranker changed half way.
      InvalidInputError: a query or its positive has no text for the reranker to read.
      UnavailableError, OverloadedError: it stayed away.
    """
    total = len(table.queries)
    first = writer.durable
    if rules.reranks:
        if miner is None:
            raise InvalidInputError(f"the arm {rules.arm!r} needs a reranker service")
        check_texts(table)
        records = _reranked(table, found, rules, first, miner, version)
    else:
        records = _plain(table, found, cosines, rules, first, round)
    done = first
    async for record in records:
        writer.append(record)
        done += 1
        progress(done, total)


def allowed(table: Table, query: QueryEntry, found: np.ndarray) -> list[int]:
    """The candidates that are not known to be right, in their order."""
    return [int(i) for i in found if i != NO_CANDIDATE and not table.is_right(query, int(i))]


async def _plain(
    table: Table, found: np.ndarray, cosines: np.ndarray, rules: Rules, first: int, round: int
) -> AsyncIterator[Record]:
    members: dict[int, np.ndarray] = {}
    of_document = np.array([d.dataset for d in table.documents])
    for index in range(first, len(table.queries)):
        query = table.queries[index]
        chosen: list[int] = []
        if rules.arm == EMBEDDER:
            chosen = allowed(table, query, found[index])
        elif rules.arm == RANDOM:
            if query.dataset not in members:
                members[query.dataset] = np.flatnonzero(of_document == query.dataset)
            rng = np.random.default_rng((rules.seed, round, index))
            chosen = _drawn(table, query, members[query.dataset], rules.negatives, rng)
        yield Record(
            table.datasets[query.dataset],
            query.key,
            negatives=tuple(Scored(table.documents[i].key) for i in chosen[: rules.negatives]),
        )


def _drawn(
    table: Table, query: QueryEntry, members: np.ndarray, count: int, rng: np.random.Generator
) -> list[int]:
    """`count` different documents that are not known to be right; fewer where there are fewer."""
    # A permutation of a million for every query would take longer than mining; a few more than
    # are wanted are nearly always enough.
    if len(members) > 8 * (count + 8):
        some = rng.choice(members, 4 * (count + 8), replace=False)
        chosen = [int(i) for i in some if not table.is_right(query, int(i))]
        if len(chosen) >= count:
            return chosen[:count]
    chosen = [int(i) for i in rng.permutation(members) if not table.is_right(query, int(i))]
    return chosen[:count]


async def _reranked(
    table: Table,
    found: np.ndarray,
    rules: Rules,
    first: int,
    miner: NegativeMiner,
    version: str,
) -> AsyncIterator[Record]:
    # Queries without a candidate are not asked about, so answers are matched by number.
    asked: dict[str, list[int]] = {}

    def requests() -> Iterator[reranker_pb2.MineNegativesRequest]:
        for index in range(first, len(table.queries)):
            candidates = allowed(table, table.queries[index], found[index])
            if candidates:
                asked[str(index)] = candidates
                yield _request(table, index, candidates, rules)

    upcoming = first
    answers = miner.mine(requests())
    async for answer in answers:
        index = int(answer.query_id)
        for skipped in range(upcoming, index):
            yield _empty(table, skipped)
        upcoming = index + 1
        candidates = asked.pop(answer.query_id)
        if isinstance(answer, Refused):
            yield _empty(table, index, answer.error.message)
            continue
        if answer.usage.model_version != version:
            raise PreconditionError(
                f"the reranker is {answer.usage.model_version} by now, and the round was begun "
                f"with {version}. Start that model again, or delete the open round.",
                reason="RERANKER_MISMATCH",
            )
        query = table.queries[index]
        negatives = _keys(table, candidates, answer.negatives)
        false_negatives = _keys(table, candidates, answer.false_negatives)
        yield Record(
            table.datasets[query.dataset],
            query.key,
            positive_score=answer.positive_score,
            negatives=negatives,
            false_negatives=false_negatives,
        )
    for skipped in range(upcoming, len(table.queries)):
        yield _empty(table, skipped)


def _request(
    table: Table, index: int, candidates: list[int], rules: Rules
) -> reranker_pb2.MineNegativesRequest:
    query = table.queries[index]
    positive = query.positives[0]

    def text(number: int) -> reranker_pb2.MiningText:
        return reranker_pb2.MiningText(id=str(number), text=table.documents[number].text)

    return reranker_pb2.MineNegativesRequest(
        query_id=str(index),
        query=query.text,
        instruction=query.instruction,
        positive=text(positive),
        candidates=[text(i) for i in candidates],
        rules=reranker_pb2.MiningRules(
            percent_of_positive=rules.percent_of_positive, negatives=rules.negatives
        ),
    )


def _keys(table: Table, candidates: list[int], chosen: Any) -> tuple[Scored, ...]:
    return tuple(
        Scored(table.documents[candidates[one.candidate_index]].key, one.score) for one in chosen
    )


def _empty(table: Table, index: int, refused: str = "") -> Record:
    query = table.queries[index]
    return Record(table.datasets[query.dataset], query.key, refused=refused)
