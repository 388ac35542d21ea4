"""Models of the Hugging Face hub, by their id."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import errors, snapshot_download

from tte_jax.errors import AccessError, NotFoundError

# Not the copies in other formats (onnx/, original/, *.bin) that many repositories also hold.
FILES, FOLDERS = ["*.safetensors", "*.json", "merges.txt", "*.jinja"], ["*/*"]
_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


def local(path: str | Path) -> Path:
    """The directory itself where it exists or cannot be an id, else `fetch`."""
    directory = Path(path).expanduser()
    if directory.exists() or not _ID.fullmatch(str(path)):
        return directory
    return fetch(str(path))


def fetch(name: str) -> Path:
    """Download a model, or find it in the hub's cache; what is there is not read again.

    Args:
      name: `owner/name`, or `owner/name@revision` with a branch, tag or commit.

    Returns: the snapshot's directory. `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they
    mean to the hub's own tools.

    Raises:
      NotFoundError: no such repository or revision; or neither in the cache nor reachable.
      AccessError: the repository wants a token, or the licence accepted.
    """
    found = _ID.fullmatch(name)
    assert found is not None
    try:
        return Path(
            snapshot_download(
                found["repo"],
                revision=found["revision"],
                allow_patterns=FILES,
                ignore_patterns=FOLDERS,
            )
        )
    except errors.GatedRepoError as e:
        raise AccessError(
            f"The hub's repository {found['repo']!r} is gated: accept its licence on"
            f" https://huggingface.co/{found['repo']}, then run `hf auth login`.",
            reason="MODEL_GATED",
        ) from e
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as e:
        raise NotFoundError(
            f"There is no directory {name!r} here, and the Hugging Face hub has no such repository"
            " or revision, or not for you (a private one needs `hf auth login`).",
            reason="MODEL_NOT_FOUND",
        ) from e
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as e:
        raise NotFoundError(
            f"There is no directory {name!r} here. As a model of the Hugging Face hub it is not in"
            f" this machine's cache, and the hub cannot be reached ({type(e).__name__}). Connect to"
            " the network (HF_HUB_OFFLINE must not be set), or give a directory.",
            reason="MODEL_NOT_FETCHED",
        ) from e
    except errors.HFValidationError as e:
        raise NotFoundError(
            f"There is no directory {name!r}, and it is no id of the Hugging Face hub: {e}",
            reason="MODEL_NOT_FOUND",
        ) from e
