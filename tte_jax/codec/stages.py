"""Inputs of the model stages, budgets and usages."""

from __future__ import annotations

from dataclasses import fields

from tte.v1 import budget_pb2, content_pb2, embedder_pb2, reasoner_pb2, usage_pb2
from tte_jax import limits
from tte_jax.codec.contents import check_text, decode_content, encode_content
from tte_jax.codec.documents import decode_vector, encode_vector
from tte_jax.content import Budget, Side, Task, Usage
from tte_jax.errors import InvalidInputError
from tte_jax.stages import Embedding, EmbedItem, ReasonItem, Sampling

_SIDES = {content_pb2.SIDE_QUERY: Side.QUERY, content_pb2.SIDE_DOCUMENT: Side.DOCUMENT}
_TASKS = {
    content_pb2.TASK_TEXT: Task.TEXT,
    content_pb2.TASK_IMAGE: Task.IMAGE,
    content_pb2.TASK_COMPOSED: Task.COMPOSED,
    content_pb2.TASK_REWRITE: Task.REWRITE,
}
_SIDE_NUMBERS = {side: number for number, side in _SIDES.items()}
_TASK_NUMBERS = {task: number for number, task in _TASKS.items()}

_BUDGET_RANGES = {
    "reasoning_tokens": (0, limits.MAX_NEW_TOKENS),
    "candidates": (1, limits.MAX_CANDIDATES),
    "rewrite_depth": (0, limits.MAX_REWRITE_DEPTH),
    "rewrite_tokens": (0, limits.MAX_NEW_TOKENS),
    "rerank_depth": (0, limits.MAX_RERANK_CANDIDATES),
}


def encode_reason_item(item: ReasonItem) -> reasoner_pb2.ReasonInput:
    message = reasoner_pb2.ReasonInput(
        content=encode_content(item.content),
        side=_SIDE_NUMBERS[item.side],
        instruction=item.instruction,
    )
    if item.task is not None:
        message.task = _TASK_NUMBERS[item.task]
    if item.query is not None:
        message.rewrite.CopyFrom(
            reasoner_pb2.RewriteContext(
                query=encode_content(item.query),
                query_reasoning=item.query_reasoning,
                candidate_reasoning=item.candidate_reasoning,
            )
        )
    return message


def encode_sampling(sampling: Sampling) -> reasoner_pb2.Sampling:
    return reasoner_pb2.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed & 0xFFFFFFFF,
        stop=sampling.stop,
    )


def decode_sampling(message: reasoner_pb2.Sampling) -> Sampling:
    """Raises InvalidInputError, as `Sampling`."""
    return Sampling(
        temperature=message.temperature,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        seed=message.seed,
        stop=tuple(message.stop),
    )


def decode_reason_item(message: reasoner_pb2.ReasonInput, at: str) -> ReasonItem:
    """A rewrite context makes it `Task.REWRITE`.

    Raises:
      InvalidInputError: bad content or side, or a task that contradicts the rewrite context.
    """
    task = None
    if message.task != content_pb2.TASK_UNSPECIFIED:
        task = _TASKS.get(message.task)
        if task is None:
            raise InvalidInputError(
                f"{at}.task is {message.task}: this server does not know it", field=f"{at}.task"
            )
    rewrite = message.HasField("rewrite")
    if task is not None and rewrite != (task is Task.REWRITE):
        raise InvalidInputError(
            f"{at}.task and {at}.rewrite contradict each other: a rewrite has the context and the "
            "task TASK_REWRITE or none, everything else has no context",
            field=f"{at}.task",
        )
    common = {
        "content": decode_content(message.content, f"{at}.content"),
        "side": _decode_side(message.side, f"{at}.side"),
        "instruction": _instruction(message.instruction, at),
    }
    if not rewrite:
        return ReasonItem(**common, task=task)
    context, here = message.rewrite, f"{at}.rewrite"
    limit = limits.MAX_REASONING_CHARS
    return ReasonItem(
        **common,
        task=Task.REWRITE,
        query=decode_content(context.query, f"{here}.query"),
        query_reasoning=check_text(context.query_reasoning, f"{here}.query_reasoning", limit),
        candidate_reasoning=check_text(
            context.candidate_reasoning, f"{here}.candidate_reasoning", limit
        ),
    )


def encode_embed_item(item: EmbedItem) -> embedder_pb2.EmbedInput:
    return embedder_pb2.EmbedInput(
        content=encode_content(item.content),
        side=_SIDE_NUMBERS[item.side],
        reasoning=item.reasoning,
        instruction=item.instruction,
    )


def decode_embed_item(message: embedder_pb2.EmbedInput, at: str) -> EmbedItem:
    """Raises InvalidInputError."""
    return EmbedItem(
        content=decode_content(message.content, f"{at}.content"),
        side=_decode_side(message.side, f"{at}.side"),
        reasoning=check_text(message.reasoning, f"{at}.reasoning", limits.MAX_REASONING_CHARS),
        instruction=_instruction(message.instruction, at),
    )


def encode_budget(budget: Budget) -> budget_pb2.Budget:
    return budget_pb2.Budget(**{f.name: getattr(budget, f.name) for f in fields(budget)})


def decode_budget(message: budget_pb2.Budget, at: str) -> Budget:
    """Unset fields take their defaults. Raises InvalidInputError for values out of range."""
    given = {}
    for name, (low, high) in _BUDGET_RANGES.items():
        if message.HasField(name):  # pyright: ignore[reportArgumentType]
            given[name] = getattr(message, name)
            if not low <= given[name] <= high:
                raise InvalidInputError(
                    f"{at}.{name} is {given[name]}: expected {low} to {high}",
                    field=f"{at}.{name}",
                    limit=high,
                )
    return Budget(**given)


def encode_usage(usage: Usage) -> usage_pb2.Usage:
    return usage_pb2.Usage(
        stage=usage.stage,
        tokens_in=usage.tokens_in,
        tokens_out=usage.tokens_out,
        cached_tokens=usage.cached_tokens,
        queue_seconds=usage.queue_s,
        compute_seconds=usage.compute_s,
        model_version=usage.model_version,
        wall_seconds=usage.wall_s,
        within=usage.within,
    )


def decode_usage(message: usage_pb2.Usage) -> Usage:
    return Usage(
        stage=message.stage,
        tokens_in=message.tokens_in,
        tokens_out=message.tokens_out,
        cached_tokens=message.cached_tokens,
        queue_s=message.queue_seconds,
        compute_s=message.compute_seconds,
        model_version=message.model_version,
        wall_s=message.wall_seconds,
        within=message.within,
    )


def encode_embedding(embedding: Embedding) -> reasoner_pb2.ReasonedEmbedding:
    return reasoner_pb2.ReasonedEmbedding(
        vector=encode_vector(embedding.vector), usage=encode_usage(embedding.usage)
    )


def decode_embedding(message: reasoner_pb2.ReasonedEmbedding, at: str) -> Embedding:
    """Raises InvalidInputError, as `decode_vector`."""
    return Embedding(decode_vector(message.vector, f"{at}.vector"), decode_usage(message.usage))


def _decode_side(number: int, at: str) -> Side:
    side = _SIDES.get(number)  # pyright: ignore[reportArgumentType]
    if side is None:
        raise InvalidInputError(f"{at} is {number}: expected SIDE_QUERY or SIDE_DOCUMENT", field=at)
    return side


def _instruction(text: str, at: str) -> str:
    return check_text(text, f"{at}.instruction", limits.MAX_INSTRUCTION_CHARS)
