"""Any media of a content to patches: a still image, a drawn PDF page or a video."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tte_jax.content import Media, MediaKind
from tte_jax.errors import UnsupportedError
from tte_jax.limits import MAX_IMAGE_PIXELS
from tte_jax.preprocess.image import decode_image
from tte_jax.preprocess.pages import DPI, render_page
from tte_jax.preprocess.patches import Grid, ImageConfig, patchify
from tte_jax.preprocess.video import VideoPatches, load_video
from tte_jax.preprocess.video_config import VideoConfig

Patches = tuple[np.ndarray, Grid]
"""([n, C*Tp*p*p] float32, grid) of one image."""

LoadMedia = Callable[[Media, str], Patches | VideoPatches]
"""Media and the path of its field → patches. A cache keyed by `media_key` fits in here."""


def media_key(media: Media) -> str:
    """Names the features of a media: its content hash, and for a PDF also the page."""
    if media.kind is MediaKind.IMAGE:
        return media.sha256
    return f"{media.sha256}:{media.kind}:{media.page}"


def patches_bytes(value: Patches | VideoPatches) -> int:
    """Memory of a loaded media."""
    return value.patches.nbytes if isinstance(value, VideoPatches) else value[0].nbytes


def media_loader(
    image: ImageConfig,
    video: VideoConfig | None = None,
    *,
    max_pixels: int = MAX_IMAGE_PIXELS,
    dpi: float = DPI,
) -> LoadMedia:
    """Decode and patchify, with no cache.

    Args:
      video: None = a model without a video processor, for which a video is an UnsupportedError.
      max_pixels: the largest encoded image.
      dpi: of PDF pages.
    """

    def load(media: Media, path: str) -> Patches | VideoPatches:
        field = f"{path}.{media.kind}.data" if path else ""
        match media.kind:
            case MediaKind.IMAGE:
                picture = decode_image(media.data, max_pixels=max_pixels, field=field)
            case MediaKind.PAGE:
                picture = render_page(media.data, media.page, dpi=dpi, field=field)
            case MediaKind.VIDEO:
                if video is None:
                    raise UnsupportedError(
                        f"{path or 'the input'}: this model reads no video; send an image",
                        reason="UNSUPPORTED_MEDIA",
                    )
                return load_video(media.data, video, field=field)
        return patchify(picture, image, field=field)

    return load
