"""How the time that is left is shared between the stages. Pure functions and values, no clock.

All times are seconds. `remaining` is the time to the caller's deadline, `None` when there is none.
The rules, in order of importance:

1. The first stage (embed + search) is always kept affordable: reasoning gets only what is left
   after its reserve, and is skipped when its usual time does not fit.
2. A rewrite leaves the rerank its usual time; a rerank that would not fit scores fewer candidates.
3. Every stage stops `FINISH_S` before the deadline, so that the last message still arrives.
4. A stage never gets more than its cap: one that has not answered by then is treated as sick.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

# Time kept back to build and send the last message.
FINISH_S = 0.05
# Estimates are means; a stage planned at exactly its mean would time out half of the time.
SLACK = 1.25
# First-stage reserve before anything was measured.
UNMEASURED_FIRST_STAGE_S = 0.5
# The first stage is required, so its reserve is twice its mean time rather than SLACK times.
FIRST_STAGE_FACTOR = 2.0
# Weight of the newest measurement in the moving averages.
NEWEST = 0.3
# A stage skipped for lack of time is never measured; its estimate shrinks by this factor instead,
# so that one slow (cold) call does not switch it off for ever.
RELAX = 0.8


@dataclass(frozen=True)
class Caps:
    """The longest one call of each stage may take, deadline or not."""

    reason: float = 30.0
    embed: float = 10.0
    index: float = 5.0
    fetch: float = 5.0
    rewrite: float = 30.0
    rerank: float = 15.0


@dataclass(frozen=True)
class Pace:
    """Moving averages of what the stages take.

    Attributes:
      unit_s: seconds per unit: per generated token for `reason`, per candidate for `rewrite` and
        `rerank`, per call for the others. A stage that was never measured is missing.
      reason_tokens: usual length of a query's ECR, 0 when never measured.
    """

    unit_s: Mapping[str, float] = field(default_factory=dict)
    reason_tokens: float = 0.0

    def observed(self, stage: str, wall_s: float, units: float = 1.0) -> Pace:
        """The pace after one more call of `stage` that took `wall_s` for `units` units."""
        new = wall_s / max(units, 1.0)
        old = self.unit_s.get(stage, new)
        pace = replace(self, unit_s={**self.unit_s, stage: old + NEWEST * (new - old)})
        if stage == "reason":
            tokens = self.reason_tokens or units
            pace = replace(pace, reason_tokens=tokens + NEWEST * (units - tokens))
        return pace

    def overran(self, stage: str, wall_s: float, units: float = 1.0) -> Pace:
        """The pace after a call that was given up after `wall_s`: it can only get slower."""
        known = self.unit_s.get(stage, 0.0)
        slower = max(known, wall_s / max(units, 1.0))
        return replace(self, unit_s={**self.unit_s, stage: slower})

    def skipped(self, stage: str) -> Pace:
        """The pace after `stage` was skipped for lack of time."""
        if stage not in self.unit_s:
            return self
        return replace(self, unit_s={**self.unit_s, stage: RELAX * self.unit_s[stage]})


def first_stage_reserve(pace: Pace) -> float:
    """What embedding and searching must be left, `FINISH_S` included."""
    if "embed" not in pace.unit_s or "index" not in pace.unit_s:
        return UNMEASURED_FIRST_STAGE_S + FINISH_S
    mean = pace.unit_s["embed"] + pace.unit_s["index"]
    return FIRST_STAGE_FACTOR * mean + FINISH_S


def reasoning_time(
    remaining: float | None, *, max_tokens: int, pace: Pace, caps: Caps
) -> float | None:
    """Timeout of the query's reasoning, or `None` when it must be skipped.

    It is skipped when nothing is left above the first stage's reserve, or when an ECR of the
    usual length (at most `max_tokens`) would not fit into what is left.
    """
    if remaining is None:
        return caps.reason
    left = remaining - first_stage_reserve(pace)
    tokens = min(pace.reason_tokens, max_tokens)
    if left <= 0.0 or SLACK * tokens * pace.unit_s.get("reason", 0.0) > left:
        return None
    return min(caps.reason, left)


def required_time(remaining: float | None, cap: float) -> float | None:
    """Timeout of a required stage (embed, search); `None` when no time at all is left."""
    if remaining is None:
        return cap
    left = remaining - FINISH_S
    return min(cap, left) if left > 0.0 else None


def rerank_reserve(pace: Pace, *, depth: int) -> float:
    """What a rerank of `depth` candidates usually takes, with slack; 0 when never measured."""
    return SLACK * depth * pace.unit_s.get("rerank", 0.0)


def optional_time(
    remaining: float | None, *, stage: str, depth: int, reserve: float, pace: Pace, cap: float
) -> tuple[int, float]:
    """(candidates, timeout) of a rewrite or rerank of `depth` candidates.

    Args:
      reserve: time that later stages need; `FINISH_S` is kept back besides.

    Returns:
      The number of candidates, at most `depth`, whose usual time fits (0 = skip the stage), and
      the timeout of the call.
    """
    if remaining is None:
        return depth, cap
    left = min(cap, remaining - reserve - FINISH_S)
    if left <= 0.0:
        return 0, 0.0
    unit = SLACK * pace.unit_s.get(stage, 0.0)
    # Only the deadline is a reason to score fewer; a stage slower than its cap is sick.
    if unit > 0.0:
        depth = min(depth, math.floor((remaining - reserve - FINISH_S) / unit + 1e-9))
    return depth, left
