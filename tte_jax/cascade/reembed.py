"""Another embedder for a whole corpus: its vectors are made beside serving, then change over.

```
index ─► pending documents with their ECRs ─► next embedder ─► staged vectors ─► promote
```
Nothing is reasoned about again. What is staged is durable, so that the same call goes on after any
crash; documents written meanwhile become pending again and are taken before the change.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

import numpy as np

from tte_jax.content import Content, Side
from tte_jax.errors import InternalError, PreconditionError
from tte_jax.stages import (
    EmbedderStage,
    EmbedItem,
    Promoted,
    ReembeddableIndexStage,
    StagedVector,
)

CALL_S = 300.0
PROMOTE_S = 24 * 3600.0


@dataclass(frozen=True)
class ReembedUpdate:
    """How far it is; `promoted` once the new vectors serve."""

    embedder_version: str
    staged: int
    pending: int
    promoted: Promoted | None = None


async def reembed(
    index: ReembeddableIndexStage,
    embedder: EmbedderStage,
    *,
    instruction: str = "",
    batch: int = 16,
    restart: bool = False,
    promote: bool = True,
) -> AsyncGenerator[ReembedUpdate, None]:
    """Embed every document that has no vector of `embedder` yet, then let these vectors serve.

    Args:
      instruction: the task description that the documents were ingested with.
      batch: documents in a call.
      restart: give up what was staged before.
      promote: False stops when all are staged.

    Raises:
      PreconditionError: the corpus has this embedder already, or a re-embedding for another one has
        begun (`restart` gives it up).
      InternalError: an unusable vector.
      TteError: the stages' own; what is staged stays.
    """
    probe = EmbedItem(content=Content.of("version"), side=Side.DOCUMENT)
    _, usage = await embedder.embed([probe], timeout_s=CALL_S)
    version = usage.model_version
    while True:
        after = ""
        while True:
            documents, pending, staged = await index.pending(
                version, limit=batch, after=after, restart=restart, timeout_s=CALL_S
            )
            restart = False
            yield ReembedUpdate(version, staged, pending)
            if not documents:
                break
            items = [
                EmbedItem(d.content, Side.DOCUMENT, d.reasoning.text, instruction)
                for d in documents
            ]
            vectors, usage = await embedder.embed(items, timeout_s=CALL_S)
            if vectors.shape[0] != len(items) or not np.isfinite(vectors).all():
                raise InternalError(
                    "the embedder answered with an unusable vector", reason="NOT_FINITE"
                )
            made = [
                StagedVector(d.id, d.sequence, vector)
                for d, vector in zip(documents, vectors, strict=True)
            ]
            await index.stage(usage.model_version, made, timeout_s=CALL_S)
            # Stale ones are pending again; the next round takes them.
            after = documents[-1].id
        if pending:
            continue
        if not promote:
            return
        try:
            promoted = await index.promote(version, timeout_s=PROMOTE_S)
        except PreconditionError as error:
            if error.reason != "REEMBEDDING_INCOMPLETE":
                raise
            continue  # written since; few
        yield ReembedUpdate(version, promoted.documents, 0, promoted)
        return
