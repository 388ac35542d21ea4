"""The PyTorch side: transformers' models on the same weights and token ids, in float32."""

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
    """A Qwen2-VL directory in transformers."""

    def __init__(self, directory: Path) -> None:
        self._model: Any = Qwen2VLForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32
        ).eval()
        self._image = self._model.config.image_token_id

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
            out.append(torch.nn.functional.normalize(last, dim=-1).numpy())
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
        return out[:, inputs["input_ids"].shape[1] :].numpy()

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
        return inputs


class Text:
    """A Qwen3 directory in transformers, as a yes/no reranker."""

    def __init__(self, directory: Path, yes: int, no: int) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        ).eval()
        head = self._model.lm_head.weight
        self._difference = (head[yes] - head[no]).detach()

    @torch.no_grad()
    def pointwise(self, prefix: np.ndarray, suffixes: np.ndarray, batch: int) -> np.ndarray:
        """[N] P(yes); every candidate with the whole prefix, `batch` at a time."""
        whole = np.concatenate([np.tile(prefix, (len(suffixes), 1)), suffixes], axis=1)
        parts = [
            self._scores(self._model.model(torch.from_numpy(part), use_cache=False))
            for part in np.split(whole, range(batch, len(whole), batch))
        ]
        return np.concatenate(parts)

    @torch.no_grad()
    def shared(self, prefix: np.ndarray, suffixes: np.ndarray, batch: int) -> np.ndarray:
        """[N] P(yes); the prefix is read once, and its cache driven by hand."""
        read = self._model.model(torch.from_numpy(prefix[None]), use_cache=True).past_key_values
        parts = []
        for part in np.split(suffixes, range(batch, len(suffixes), batch)):
            cache = copy.deepcopy(read)
            cache.batch_repeat_interleave(len(part))
            ids = torch.from_numpy(part)
            parts.append(self._scores(self._model.model(ids, past_key_values=cache)))
        return np.concatenate(parts)

    def _scores(self, output: Any) -> np.ndarray:
        return torch.sigmoid(output.last_hidden_state[:, -1] @ self._difference).numpy()


def use_threads(count: int) -> None:
    """As many threads as the other side has."""
    torch.set_num_threads(count)
