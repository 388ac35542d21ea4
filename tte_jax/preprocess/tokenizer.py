"""Byte-level BPE tokenizers of Hugging Face directories, with user text kept harmless."""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as HfTokenizer

from tte_jax.errors import InvalidInputError, NotFoundError, PreconditionError, UnsupportedError
from tte_jax.models.files import read_json
from tte_jax.preprocess.ecr import END_THINK, THINK

TAGS = (THINK, END_THINK)


class Tokenizer:
    """Text to ids and back.

    `encode` never yields a control token, whatever the text says: a document that contains
    `<|im_end|>` is encoded as those characters. Control tokens are put into a sequence by id
    (`token_id`). Safe to use from several threads.
    """

    def __init__(self, backend: HfTokenizer, *, names: dict[str, str] | None = None) -> None:
        """Args: the backend, and the tokens of roles such as `eos_token` by role name."""
        self._backend = backend
        self._names = names or {}
        if "ByteLevel" not in json.dumps(json.loads(backend.to_str()).get("decoder")):
            raise UnsupportedError(
                "the tokenizer is not byte-level BPE, which all supported model families use",
                reason="UNSUPPORTED_TOKENIZER",
            )
        added = backend.get_added_tokens_decoder()
        self._added = {token.content: i for i, token in added.items()}
        self._hidden = frozenset(
            i for i, token in added.items() if token.special and token.content not in TAGS
        )
        longest_first = sorted(self._added, key=len, reverse=True)
        self._any_added = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json`; where there is only a slow tokenizer's files, transformers
        converts them.

        Raises:
          NotFoundError: the directory has no tokenizer.
          PreconditionError: `tokenizer.json` or `tokenizer_config.json` cannot be read.
          UnsupportedError: the tokenizer is not byte-level BPE.
        """
        path = Path(path)
        names = _role_tokens(path)
        file = path / "tokenizer.json"
        if file.is_file():
            try:
                backend = HfTokenizer.from_file(str(file))
            except Exception as error:  # the library raises no other type
                raise PreconditionError(
                    f"{str(file)!r} is no tokenizer: {error}. Download the model again.",
                    reason="BAD_MODEL_FILE",
                    path=file,
                ) from error
            return cls(backend, names=names)
        try:
            from transformers import AutoTokenizer  # seconds to import, so only here

            return cls(AutoTokenizer.from_pretrained(str(path)).backend_tokenizer, names=names)
        except (OSError, ValueError, AttributeError) as error:
            raise NotFoundError(
                f"{path} has no tokenizer; expected tokenizer.json, or vocab.json and merges.txt",
                reason="TOKENIZER_NOT_FOUND",
            ) from error

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int:
        """The id of a control token or of a word that is one token.

        Raises:
          PreconditionError: the tokenizer has no such token.
        """
        found = self._backend.token_to_id(token)
        if found is None:
            raise PreconditionError(
                f"the tokenizer has no token {token!r}; this model was not made for these prompts",
                reason="TOKEN_MISSING",
            )
        return found

    def has_control(self, token: str) -> bool:
        """Whether the token is one of the tokenizer's added (control) tokens."""
        return token in self._added

    def role_id(self, role: str) -> int | None:
        """The id of `eos_token`, `pad_token`, ... as the directory's configuration names it."""
        token = self._names.get(role)
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; text that looks like a control token stays text.

        Raises:
          InvalidInputError: a lone surrogate.
        """
        backend = self._backend
        # Normalisation (NFC) turns a few odd characters into ASCII ones, so look after it too.
        if self._any_added.search(text) or self._any_added.search(
            unicodedata.normalize("NFC", text)
        ):
            backend = self._without_controls
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # what has no UTF-8 is no text to it
            raise InvalidInputError(
                "the text holds a lone surrogate, which is not valid Unicode; send valid text"
            ) from error

    @cached_property
    def closing_ids(self) -> tuple[int, ...]:
        """What the directory's post-processor puts behind every text, such as an end of text."""
        return tuple(self._backend.encode("", add_special_tokens=True).ids)

    def split_tags(self, text: str) -> list[str]:
        """The text cut at the think tags that this tokenizer has tokens for; tags are parts too."""
        tags = [tag for tag in TAGS if tag in self._added]
        if not tags:
            return [text] if text else []
        return [part for part in re.split("(" + "|".join(tags) + ")", text) if part]

    def encode_tagged(self, text: str) -> list[int]:
        """Like `encode`, but `<think>` and `</think>` become their tokens where there are any.

        For ECRs: a model that was trained with think tokens must meet them again.
        """
        ids: list[int] = []
        for part in self.split_tags(text):
            is_tag = part in TAGS and part in self._added
            ids += [self._added[part]] if is_tag else self.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without control tokens but with think tags; broken UTF-8 becomes U+FFFD."""
        return b"".join(map(self._bytes_of, ids)).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self)

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._hidden:
            return b""
        token = self._backend.id_to_token(int(token_id))
        if token is None:  # models pad their vocabulary beyond the tokenizer's
            return b""
        if token in self._added:
            return token.encode()
        try:
            return bytes(_BYTE_OF[c] for c in token)
        except KeyError:
            return token.encode()

    @cached_property
    def _without_controls(self) -> HfTokenizer:
        # Built on the first text that contains a control token's characters: such texts are rare,
        # and a large vocabulary takes a second to read.
        spec = json.loads(self._backend.to_str())
        spec["added_tokens"] = []
        spec["post_processor"] = None
        return HfTokenizer.from_str(json.dumps(spec))


class StreamDecoder:
    """Turns ids into text as they come, never yielding half a character.

    The pieces joined are exactly `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; may be empty while a character is unfinished."""
        return self._utf8.decode(b"".join(self._tokenizer._bytes_of(i) for i in ids))

    def finish(self) -> str:
        """What is left: U+FFFD when the last character never became whole, else nothing."""
        return self._utf8.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE (Radford et al. 2019): printable Latin-1 stands for
    itself, every other byte for the next free code point from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _role_tokens(path: Path) -> dict[str, str]:
    file = path / "tokenizer_config.json"
    if not file.is_file():
        return {}
    roles = {k: v for k, v in read_json(file).items() if k.endswith("_token")}
    # Older files hold the token as an object with its flags.
    contents = {k: v.get("content") if isinstance(v, dict) else v for k, v in roles.items()}
    return {k: v for k, v in contents.items() if isinstance(v, str)}
