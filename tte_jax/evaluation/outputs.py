"""The result files of a task, in the form that the benchmark's public scorer writes and reads.

In `RUN/{modality}/`:

- `{task}_pred.jsonl`: a query a line, `prediction`, `label`, `rel_scores`.
- `{task}_score.json`: numbers only, under the reference's names, and `num_pred`, `num_data`.
- `{task}_info.json`: ours: what was run, with what, what it cost, how sure the score is.
- `{task}_failures.jsonl`: ours: wrong answers to look at, with small pictures and ECRs.

The score file is written last, and an older one removed first: where it is, the task is done.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tte_jax.content import Candidate, Content, MediaKind
from tte_jax.errors import DataLossError, InvalidInputError, TteError
from tte_jax.evaluation.metrics import (
    Mode,
    Ranked,
    by_chance,
    differs,
    per_query,
    score_table,
    trec,
)
from tte_jax.evaluation.mmeb_v2.registry import candidate_id
from tte_jax.evaluation.pool_index import TIES
from tte_jax.evaluation.runner import Answer, ArmResult
from tte_jax.evaluation.significance import interval
from tte_jax.json_lines import json_lines
from tte_jax.preprocess.image import decode_image
from tte_jax.preprocess.video import probe_video, sampled_frames

FAILURES = 10
THUMBNAIL = 160


def write(folder: Path, result: ArmResult, *, mode: Mode, settings: Mapping[str, Any]) -> dict:
    """Writes the files of one arm over one task; returns the info."""
    task = result.task
    place = folder / task.modality
    place.mkdir(parents=True, exist_ok=True)
    ranked = result.ranked
    scores: dict[str, float | int] = dict(score_table(ranked, mode))
    scores |= {"num_pred": len(ranked), "num_data": len(task.queries)}
    about = info(result, mode=mode, settings=settings)
    wrong = failures(result)
    # A run that ends between two files must not leave them beside an older score.
    (place / f"{task.name}_score.json").unlink(missing_ok=True)
    _lines(place / f"{task.name}_pred.jsonl", [prediction_row(r) for r in ranked])
    _lines(place / f"{task.name}_failures.jsonl", wrong)
    _replace(place / f"{task.name}_info.json", json.dumps(about, ensure_ascii=False, indent=2))
    _replace(place / f"{task.name}_score.json", json.dumps(scores, indent=4))
    return about


def prediction_row(ranked: Ranked) -> dict[str, Any]:
    grades = ranked.rel_scores
    return {
        "prediction": list(ranked.prediction),
        "label": list(ranked.label),
        "rel_scores": None if grades is None else list(grades),
    }


def info(result: ArmResult, *, mode: Mode, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `{task}_info.json` says."""
    task, ranked = result.task, result.ranked
    exact = per_query(ranked, task.metric)
    chosen = per_query(ranked, task.metric, mode)
    stages, tokens = _spent(result.answers)
    seconds = [a.seconds for a in result.answers if not a.error]
    errors = [a.error for a in result.answers if a.error]
    return {
        "task": task.name,
        "modality": task.modality,
        "metric": task.metric,
        "metric_mode": str(mode),
        "score": float(chosen.mean()),
        "interval": asdict(interval(chosen)),
        "score_exact": float(exact.mean()),
        "score_compat": float(per_query(ranked, task.metric, Mode.COMPAT).mean()),
        "modes_can_differ": differs(ranked),
        "chance": chance(result),
        "trec": dict(trec(ranked)),
        "arm": result.arm.as_json(),
        "ecr_query": task.ecr_query or bool(settings.get("both_sides")),
        "ecr_target": task.ecr_target or bool(settings.get("both_sides")),
        "frames": task.frames,
        "queries": len(ranked),
        "pool": result.pool,
        "candidates_failed": dict(result.failed),
        "queries_failed": len(errors),
        "first_errors": errors[:3],
        "recorded_ecrs": {
            side: {"recorded": recorded, "asked": asked}
            for side, (recorded, asked) in result.recorded.items()
        },
        "degraded": dict(Counter(d for a in result.answers for d in a.degraded)),
        "tokens_per_query": tokens,
        "stages_per_query": stages,
        "seconds_per_query": {
            "mean": float(np.mean(seconds)) if seconds else 0.0,
            "p50": float(np.quantile(seconds, 0.5)) if seconds else 0.0,
            "p95": float(np.quantile(seconds, 0.95)) if seconds else 0.0,
        },
        "ingest": [asdict(usage) for usage in result.ingest],
        "ties": TIES,
        "notes": list(task.notes),
        "settings": dict(settings),
    }


def lacks(info: Mapping[str, Any]) -> dict[str, int]:
    """What a score is without, by an info: what → how many. Empty where all is well or not known.

    A search of which two stages lacked something counts for both.
    """
    found: dict[str, Any] = {"queries failed": info.get("queries_failed")}
    for key, what in (("candidates_failed", "candidates failed"), ("degraded", "degraded")):
        reasons = info.get(key)
        if isinstance(reasons, Mapping):
            found |= {f"{what} ({reason})": count for reason, count in reasons.items()}
    return {what: count for what, count in found.items() if isinstance(count, int) and count > 0}


def chance(result: ArmResult) -> float:
    """What candidates in a random order score in the task's metric, as a mean over its queries."""
    stored = result.pool + sum(result.failed.values())
    pools = [stored if a.query.pool is None else len(a.query.pool) for a in result.answers]
    scores = [
        by_chance(answer.ranked, max(pool, len(answer.ranked.label)), result.task.metric)
        for answer, pool in zip(result.answers, pools, strict=True)
    ]
    return float(np.mean(scores)) if scores else 0.0


def _spent(answers: Sequence[Answer]) -> tuple[dict[str, dict[str, float]], float]:
    """(stage → means per query, generated tokens per query)."""
    totals: dict[str, dict[str, float]] = {}
    done = sum(not a.error for a in answers) or 1
    for answer in answers:
        for usage in answer.usage:
            mine = totals.setdefault(usage.stage, dict.fromkeys(_SPENT, 0.0))
            for name in _SPENT:
                mine[name] += getattr(usage, name) / done
    return totals, sum(stage["tokens_out"] for stage in totals.values())


_SPENT = ("tokens_in", "tokens_out", "compute_s", "wall_s")


# --- failures to look at ---


def failures(result: ArmResult, most: int = FAILURES) -> list[dict[str, Any]]:
    """Wrong answers: the query, what came, and where the right one stands."""
    rows: list[dict[str, Any]] = []
    for answer in result.answers:
        right = set(answer.ranked.label)
        if answer.error or not answer.results or answer.results[0].id in right:
            continue
        ranks = [i + 1 for i, id in enumerate(answer.ranked.prediction) if id in right]
        rows.append(
            {
                "query": answer.query.id,
                "text": answer.text,
                "instruction": answer.query.instruction,
                "ecr": answer.reasoning.text,
                "image": _safe_thumbnail(answer.query.load),
                "label": list(answer.ranked.label)[:3],
                "rank": ranks[0] if ranks else None,
                "first_stage": list(answer.first),
                "results": [_shown(candidate) for candidate in answer.results[:3]],
            }
        )
        if len(rows) == most:
            break
    # Pictures of candidates are read again, for these few only.
    wanted = {r["id"] for row in rows for r in row["results"]} | {
        id for row in rows for id in row["label"]
    }
    images: dict[str, str] = {}
    if wanted:
        for item in result.task.candidates():
            if item.name in wanted:
                images[item.name] = _safe_thumbnail(item.load)
    for row in rows:
        row["images"] = {
            id: images.get(id, "") for id in [*row["label"], *(r["id"] for r in row["results"])]
        }
    return rows


def _shown(candidate: Candidate) -> dict[str, Any]:
    ecr = candidate.rewrite or candidate.reasoning
    return {
        "id": candidate.id,
        "cosine": candidate.cosine,
        "rerank": candidate.rerank,
        "ecr": ecr.text,
    }


def _safe_thumbnail(load: Any) -> str:
    try:
        return thumbnail(load())
    except (TteError, OSError):
        return ""


def thumbnail(content: Content) -> str:
    """A small JPEG of the first image, or of the first frame, as a data URI; "" without one."""
    for media in content.media:
        try:
            if media.kind is MediaKind.VIDEO:
                shape = probe_video(media.data)
                image = next(iter(sampled_frames(media.data, np.arange(1), shape)))
            elif media.kind is MediaKind.IMAGE:
                image = decode_image(media.data)
            else:
                continue
        except TteError:
            continue
        image = image.convert("RGB")
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
    return ""


# --- reading ---


def read_predictions(path: Path, task: str = "") -> list[Ranked]:
    """A `_pred.jsonl`, ours or anyone's; ids become texts, as the data set `task` has them here.

    Raises DataLossError for a line that is not what the reference writes.
    """
    ranked: list[Ranked] = []
    for number, line in enumerate(lines(path), start=1):
        try:
            row = json.loads(line)
            label = row["label"] if isinstance(row["label"], list) else [row["label"]]
            grades = row.get("rel_scores")
            ranked.append(
                Ranked(
                    tuple(candidate_id(task, str(id)) for id in row["prediction"]),
                    tuple(candidate_id(task, str(id)) for id in label),
                    None if grades is None else tuple(float(g) for g in grades),
                )
            )
        except (ValueError, KeyError, TypeError, InvalidInputError) as error:
            raise DataLossError(
                f"{path}, line {number}, is no ranking ({type(error).__name__}: {error}); expected "
                '{"prediction": […], "label": […], "rel_scores": […] or null}.',
                reason="UNREADABLE_RESULTS",
            ) from error
    return ranked


def lines(path: Path) -> list[str]:
    """Of a result file. Raises DataLossError when it is no text."""
    try:
        return json_lines(path.read_text("utf-8"))
    except (UnicodeDecodeError, OSError) as error:
        raise DataLossError(
            f"{path} cannot be read ({error}); delete it and run its task again.",
            reason="UNREADABLE_RESULTS",
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A result file. Raises DataLossError when it is no JSON object."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise DataLossError(
            f"{path} cannot be read ({error}); delete it and run its task again.",
            reason="UNREADABLE_RESULTS",
        ) from error
    if not isinstance(found, dict):
        raise DataLossError(f"{path} is no JSON object.", reason="UNREADABLE_RESULTS")
    return found


def done(folder: Path, task: str, modality: str, settings: Mapping[str, Any]) -> bool:
    """Whether a task's results are there, made with the same settings.

    Raises InvalidInputError when they were made with others.
    """
    place = folder / modality
    if not (place / f"{task}_score.json").is_file():
        return False
    path = place / f"{task}_info.json"
    before = read_json(path).get("settings", {}) if path.is_file() else {}
    changed = sorted(
        k for k in {*before, *settings} if before.get(k) != json.loads(json.dumps(settings.get(k)))
    )
    if changed:
        raise InvalidInputError(
            f"{place} holds results of {task} made with other settings ({', '.join(changed)}). "
            "Give another --out, or --overwrite.",
            field="--out",
            reason="OTHER_SETTINGS",
        )
    return True


def _lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    _replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    part.replace(path)
