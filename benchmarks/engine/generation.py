"""Concurrent requests of unequal length: prompts and budgets differ."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine import reference
from benchmarks.engine.embedding import picture
from benchmarks.engine.rounds import interleave, ratio, row, spread
from tte_jax.builtin import openmoji
from tte_jax.content import Content, Side
from tte_jax.engine.inputs import model_input
from tte_jax.engine.jobs import NEVER
from tte_jax.reasoner import Reasoner
from tte_jax.stages import ReasonItem


def compare(directory: Path, *, requests: int, rounds: int) -> dict[str, Any]:
    """Tokens that somebody asked for per second, and the time to each request's first token.

    Both sides start from the same prompts: texts as token ids, pictures as patches. Positions,
    batches and features are made anew in each round.
    """
    rng = np.random.default_rng(0)
    names = [entry.shown.name for entry in openmoji.entries()]
    budgets = [int(b) for b in np.linspace(12, 96, requests)]
    rng.shuffle(budgets)
    items = []
    for i in range(requests):
        if i % 2:
            content = Content.of("", picture(rng, 56))
        else:
            content = Content.of(", ".join(rng.choice(names, i // 2 % 4 + 1)))
        items.append(ReasonItem(content, Side.QUERY))
    torch = reference.VisionLanguage.from_dir(directory)
    first: dict[str, list[float]] = {"ours": [], "torch": []}
    made: dict[str, list[np.ndarray]] = {}
    with Reasoner.from_pretrained(directory) as reasoner:
        reasoner.warmup()
        prompts = [reasoner.served.prompts.reason(item) for item in items]
        # Both sides write what the model says, with the same ends: nothing is forced.
        prompt_set, config = reasoner.served.prompts, reasoner.served.config
        stop = [*{*prompt_set.stop_ids, *config.eos_token_ids}]
        loop = reasoner.loop
        prepared = [reasoner.prepare(*one) for one in zip(items, budgets, strict=True)]

        def ours() -> None:
            assert reasoner.vision is not None
            reasoner.vision.cache.clear()
            began = time.perf_counter()
            times: dict[int, float] = {}

            def listen(index: int):
                return lambda ids, last: times.setdefault(index, time.perf_counter() - began)

            jobs = []
            for index, (job, prompt) in enumerate(zip(prepared, prompts, strict=True)):
                assert job is not None
                one = model_input(prompt, config)
                jobs.append(replace(job, input=one, close_at=NEVER, on_tokens=listen(index)))
            results = [future.result() for future in loop.submit(jobs, wait=True)]
            made["ours"] = [np.array(r.tokens) for r in results]
            first["ours"].append(statistics.median(times.values()))

        def theirs() -> None:
            began = time.perf_counter()
            times: list[float] = []
            out = torch.generate(
                prompts, max(budgets), stop, lambda: times.append(time.perf_counter() - began)
            )
            made["torch"] = list(out)
            first["torch"].append(times[0])

        seconds = interleave({"ours": ours, "torch": theirs}, rounds)
    written = sum(len(tokens) for tokens in made["ours"])
    equal = sum(
        np.array_equal(a, b[: len(a)]) for a, b in zip(made["ours"], made["torch"], strict=True)
    )
    ours_first, torch_first = (first[name][1:] for name in ("ours", "torch"))
    return {
        "requests": requests,
        "tokens": {"budgets": sum(budgets), "written": written},
        "equal_continuations": int(equal),
        "seconds": {name: spread(s) for name, s in seconds.items()},
        "first_token_s": {name: round(statistics.median(first[name][1:]), 4) for name in first},
        "rows": [
            row(
                f"generate, {requests} requests of unequal length: tokens/s against PyTorch",
                ratio(seconds["torch"], seconds["ours"]),
                2.0,
                " ×",
            ),
            row(
                "p50 time to the first token, of PyTorch's",
                round(1 / ratio(torch_first, ours_first), 3),
                0.5,
                " ×",
                most=True,
            ),
        ],
    }
