"""tte-jax: reasoning-driven multimodal retrieval. Reason, embed, search, rerank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tte_jax.model import Model, ModelOutput, load_model

__all__ = ["Model", "ModelOutput", "load_model"]


def __getattr__(name: str) -> Any:
    # Lazy, so that a gRPC client of this package never imports JAX.
    if name in __all__:
        from tte_jax import model

        return getattr(model, name)
    raise AttributeError(f"module 'tte_jax' has no attribute {name!r}")
