"""The pipeline over the stage Protocols; the gateway and the evaluation both run this one."""

from tte_jax.cascade.cascade import Cascade
from tte_jax.cascade.messages import (
    Degraded,
    Include,
    IngestInput,
    IngestOptions,
    IngestUpdate,
    ItemResult,
    ItemState,
    Rejected,
    SearchQuery,
    SearchStage,
    SearchUpdate,
)
from tte_jax.cascade.planning import Caps, Pace
from tte_jax.cascade.reembed import ReembedUpdate, reembed

__all__ = [
    "Caps",
    "Cascade",
    "Degraded",
    "Include",
    "IngestInput",
    "IngestOptions",
    "IngestUpdate",
    "ItemResult",
    "ItemState",
    "Pace",
    "ReembedUpdate",
    "Rejected",
    "SearchQuery",
    "SearchStage",
    "SearchUpdate",
    "reembed",
]
