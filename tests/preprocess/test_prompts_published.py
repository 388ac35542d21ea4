"""The published formats, token for token.

What the authors' code sends through the tokenizer is written out here as a string, with its control
tokens in it, and tokenised by the reference library as that code does.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.preprocess.test_video import movie
from tte_jax.content import Content, Media, MediaKind, Side, Text
from tte_jax.errors import PreconditionError, UnsupportedError
from tte_jax.preprocess.patches import ImageConfig
from tte_jax.preprocess.prompts import PromptSet, prompts_name
from tte_jax.preprocess.prompts_published import PUBLISHED
from tte_jax.preprocess.template import Prompt
from tte_jax.preprocess.tokenizer import Tokenizer
from tte_jax.preprocess.video_config import VideoConfig
from tte_jax.stages import EmbedItem, ReasonItem

QUERY, DOCUMENT = Side.QUERY, Side.DOCUMENT
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
JUDGE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
REPLY = "<|im_end|>\n<|im_start|>assistant\n"


def chat(system: str, user: str, end: str = "") -> str:
    system = f"<|im_start|>system\n{system}<|im_end|>\n"
    return f"{system}<|im_start|>user\n{user}{REPLY}{end}"


def png(width: int = 64, height: int = 96) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def formats(tokenizer_dirs: dict[str, Path]) -> dict[str, PromptSet]:
    tokenizer = Tokenizer.from_dir(tokenizer_dirs["tags"])
    made = {}
    for name in PUBLISHED:
        newer = name.startswith("qwen3_vl")
        image = ImageConfig(patch_size=16 if newer else 14)
        video = VideoConfig.qwen3_vl() if newer else VideoConfig(max_pixels=28 * 28 * 160)
        made[name] = PromptSet(
            name, tokenizer, None if name == "qwen3_reranker" else image, video_config=video
        )
    return made


def same_ids(prompt: Prompt, text: str, directory: Path, tokens: list[int]) -> None:
    """The prompt is `text` as the reference tokenises it, each pad repeated `tokens` times."""
    from transformers import Qwen2Tokenizer

    for pad in ("<|image_pad|>", "<|video_pad|>"):
        parts = text.split(pad)
        text = parts[0] + "".join(pad * tokens.pop(0) + part for part in parts[1:])
    assert not tokens
    ids = Qwen2Tokenizer.from_pretrained(str(directory))(text)["input_ids"]
    assert prompt.ids.tolist() == ids


@pytest.mark.parametrize(
    ("name", "content", "side", "instruction", "text"),
    [
        (
            "vlm2vec",
            Content.of("What is in the image", png()),
            QUERY,
            "Represent the given image with the following question:",
            "<|image_pad|> Represent the given image with the following question: "
            "What is in the image",
        ),
        ("vlm2vec", Content.of("A cat and a dog"), DOCUMENT, "", "A cat and a dog"),
        (
            "vlm2vec",
            Content.of("", png()),
            DOCUMENT,
            "",
            "<|image_pad|> Represent the given image.",
        ),
        ("gme", Content.of("a cat"), QUERY, "", chat("You are a helpful assistant.", "a cat")),
        (
            "gme",
            Content.of("a cat", png()),
            QUERY,
            "Find an image that matches the given text.",
            chat("Find an image that matches the given text.", IMAGE + "a cat"),
        ),
        ("gme", Content.of("a cat"), DOCUMENT, "x", chat("You are a helpful assistant.", "a cat")),
        (
            "qwen3_vl_embedding",
            Content.of("a cat"),
            QUERY,
            "",
            chat("Represent the user's input.", "a cat"),
        ),
        (
            "qwen3_vl_embedding",
            Content.of("a cat", png()),
            QUERY,
            "Retrieve images",
            chat("Retrieve images.", IMAGE + "a cat"),
        ),
        ("qwen3_vl_embedding", Content.of("a"), QUERY, "Why?", chat("Why?", "a")),
    ],
)
def test_embedders(
    formats: dict[str, PromptSet],
    tokenizer_dirs: dict[str, Path],
    name: str,
    content: Content,
    side: Side,
    instruction: str,
    text: str,
) -> None:
    prompts = formats[name]
    made = prompts.embed(EmbedItem(content, side, instruction=instruction))
    assert prompts.image_config is not None
    counts = [prompts.image_config.tokens(grid) for _, grid in made.images]
    end = "<|endoftext|>" if name == "gme" else ""
    same_ids(made, text + end, tokenizer_dirs["tags"], counts)
    assert made.plain_positions == (name == "vlm2vec")


def test_the_chat_format(formats: dict[str, PromptSet], tokenizer_dirs: dict[str, Path]) -> None:
    ecr = "<think>fur</think>\nAnswer: cat"
    made = formats["chat"].embed(EmbedItem(Content.of("what is it", png()), QUERY, ecr))
    text = chat("You are a helpful assistant.", IMAGE + "what is it", ecr + "<|im_end|>")
    config = formats["chat"].image_config
    assert config is not None and len(made.images) == 1
    same_ids(made, text, tokenizer_dirs["tags"], [config.tokens(made.images[0][1])])


@pytest.mark.parametrize("document", ["a black cat", "(punctuation) first", "", "日本語"])
def test_rerankers(
    formats: dict[str, PromptSet], tokenizer_dirs: dict[str, Path], document: str
) -> None:
    """The shared prefix and a candidate behind it are the ids of the whole text."""
    from transformers import Qwen2Tokenizer

    reference = Qwen2Tokenizer.from_pretrained(str(tokenizer_dirs["tags"]))
    whole = {
        "qwen3_reranker": JUDGE
        + "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
        + f"<Query>: a cat\n<Document>: {document}{REPLY}<think>\n\n</think>\n\n",
        "qwen3_vl_reranker": JUDGE
        + "<Instruct>: Given a search query, retrieve relevant candidates that answer the query."
        + f"<Query>:a cat\n<Document>:{document or 'NULL'}{REPLY}",
    }
    for name, text in whole.items():
        prompts = formats[name]
        prefix, suffix = prompts.rerank_prefix("a cat"), prompts.rerank_suffix(document)
        assert prefix.prefix_ends == (len(prefix.ids),)
        assert [*prefix.ids, *suffix.ids] == reference(text)["input_ids"], name


def test_qwen3_vl_reads_a_video_frame_by_frame(
    formats: dict[str, PromptSet], tokenizer_dirs: dict[str, Path]
) -> None:
    prompts = formats["qwen3_vl_embedding"]
    content = Content((Text("a cat"), Media(movie(35), MediaKind.VIDEO)))
    made = prompts.embed(EmbedItem(content, QUERY))
    config = prompts.video_config
    assert config is not None and prompts.image_config is not None
    times = config.times(config.sample(35, 10.0), 10.0)
    frames = "".join(f"<{t:.1f} seconds><|vision_start|><|video_pad|><|vision_end|>" for t in times)
    counts = [prompts.image_config.tokens(grid) for _, grid in made.images]
    text = chat("Represent the user's input.", frames + "a cat")
    same_ids(made, text, tokenizer_dirs["tags"], counts)
    assert len(set(made.image_keys)) == len(times) > 1
    assert {grid[0] for _, grid in made.images} == {1}


def test_qwen2_vl_reads_a_video_as_one_run(formats: dict[str, PromptSet]) -> None:
    prompts = formats["gme"]
    made = prompts.embed(EmbedItem(Content((Media(movie(35), MediaKind.VIDEO),)), QUERY))
    [(patches, (t, rows, columns))] = made.images
    assert t == 3 and len(patches) == t * rows * columns
    pads = made.ids == prompts.tokenizer.token_id("<|video_pad|>")
    assert pads.sum() == t * rows * columns // 4
    assert made.seconds == pytest.approx((2 / (6 / 35 * 10),))


def test_a_post_processor_closes_the_text(tokenizer_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Some directories' tokenizers put an end of text behind everything; that token is pooled."""
    shutil.copytree(tokenizer_dirs["tags"], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer.json"
    spec = json.loads(file.read_text())
    end = "<|endoftext|>"
    ids = next(t["id"] for t in spec["added_tokens"] if t["content"] == end)
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": end, "type_id": 0}},
        ],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
        ],
        "special_tokens": {end: {"id": end, "ids": [ids], "tokens": [end]}},
    }
    file.write_text(json.dumps(spec))
    prompts = PromptSet("qwen3_vl_embedding", Tokenizer.from_dir(tmp_path))
    made = prompts.embed(EmbedItem(Content.of("a cat"), QUERY))
    assert made.ids[-1] == ids
    assert (made.ids == ids).sum() == 1


def test_a_format_does_what_it_was_made_for(formats: dict[str, PromptSet]) -> None:
    with pytest.raises(UnsupportedError, match="cannot reason"):
        formats["gme"].reason(ReasonItem(Content.of("a"), QUERY))
    with pytest.raises(UnsupportedError, match="cannot rerank"):
        formats["vlm2vec"].rerank_prefix("a")
    with pytest.raises(UnsupportedError, match="cannot embed"):
        formats["qwen3_reranker"].embed(EmbedItem(Content.of("a"), QUERY))


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("VLM2Vec-V2.0", "vlm2vec"),
        ("gme-Qwen2-VL-2B-Instruct", "gme"),
        ("Qwen3-VL-Embedding-2B", "qwen3_vl_embedding"),
        ("Qwen3-VL-Reranker-8B", "qwen3_vl_reranker"),
        ("Qwen3-Reranker-0.6B", "qwen3_reranker"),
        ("Qwen2-VL-2B-Instruct", "full"),
    ],
)
def test_a_directory_is_known_by_its_name(tmp_path: Path, folder: str, name: str) -> None:
    path = tmp_path / folder
    path.mkdir()
    assert prompts_name(path) == name
    (path / "tte.json").write_text(json.dumps({"prompts": "chat"}))
    assert prompts_name(path) == "chat", "tte.json is asked first"


def test_limits_and_positions_of_a_directory(
    tokenizer_dirs: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "VLM2Vec-V2.0"
    shutil.copytree(tokenizer_dirs["plain"], path)
    (path / "preprocessor_config.json").write_text(json.dumps({"max_pixels": 999_999}))
    assert PromptSet.from_dir(path).plain_positions
    (path / "tte.json").write_text(json.dumps({"mrope_mode": "current", "prompts": "vlm2vec"}))
    assert not PromptSet.from_dir(path).plain_positions
    (path / "tte.json").write_text(json.dumps({"mrope_mode": "old"}))
    with pytest.raises(PreconditionError, match="legacy and current"):
        PromptSet.from_dir(path)
    (path / "tte.json").write_text(json.dumps({"prompts": "gme"}))
    config = PromptSet.from_dir(path).image_config
    assert config is not None and config.max_pixels == 1280 * 784
