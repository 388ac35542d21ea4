"""Vision features of images: packed into buckets, computed once per content."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from tte_jax.engine import programs
from tte_jax.engine.buckets import Shape, cheapest, longest
from tte_jax.engine.cache import ByteLru
from tte_jax.engine.executables import ExecutableTable
from tte_jax.engine.inputs import ImageInput
from tte_jax.errors import InvalidInputError
from tte_jax.models.config import VisionConfig
from tte_jax.preprocess.vision_plan import plan_vision


@dataclass
class Pack:
    """One row of P patches and the images in it."""

    size: int
    images: list[ImageInput] = field(default_factory=list)
    used: int = 0


def pack_images(images: Sequence[ImageInput], sizes: Iterable[int]) -> list[Pack]:
    """Images into rows of bucket sizes, each image into the smallest row size that holds it.

    First fit, largest first: a row takes further images while they fit.

    Raises:
      InvalidInputError: an image has more patches than the largest row.
    """
    ladder = sorted(set(sizes))
    packs: list[Pack] = []
    for image in sorted(images, key=lambda i: -len(i.patches)):
        n = len(image.patches)
        if not ladder or n > ladder[-1]:
            raise _too_large(n, ladder[-1] if ladder else 0)
        size = next(s for s in ladder if s >= n)
        pack = next((p for p in packs if p.size >= n and p.used + n <= p.size), None)
        if pack is None:
            pack = Pack(size)
            packs.append(pack)
        pack.images.append(image)
        pack.used += n
    return packs


class VisionEncoder:
    """`features` for images, from a byte-bounded cache or the tower. Runs on the device thread."""

    def __init__(
        self,
        table: ExecutableTable,
        config: VisionConfig,
        shapes: Sequence[Shape],
        *,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        self._table = table
        self._config = config
        self._shapes = tuple(shapes)
        self.cache: ByteLru[np.ndarray] = ByteLru(cache_bytes, lambda x: x.nbytes)
        rows = table.layout.rows
        for g, p in self._shapes:
            table.add(
                "encode_images",
                (g, p),
                programs.encode_images,
                rows(jnp.float32, g, p, config.patch_values),
                *(
                    rows(x.dtype, g, *x.shape)
                    for x in plan_vision([], bucket=p, **config.plan).arrays
                ),
                tokens=g * p,
            )

    @property
    def max_patches(self) -> int:
        """The largest image, in patches."""
        return longest(self._shapes)

    def check(self, images: Iterable[ImageInput], *, field: str = "") -> None:
        """Refuses images that no bucket holds, before they are queued.

        Raises:
          InvalidInputError: more patches than `max_patches`.
        """
        for image in images:
            if len(image.patches) > self.max_patches:
                raise _too_large(len(image.patches), self.max_patches, field)

    def features(self, images: Iterable[ImageInput]) -> tuple[dict[str, np.ndarray], set[str]]:
        """Features [v, D] by image key, and the keys that came from the cache.

        An image whose features are not finite spoils those of no other and is not kept.
        """
        found: dict[str, np.ndarray] = {}
        missing: dict[str, ImageInput] = {}
        for image in images:
            if image.key in found or image.key in missing:
                continue
            value = self.cache.get(image.key)
            if value is None:
                missing[image.key] = image
            else:
                found[image.key] = value
        cached = set(found)
        sizes = [p for _, p in self._shapes]
        packs = pack_images(list(missing.values()), sizes)
        self._encode(packs, found)
        # In a row 0 * NaN is NaN, whatever is masked; each by itself, only the broken one stays so.
        shared = [image for pack in packs if len(pack.images) > 1 for image in pack.images]
        spoilt = [image for image in shared if not np.isfinite(found[image.key]).all()]
        self._encode([pack for image in spoilt for pack in pack_images([image], sizes)], found)
        return found, cached

    def _encode(self, packs: Sequence[Pack], found: dict[str, np.ndarray]) -> None:
        for size in sorted({p.size for p in packs}):
            rows = [p for p in packs if p.size == size]
            while rows:
                shape = cheapest(len(rows), size, self._shapes)
                self._run(shape, rows[: shape[0]], found)
                rows = rows[shape[0] :]

    def _run(self, shape: Shape, packs: Sequence[Pack], found: dict[str, np.ndarray]) -> None:
        g, p = shape
        merged = self._config.merged
        patches = np.zeros((g, p, self._config.patch_values), np.float32)
        plans = [
            plan_vision([i.grid for i in pack.images], bucket=p, **self._config.plan)
            for pack in packs
        ]
        empty = plan_vision([], bucket=p, **self._config.plan)
        plans += [empty] * (g - len(packs))
        plan = [np.stack(rows) for rows in zip(*(one.arrays for one in plans), strict=True)]
        for row, pack in enumerate(packs):
            patches[row, : pack.used] = np.concatenate([i.patches for i in pack.images])
        out = np.asarray(self._table.run("encode_images", shape, patches, *plan))
        out = out.reshape(g, p // merged, -1)
        for row, pack in enumerate(packs):
            at = 0
            for image in pack.images:
                end = at + len(image.patches) // merged
                found[image.key] = value = out[row, at:end].copy()
                if np.isfinite(value).all():
                    self.cache.put(image.key, value)
                at = end


def _too_large(patches: int, limit: int, field: str = "") -> InvalidInputError:
    return InvalidInputError(
        f"the image makes {patches} patches, but this model is served with at most {limit}; "
        "make it smaller, or serve the model with larger `buckets` in its tte.json",
        field=field,
        reason="TOO_LONG",
        limit=limit,
    )
