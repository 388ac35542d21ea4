from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models

from tests.preprocess.conftest import CONTROLS
from tte_jax.errors import InvalidInputError, NotFoundError, PreconditionError, UnsupportedError
from tte_jax.preprocess.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["tags", "plain"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_dirs: dict[str, Path]) -> Tokenizer:
    return Tokenizer.from_dir(tokenizer_dirs[request.param])


@pytest.fixture(scope="module")
def reference(tokenizer_dirs: dict[str, Path]):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dirs["plain"])


@given(text=st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_encodes_as_the_reference(tokenizer: Tokenizer, reference, text: str) -> None:
    assume(not any(control in text for control in CONTROLS))  # those are the next test's
    assert tokenizer.encode(text) == reference(text)["input_ids"]


hostile = st.lists(
    st.one_of(st.sampled_from([*CONTROLS, "<think>", "</think>"]), st.text(max_size=6)), max_size=6
).map("".join)


@given(text=hostile)
@settings(max_examples=150, deadline=None)
def test_text_never_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    names = [*CONTROLS, "<think>", "</think>"]
    controls = {tokenizer.token_id(c) for c in names if tokenizer.has_control(c)}
    assert len(controls) >= len(CONTROLS)
    assert not controls.intersection(ids)
    tagged = tokenizer.encode_tagged(text)
    assert not {tokenizer.token_id(c) for c in CONTROLS}.intersection(tagged)


def test_the_reference_itself_would_have_been_fooled(reference) -> None:
    # Or the test above could not fail.
    assert reference.convert_tokens_to_ids("<|im_end|>") in reference("a<|im_end|>b")["input_ids"]


def test_characters_that_normalise_to_control_tokens_stay_text(tokenizer: Tokenizer) -> None:
    # NFC makes the Greek question mark a semicolon and the Kelvin sign a K; a token with a K in it
    # would appear only after normalisation.
    if tokenizer.has_control("<think>"):
        assert tokenizer.token_id("<think>") not in tokenizer.encode("<thin\u212a>")
    assert tokenizer.decode(tokenizer.encode("<thin\u212a>")) == "<thinK>"


def test_tags_are_tokens_where_there_are_any(tokenizer_dirs: dict[str, Path]) -> None:
    with_tags = Tokenizer.from_dir(tokenizer_dirs["tags"])
    ids = with_tags.encode_tagged("<think>a cat</think>\nAnswer: cat")
    assert ids[0] == with_tags.token_id("<think>")
    assert ids.count(with_tags.token_id("</think>")) == 1
    assert with_tags.decode(ids) == "<think>a cat</think>\nAnswer: cat"
    without = Tokenizer.from_dir(tokenizer_dirs["plain"])
    text = "<think>a cat</think>\nAnswer: cat"
    assert without.encode_tagged(text) == without.encode(text)
    assert without.decode(without.encode(text)) == text


@given(text=hostile)
@settings(max_examples=100, deadline=None)
def test_decode_turns_encode_around(tokenizer: Tokenizer, text: str) -> None:
    import unicodedata

    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_streaming_equals_decoding(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=30))
    stream = tokenizer.stream()
    pieces = [stream.push([i]) for i in ids]
    joined = "".join(pieces) + stream.finish()
    assert joined == tokenizer.decode(ids)
    controls = {tokenizer.token_id(c) for c in CONTROLS}
    kept = [i for i in ids if i not in controls and i < tokenizer.vocab_size]
    assert joined == tokenizer._backend.decode(kept, skip_special_tokens=False)


def test_streaming_never_gives_half_a_character(tokenizer: Tokenizer) -> None:
    text = "a cat 😺 日本語 é"
    stream = tokenizer.stream()
    pieces = [stream.push([i]) for i in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert "" in pieces  # the emoji takes several tokens, and waits for the last
    assert stream.finish() == ""
    half = tokenizer.encode("😺")[:-1]
    stream = tokenizer.stream()
    assert stream.push(half) == "" and stream.finish() == "\ufffd"


def test_names_of_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.role_id("eos_token") == tokenizer.token_id("<|im_end|>")
    assert tokenizer.role_id("pad_token") == tokenizer.token_id("<|endoftext|>")
    assert tokenizer.role_id("bos_token") is None
    with pytest.raises(PreconditionError, match="<\\|nothing\\|>"):
        tokenizer.token_id("<|nothing|>")


def test_directory_without_tokenizer_json(tokenizer_dirs: dict[str, Path], tmp_path: Path) -> None:
    source = tokenizer_dirs["plain"]
    shutil.copy(source.parent / "vocab.json", tmp_path)
    shutil.copy(source.parent / "merges.txt", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    converted = Tokenizer.from_dir(tmp_path)
    text = "a smiling cat"
    assert converted.encode(text) == Tokenizer.from_dir(source).encode(text)


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff<|im_end|>", "<think>\ud800</think>"])
def test_what_is_no_unicode_is_an_input_error(tokenizer: Tokenizer, text: str) -> None:
    for encode in (tokenizer.encode, tokenizer.encode_tagged):
        with pytest.raises(InvalidInputError, match="surrogate"):
            encode(text)


@pytest.mark.parametrize("content", [b'{"version": "1.0", "mod', b"{}", b"[]", b"\xff\xfe", b""])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_torn_files_are_named(
    tokenizer_dirs: dict[str, Path], tmp_path: Path, file: str, content: bytes
) -> None:
    if (file, content) == ("tokenizer_config.json", b"{}"):
        return  # names no roles, which is allowed
    directory = shutil.copytree(tokenizer_dirs["plain"], tmp_path / "model")
    (directory / file).write_bytes(content)
    with pytest.raises(PreconditionError, match=file) as caught:
        Tokenizer.from_dir(directory)
    assert caught.value.reason == "BAD_MODEL_FILE"


def test_wrong_directories(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    words = HfTokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedError, match="byte-level"):
        Tokenizer.from_dir(tmp_path)
