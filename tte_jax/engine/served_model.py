"""A model directory opened for one role: weights, prompts, bucket ladder and version."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from tte_jax.content import Media
from tte_jax.engine.buckets import FULL, MINI, Buckets
from tte_jax.engine.cache import ByteLru
from tte_jax.engine.layout import ONE_DEVICE, Layout
from tte_jax.errors import InvalidInputError, NotFoundError, PreconditionError
from tte_jax.models.config import ModelConfig
from tte_jax.models.multimodal import MultimodalLM
from tte_jax.models.registry import model_config
from tte_jax.preprocess.media import LoadMedia, Patches, media_key, media_loader, patches_bytes
from tte_jax.preprocess.prompts import PromptSet, prompts_name, read_spec
from tte_jax.preprocess.video import VideoPatches
from tte_jax.sharding import Rules, sharding_of
from tte_jax.weights import hf

ROLES = ("reasoner", "embedder", "reranker")
DTYPES = ("float32", "bfloat16", "float16")

# Weights are read whole up to here, which takes milliseconds; of larger files the version reads
# samples, enough to tell two trainings of one architecture apart.
_HASH_WHOLE_BYTES = 64 * 2**20
_HASH_BLOCK, _HASH_BLOCKS = 4096, 256

_SLOW_TOKENIZER = (
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True)
class ServedModel:
    """What a role needs of its model directory.

    Attributes:
      directory: where it was read.
      name: `name` of `tte.json`, else the directory's name.
      version: `name@` and 12 hex digits of a hash over configuration, prompts, tokenizer and
        weights; equal for equal files wherever they lie.
      dtype: dtype of weights and activations.
      quantise: "int8" when the matrices of linear layers are held as that, else None.
      layout: the device or mesh that holds it.
      roles: what its `tte.json` allows it to be; all of them where it says nothing.
    """

    directory: Path
    name: str
    version: str
    dtype: str
    model: MultimodalLM
    config: ModelConfig
    prompts: PromptSet
    buckets: Buckets
    quantise: str | None = None
    layout: Layout = ONE_DEVICE
    roles: tuple[str, ...] = ROLES


def open_model(
    directory: str | Path,
    *,
    role: str,
    dtype: str = "float32",
    buckets: Buckets | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    quantise: str | None = None,
) -> ServedModel:
    """Reads a model directory.

    Args:
      role: one of `ROLES`; a directory whose `tte.json` names roles must name this one.
      dtype: one of `DTYPES`.
      buckets: the ladder; None = that of `tte.json`, else one that suits its prompts.
      mesh: of `tte_jax.sharding.make_mesh`, over devices of this process; None = one device.
      rules: how dimensions map to the mesh; None = the defaults.
      quantise: "int8" holds the matrices of linear layers as int8, a quarter of float32.

    Raises:
      NotFoundError: the directory or a file in it is missing; the message names what.
      PreconditionError: a model of another family or role, or unusable files.
      InvalidInputError: an unknown dtype or `quantise`.
      UnsupportedError: a mesh with devices of other processes.
    """
    path = Path(directory).expanduser()
    if dtype not in DTYPES:
        raise InvalidInputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}", field="dtype")
    if not path.is_dir():
        raise NotFoundError(
            f"no model directory at {path}: expected a directory with config.json, "
            "tokenizer.json and *.safetensors, such as a Hugging Face download",
            reason="MODEL_NOT_FOUND",
            path=path,
        )
    spec = read_spec(path / "tte.json")
    roles = _roles(path, spec, role)
    config = model_config(path)
    # A reranker whose format is published may read images otherwise; here it compares texts.
    texts_only = config.vision is not None and prompts_name(path) != "qwen3_vl_reranker"
    if role == "reranker" and texts_only:
        raise PreconditionError(
            f"{path} holds a {config.model_type} model, which reads images; the reranker compares "
            "texts and needs a text family such as qwen3",
            reason="MODEL_FAMILY_UNSUPPORTED",
            model_type=config.model_type,
        )
    prompts = PromptSet.from_dir(path)
    ladder = buckets or (MINI if prompts.name == "mini" else FULL)
    if buckets is None and "buckets" in spec:
        ladder = ladder.replace(spec["buckets"])
    if prompts.image_config is not None:
        # What is sent is made to fit what is served, whatever its size or length.
        image, video = prompts.image_config, prompts.video_config
        if patches := ladder.image_patches(role, image.merge_size**2):
            prompts.image_config = image = image.at_most(patches)
            if video is not None and not video.max_patches:
                video = replace(video, max_patches=patches)
        prompts.load = cached_media(media_loader(image, video))
    name = str(spec.get("name") or path.name)
    layout = Layout(mesh, rules or Rules())
    placed = None if mesh is None else sharding_of(mesh, layout.rules)
    return ServedModel(
        directory=path,
        name=name,
        version=f"{name}@{fingerprint(path, prompts.name)}",
        dtype=dtype,
        model=hf.load(path, dtype=jnp.dtype(dtype), sharding_of=placed, quantise=quantise),
        config=config,
        prompts=prompts,
        buckets=ladder,
        quantise=quantise,
        layout=layout,
        roles=roles,
    )


def cached_media(load: LoadMedia, *, max_bytes: int = 64 * 2**20) -> LoadMedia:
    """`load` that keeps the newest results: one query's image passes here once per stage."""
    cache: ByteLru[Patches | VideoPatches] = ByteLru(max_bytes, patches_bytes)

    def cached(media: Media, field: str) -> Patches | VideoPatches:
        key = media_key(media)
        value = cache.get(key)
        if value is None:
            value = load(media, field)
            cache.put(key, value)
        return value

    return cached


def fingerprint(directory: Path, prompts: str) -> str:
    """12 hex digits over everything in the directory that changes what the model answers."""
    digest = hashlib.sha256(f"prompts:{prompts};".encode())
    names = (
        "config.json",
        "generation_config.json",  # has the tokens that end a text
        "tte.json",
        "tokenizer.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
    )
    # Beside tokenizer.json they hold next to nothing; to count them there would change versions.
    if not (directory / "tokenizer.json").is_file():
        names += _SLOW_TOKENIZER
    for name in names:
        file = directory / name
        if file.is_file():
            digest.update(f"{name}:{hashlib.sha256(file.read_bytes()).hexdigest()};".encode())
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            if size <= _HASH_WHOLE_BYTES:
                digest.update(stream.read())
                continue
            for block in range(_HASH_BLOCKS):
                stream.seek(block * (size - _HASH_BLOCK) // (_HASH_BLOCKS - 1))
                digest.update(stream.read(_HASH_BLOCK))
    return digest.hexdigest()[:12]


def _roles(path: Path, spec: dict[str, Any], role: str) -> tuple[str, ...]:
    """What the directory was made for; `role` must be among it."""
    roles = spec.get("role")
    if roles is None:
        return ROLES
    named = [roles] if isinstance(roles, str) else list(roles)
    if role not in named:
        raise PreconditionError(
            f"{path} was made for the role {' and '.join(map(str, named))}, not for {role}; "
            f"give a model directory whose tte.json names {role}",
            reason="MODEL_ROLE",
            role=role,
        )
    return tuple(map(str, named))
