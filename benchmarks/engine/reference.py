"""The PyTorch side: transformers' models on the same token ids, where and as they were loaded."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Threads that spin while they wait would slow down whoever has the next turn.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2VLForConditionalGeneration

from tte_jax.preprocess.template import Prompt

PAD = 0


class VisionLanguage:
    """A Qwen2-VL of transformers."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()
        self._image = model.config.image_token_id

    @classmethod
    def from_dir(cls, directory: Path) -> VisionLanguage:
        """A model directory on the CPU in float32."""
        return cls(Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32))

    @torch.no_grad()
    def embed(self, prompts: Sequence[Prompt], batch: int) -> np.ndarray:
        """[N, D] L2-normalised last tokens; batches in the order given, padded on the right."""
        out = []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            inputs = self._inputs(part, left=False)
            self._model.model.rope_deltas = None
            hidden = self._model.model(**inputs, use_cache=False).last_hidden_state
            ends = inputs["attention_mask"].sum(1) - 1
            last = hidden[torch.arange(len(part)), ends]
            out.append(torch.nn.functional.normalize(last, dim=-1).float().cpu().numpy())
        return np.concatenate(out)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        tokens: int,
        stop: list[int],
        on_token: Callable[[], None],
    ) -> np.ndarray:
        """[N, ≤ tokens] greedy continuations as one batch, padded on the left.

        It ends when all have met a token of `stop`; `on_token` is called after every step of the
        whole batch.
        """

        class Listener(torch.nn.Module):
            def __call__(self, ids: Any, scores: Any) -> Any:
                on_token()
                return scores

        self._model.model.rope_deltas = None
        inputs = self._inputs(prompts, left=True)
        out = self._model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=PAD,
            logits_processor=[Listener()],
        )
        return out[:, inputs["input_ids"].shape[1] :].cpu().numpy()

    def _inputs(self, prompts: Sequence[Prompt], *, left: bool) -> dict[str, Any]:
        longest = max(len(p.ids) for p in prompts)
        ids = np.full((len(prompts), longest), PAD, np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            n = len(prompt.ids)
            where = slice(longest - n, longest) if left else slice(0, n)
            ids[row, where], mask[row, where] = prompt.ids, 1
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "mm_token_type_ids": torch.from_numpy((ids == self._image).astype(np.int32)),
        }
        images = [image for prompt in prompts for image in prompt.images]
        if images:
            pixels = np.concatenate([patches for patches, _ in images])
            inputs["pixel_values"] = torch.from_numpy(pixels)
            inputs["image_grid_thw"] = torch.tensor([list(grid) for _, grid in images])
        return {name: value.to(self._model.device) for name, value in inputs.items()}


class Text:
    """A Qwen3 or Qwen2 of transformers, as a yes/no reranker."""

    def __init__(self, model: Any, yes: int, no: int) -> None:
        self._model = model.eval()
        head = model.lm_head.weight
        self._difference = (head[yes] - head[no]).detach()

    @classmethod
    def from_dir(cls, directory: Path, yes: int, no: int) -> Text:
        """A model directory on the CPU in float32."""
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return cls(model, yes, no)

    @torch.no_grad()
    def pointwise(self, prefix: np.ndarray, suffixes: np.ndarray, batch: int) -> np.ndarray:
        """[N] P(yes); every candidate with the whole prefix, `batch` at a time."""
        whole = np.concatenate([np.tile(prefix, (len(suffixes), 1)), suffixes], axis=1)
        parts = [
            self._scores(self._model.model(self._ids(part), use_cache=False))
            for part in np.split(whole, range(batch, len(whole), batch))
        ]
        return np.concatenate(parts)

    @torch.no_grad()
    def shared(self, prefix: np.ndarray, suffixes: np.ndarray, batch: int) -> np.ndarray:
        """[N] P(yes); the prefix is read once, and its cache driven by hand."""
        read = self._model.model(self._ids(prefix[None]), use_cache=True).past_key_values
        parts = []
        for part in np.split(suffixes, range(batch, len(suffixes), batch)):
            cache = copy.deepcopy(read)
            cache.batch_repeat_interleave(len(part))
            parts.append(self._scores(self._model.model(self._ids(part), past_key_values=cache)))
        return np.concatenate(parts)

    def _ids(self, ids: np.ndarray) -> Any:
        return torch.from_numpy(ids).to(self._model.device)

    def _scores(self, output: Any) -> np.ndarray:
        scores = torch.sigmoid(output.last_hidden_state[:, -1] @ self._difference)
        return scores.float().cpu().numpy()


def use_threads(count: int) -> None:
    """As many threads as the other side has."""
    torch.set_num_threads(count)
