"""Where the built-in models lie inside the package.

`tte-mini-vl` reasons and embeds (one unified model); `tte-mini-reranker` scores. Both are ordinary
model directories: they load through the same code as any directory of a supported family.
"""

from __future__ import annotations

from pathlib import Path

from tte_jax.errors import NotFoundError

WEIGHTS_DIR = Path(__file__).parent / "weights"
REASONER = EMBEDDER = "tte-mini-vl"
RERANKER = "tte-mini-reranker"
NAMES = ("tte-mini-vl", "tte-mini-reranker")


def path_of(name: str) -> Path:
    """Directory of the built-in model `name`.

    Raises NotFoundError when there is no built-in model of that name, or when its weights are not
    in this installation (a source checkout without its large files, say).
    """
    if name not in NAMES:
        raise NotFoundError(
            f"No built-in model is called {name!r}; the built-in models are {', '.join(NAMES)}. "
            "For another model, give the path of its directory.",
            reason="MODEL_NOT_FOUND",
            model=name,
        )
    path = WEIGHTS_DIR / name
    if not (path / "config.json").is_file():
        raise NotFoundError(
            f"The built-in model {name} is not in this installation: {path} has no config.json. "
            "Install the package again, or give the path of another model directory.",
            reason="MODEL_NOT_FOUND",
            model=name,
        )
    return path


def resolve(model: str) -> Path:
    """The directory that `model` means: a built-in name, or a path with a `config.json` in it.

    Raises NotFoundError for anything else.
    """
    if model in NAMES:
        return path_of(model)
    path = Path(model).expanduser()
    if not path.is_dir():
        raise NotFoundError(
            f"{model} is neither a directory nor a built-in model ({', '.join(NAMES)}).",
            reason="MODEL_NOT_FOUND",
            model=model,
        )
    if not (path / "config.json").is_file():
        raise NotFoundError(
            f"{model} is not a model directory: it has no config.json. Expected the files of a "
            "Hugging Face model (config.json, *.safetensors, tokenizer.json).",
            reason="MODEL_NOT_FOUND",
            model=model,
        )
    return path
