"""Where a corpus's vectors are searched, as users write it: `scann`, `milvus://host:19530`, …"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tte_jax.corpus.store import CorpusStore
from tte_jax.errors import InvalidInputError, PreconditionError

SCANN = "scann"
_REMEMBERED = "index"


@dataclass(frozen=True)
class MilvusLocation:
    """A Milvus.

    Attributes:
      text: as the corpus remembers it.
      uri: for the client: a URL, or the file of milvus-lite.
      database: name of the database in it, "" = the default one.
    """

    text: str
    uri: str
    database: str = ""

    @property
    def is_file(self) -> bool:
        return "://" not in self.uri


def parse(text: str) -> MilvusLocation | None:
    """The Milvus that `text` names; `None` for `scann`.

    `milvus://host:port[/database]` is a server, `milvus+tls://…` one with TLS, `milvus:FILE` a file
    of milvus-lite on this machine.

    Raises:
      InvalidInputError: it is none of these.
    """
    if text == SCANN:
        return None
    scheme, _, rest = text.partition(":")
    if scheme == "milvus" and rest and not rest.startswith("//"):
        file = Path(rest).expanduser().absolute()
        return MilvusLocation(f"milvus:{file}", str(file))
    url = urlsplit(text)
    if url.scheme in ("milvus", "milvus+tls") and url.hostname and not url.username:
        web = "https" if url.scheme == "milvus+tls" else "http"
        return MilvusLocation(text, f"{web}://{url.netloc}", url.path.strip("/"))
    raise InvalidInputError(
        f"index {text!r}: expected scann, milvus://host:19530 (milvus+tls:// with TLS; the token "
        "comes from TTE_MILVUS_TOKEN) or milvus:FILE.db",
        field="index",
    )


def text_of(text: str) -> str:
    """`text` with the file's path made absolute, as the corpus remembers it; raises as `parse`."""
    location = parse(text)
    return location.text if location else SCANN


def remembered(store: CorpusStore) -> str:
    return store.value(_REMEMBERED) or SCANN


def remember(store: CorpusStore, text: str) -> None:
    store.set_value(_REMEMBERED, text)


def choose(store: CorpusStore, wanted: str) -> MilvusLocation | None:
    """Where this corpus is searched; an empty corpus takes what is `wanted` and remembers it.

    Raises:
      PreconditionError: its index is elsewhere (`INDEX_ELSEWHERE`).
    """
    now = remembered(store)
    location = parse(wanted or now)
    text = text_of(wanted or now)
    if text != now:
        if store.count():
            raise PreconditionError(
                f"the index of the corpus {store.path} is {now}, not {text}. Move it while nothing "
                f"serves it (`tte corpus migrate --to {text}`), or start with `--index {now}`.",
                reason="INDEX_ELSEWHERE",
                expected=now,
                actual=text,
            )
        remember(store, text)
    return location
