"""Files that become the content of documents and queries: images, videos, PDFs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tte_jax import limits
from tte_jax.content import Media, MediaKind
from tte_jax.errors import InvalidInputError, NotFoundError
from tte_jax.preprocess.image import decode_image
from tte_jax.preprocess.pages import page_count, single_page

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"})
PDF_SUFFIXES = frozenset({".pdf"})
SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES | PDF_SUFFIXES
# A message carries the file and some metadata.
MAX_FILE_BYTES = limits.MAX_MESSAGE_BYTES - 2**20
# A PDF is sent page by page; as a whole it is only held in memory.
MAX_PDF_BYTES = 2**30


def read_file(path: Path, *, limit: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a file that exists, is not empty and has at most `limit` bytes.

    Raises NotFoundError or InvalidInputError, each naming the file.
    """
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise InvalidInputError(f"{path} is a folder; expected a file.", reason="NOT_A_FILE")
        if size == 0:
            raise InvalidInputError(f"{path} is empty (0 bytes).", reason="EMPTY_FILE")
        if size > limit:
            raise InvalidInputError(
                f"{path} has {size:,} bytes; at most {limit:,} can be sent. Make it smaller.",
                reason="FILE_TOO_LARGE",
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist.", reason="FILE_NOT_FOUND") from None
    except OSError as error:
        raise InvalidInputError(
            f"{path} cannot be read: {error.strerror or error}.", reason="UNREADABLE_FILE"
        ) from error
    except ValueError:  # a null byte
        raise InvalidInputError(
            f"{str(path)!a} is no name that a file can have.", reason="UNREADABLE_FILE"
        ) from None


def read_image(path: Path) -> bytes:
    """The bytes of an image file, decoded once to be sure of it.

    Raises NotFoundError or InvalidInputError, each naming the file.
    """
    data = read_file(path)
    try:
        decode_image(data, max_pixels=limits.MAX_IMAGE_PIXELS)
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {error.message}.", reason=error.reason) from None
    return data


def read_video(path: Path) -> Media:
    """A video as it is; the service decodes it. Raises as `read_file`."""
    return Media(read_file(path), MediaKind.VIDEO)


class Pdf:
    """A PDF whose pages are taken one by one, each as a PDF of its own.

    Raises NotFoundError or InvalidInputError, each naming the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = read_file(path, limit=MAX_PDF_BYTES)
        try:
            self.pages = page_count(self._data)
        except InvalidInputError as error:
            raise self._named(error) from None

    def page(self, number: int) -> Media:
        """Page `number`, counted from 1."""
        if not 1 <= number <= self.pages:
            raise InvalidInputError(
                f"{self.path} has {self.pages} pages; there is no page {number}.",
                reason="PAGE_OUT_OF_RANGE",
            )
        try:
            data = single_page(self._data, number - 1)
        except InvalidInputError as error:
            raise self._named(error) from None
        if len(data) > MAX_FILE_BYTES:
            raise InvalidInputError(
                f"{self.path}: page {number} alone has {len(data):,} bytes; at most "
                f"{MAX_FILE_BYTES:,} can be sent.",
                reason="FILE_TOO_LARGE",
            )
        return Media(data, MediaKind.PAGE)

    def numbers(self) -> Iterator[int]:
        return iter(range(1, self.pages + 1))

    def _named(self, error: InvalidInputError) -> InvalidInputError:
        return InvalidInputError(f"{self.path}: {error.message}.", reason=error.reason)
