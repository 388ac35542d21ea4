"""The embedder as a model of the `mteb` library, with or without reasoning before it.

    import mteb
    from tte_jax.evaluation.mteb_model import MtebModel

    model = MtebModel.from_pretrained("models/Qwen3-VL-Embedding-2B")
    mteb.evaluate(model, tasks=mteb.get_tasks(tasks=["NanoSCIDOCSRetrieval"]))

Text, images and both together; the task's instruction goes to the embedder as it does in a search.
Needs the extra `mteb`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from PIL import Image

from tte_jax.content import Content, Side
from tte_jax.embedder import Embedder
from tte_jax.errors import UnsupportedError
from tte_jax.reasoner import Reasoner
from tte_jax.stages import EmbedItem, ReasonItem

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from torch.utils.data import DataLoader

_MODALITIES = ("text", "image")


class MtebModel(AbsEncoder):
    """What `mteb` calls an encoder.

    Args:
      embedder: warm or not; it stays open, and the caller closes it.
      reasoner: writes an ECR of every input first; None = inputs are embedded as they are.
      max_tokens: of an ECR.
      documents: whether documents get an ECR too.
    """

    def __init__(
        self,
        embedder: Embedder,
        reasoner: Reasoner | None = None,
        *,
        max_tokens: int = 64,
        documents: bool = True,
    ) -> None:
        self.embedder, self.reasoner = embedder, reasoner
        self.max_tokens, self.documents = max_tokens, documents
        self.model = embedder
        self.mteb_model_meta = model_meta(embedder, reasoner, max_tokens)

    @classmethod
    def from_pretrained(
        cls,
        embedder: str | Path,
        reasoner: str | Path | None = None,
        *,
        max_tokens: int = 64,
        dtype: str = "float32",
    ) -> Self:
        """Opens model directories. Raises as `engine.served_model.open_model`."""
        return cls(
            Embedder.from_pretrained(embedder, dtype=dtype),
            Reasoner.from_pretrained(reasoner, dtype=dtype) if reasoner else None,
            max_tokens=max_tokens,
        )

    def close(self) -> None:
        """Closes both models."""
        self.embedder.close()
        if self.reasoner is not None:
            self.reasoner.close()

    def encode(
        self,
        inputs: DataLoader[Any],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """[N, D] float32, L2-normalised, in the inputs' order.

        A task that compares like with like gives no `prompt_type`; both sides are queries then.

        Raises:
          UnsupportedError: audio or video.
          InvalidInputError: an input that the model does not take.
        """
        side = Side.DOCUMENT if prompt_type == PromptType.document else Side.QUERY
        if side is Side.QUERY:
            instruction = self.get_instruction(task_metadata, prompt_type)
        else:  # a task's one prompt is meant for its queries
            prompt = task_metadata.prompt
            instruction = prompt.get("document", "") if isinstance(prompt, dict) else ""
        vectors = [
            self._embed(list(contents(batch)), side, instruction)
            for batch in inputs  # a batch at a time, so that pictures do not pile up
        ]
        return np.concatenate(vectors)

    def _embed(self, batch: Sequence[Content], side: Side, instruction: str) -> np.ndarray:
        ecrs = [""] * len(batch)
        if self.reasoner is not None and (side is Side.QUERY or self.documents):
            asked = [ReasonItem(content, side, instruction) for content in batch]
            ecrs = [r.text for r in self.reasoner.reason(asked, self.max_tokens)]
        items = [
            EmbedItem(content, side, ecr, instruction)
            for content, ecr in zip(batch, ecrs, strict=True)
        ]
        return self.embedder.embed(items)


def contents(batch: Mapping[str, Any]) -> Iterator[Content]:
    """The inputs of one batch: columns of equal length, `text` and `image` among them.

    Raises UnsupportedError for modalities that the models do not have.
    """
    if other := sorted({"audio", "video"} & batch.keys()):
        raise UnsupportedError(
            f"the task has {', '.join(other)}; this encoder takes {' and '.join(_MODALITIES)}. "
            "`tte eval mmeb-v2` runs video tasks.",
            reason="UNSUPPORTED_MODALITY",
        )
    columns = {name: batch[name] for name in _MODALITIES if name in batch}
    if not columns:
        raise UnsupportedError(
            f"the task's inputs have {', '.join(sorted(batch)) or 'no columns'}; this encoder "
            f"takes {' and '.join(_MODALITIES)}",
            reason="UNSUPPORTED_MODALITY",
        )
    for row in zip(*columns.values(), strict=True):
        given = dict(zip(columns, row, strict=True))
        image = given.get("image")
        yield Content.of(given.get("text") or "", *([] if image is None else [png(image)]))


def png(image: Image.Image) -> bytes:
    """Without loss; what is not RGB becomes it when the image is read for the model."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def model_meta(embedder: Embedder, reasoner: Reasoner | None, max_tokens: int) -> ModelMeta:
    """Names the run in `mteb`'s results: model, the hash of its files, and how it reasoned."""
    name, _, revision = embedder.version.partition("@")
    experiment = {"reasoner": reasoner.version, "max_tokens": max_tokens} if reasoner else None
    return ModelMeta.create_empty(
        {
            "name": f"tte-jax/{name}",
            "revision": revision,
            "framework": ["JAX"],
            "modalities": list(_MODALITIES) if embedder.accepts_media else ["text"],
            "embed_dim": embedder.dimension,
            "max_tokens": embedder.max_sequence_tokens,
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": True,
            "experiment_kwargs": experiment,
        }
    )
