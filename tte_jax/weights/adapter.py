"""PEFT adapters: LoRA and DoRA directories, merged into a model's weights.

An adapter gives some linear layers W [out, in] two thin matrices A [r, in] and B [out, r]:

    LoRA   W' = W + s B A                    s = alpha / r, or alpha / sqrt(r) (rsLoRA)
    DoRA   W' = m (W + s B A) / ‖W + s B A‖  norm and m for each output

(Hu et al. 2021, arXiv:2106.09685; Liu et al. 2024, arXiv:2402.09353.) Sums are in float32, the
result has the dtype of W. Strict both ways, as `tte_jax.weights.hf`: every tensor must belong to a
layer that `target_modules` names, every such layer must have its tensors, and what this module does
not compute is refused; all problems are reported together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy before safetensors reads it)
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tte_jax.errors import DataLossError, NotFoundError, PreconditionError, UnsupportedError
from tte_jax.models.config import ModelConfig
from tte_jax.weights.table import Entry, entries

Change = Callable[[Entry, jax.Array], jax.Array]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_USED = {
    "alpha_pattern",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
}
# These say how the adapter was made or runs, not what it computes.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Other starts (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base weights as well.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_TENSOR = re.compile(
    r"^base_model\.model\.(?P<module>.+)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|base_layer\.weight|lora_magnitude_vector)"
    r"(?:\.weight)?$"
)
# Names of a module at the time of training: with transformers 4 and 5, under the whole model or
# under the one without a head. (prefix of the text decoder, of the vision tower)
_STYLES = (
    ("model.", "visual."),
    ("model.language_model.", "model.visual."),
    ("", "visual."),
    ("language_model.", "visual."),
)


@dataclass(frozen=True)
class Adapter:
    """An adapter directory in memory.

    Attributes:
      directory: where it was read; for messages.
      config: `adapter_config.json`.
      tensors: `adapter_model.safetensors`, names and dtypes as in the file.
    """

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]

    def scale(self, module: str) -> float:
        """s of the module, by its name in the adapter's file."""
        rank, alpha = self.rank(module), self._of(module, "alpha_pattern", "lora_alpha")
        return alpha / sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def rank(self, module: str) -> int:
        return int(self._of(module, "rank_pattern", "r"))

    def targets(self, module: str) -> bool:
        """Whether the configuration means the module; PEFT's rules."""
        if _matches(self.config.get("exclude_modules"), module):
            return False
        wanted = self.config.get("target_modules")
        if wanted == "all-linear":
            return module != "lm_head"
        if not _matches(wanted, module):
            return False
        layers = self.config.get("layers_to_transform")
        if isinstance(wanted, str) or layers is None or layers == []:
            return True
        patterns = self.config.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
                return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
        return False

    def _of(self, module: str, patterns: str, default: str) -> float:
        for pattern, value in (self.config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return self.config[default]


@dataclass(frozen=True)
class _Delta:
    """What an adapter does to one layer; the matrices are transposed, as our weights are.

    Attributes:
      a: [in, r]; b: [r, out]; magnitude: [out] of DoRA.
      base: [in, out], takes the place of the model's own weight; PEFT saves that of a head.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None
    base: np.ndarray | None

    def __call__(self, weight: np.ndarray) -> np.ndarray:
        """[in, out] float32 → the same with the adapter."""
        merged = (weight if self.base is None else self.base) + self.scale * (self.a @ self.b)
        if self.magnitude is None:
            return merged
        return merged * (self.magnitude / np.linalg.norm(merged, axis=0))


def is_adapter(directory: str | Path) -> bool:
    """Whether the directory holds an adapter instead of a whole model."""
    directory = Path(directory)
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def read(directory: str | Path) -> Adapter:
    """Read an adapter directory.

    Raises:
      NotFoundError: configuration or weights missing.
      PreconditionError: settings that would be computed wrongly (all named).
      DataLossError: a file that cannot be read.
    """
    directory = Path(directory)
    _require(directory, WEIGHTS)
    config = settings(directory)
    if problems := _setting_problems(config):
        raise _refused(directory, "cannot be merged", problems)
    try:
        return Adapter(directory, config, load_file(directory / WEIGHTS))
    except SafetensorError as e:
        raise _damaged(directory / WEIGHTS, e) from e


def settings(directory: str | Path) -> dict[str, Any]:
    """`adapter_config.json`, unchecked.

    Raises:
      NotFoundError: it is not there.
      DataLossError: it is not JSON, or no object.
    """
    path = Path(directory) / CONFIG
    _require(path.parent, CONFIG)
    try:
        found = json.loads(path.read_text())
    except ValueError as e:
        raise _damaged(path, e) from e
    if not isinstance(found, dict):
        raise _damaged(path, TypeError(f"an object is expected, not {type(found).__name__}"))
    return found


def save(adapter: Adapter, directory: str | Path) -> Path:
    """Write the adapter as PEFT does, values and names unchanged."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(adapter.tensors), directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")
    return directory


def changes(config: ModelConfig, adapter: Adapter) -> Change:
    """What merging does to each parameter while it is read; dtype and sharding stay.

    Raises:
      PreconditionError: the adapter does not fit the model (all problems named).
    The change itself raises UnsupportedError when a parameter lies on devices of several processes.
    """
    deltas = _deltas(config, adapter)

    def change(entry: Entry, value: jax.Array) -> jax.Array:
        layers = [deltas.get(name) for name in _modules(entry, config)]
        if not any(layers):
            return value
        if not value.is_fully_addressable:
            raise UnsupportedError(
                "An adapter is merged in one process. Merge it into its base first"
                " (`tte convert --adapter`), then load the result.",
                reason="ADAPTER_MULTI_PROCESS",
            )
        return _merged(entry, value, layers)

    return change


def _merged(entry: Entry, value: jax.Array, layers: list[_Delta | None]) -> jax.Array:
    host = np.array(value)
    for layer, delta in zip(host if entry.stacked else [host], layers, strict=True):
        if delta is not None:
            matrix = layer.reshape(prod(layer.shape[: entry.inputs]), -1).astype(np.float32)
            layer[...] = delta(matrix).reshape(layer.shape).astype(host.dtype)
    return jax.device_put(host, value.sharding)


def _modules(entry: Entry, config: ModelConfig) -> list[str]:
    """Module names in the table's style, one per layer."""
    module = entry.name.removesuffix(".weight")
    if not entry.stacked:
        return [module]
    vision = entry.path.startswith("visual.")
    count = config.vision.depth if vision and config.vision else config.text.layers
    return [module.format(l=i) for i in range(count)]


def _deltas(config: ModelConfig, adapter: Adapter) -> dict[str, _Delta]:
    """Module name in the table's style → what is done to it."""
    linear = {m: e for e in entries(config) if e.inputs for m in _modules(e, config)}
    parts: dict[str, dict[str, np.ndarray]] = {}
    problems: list[str] = []
    for key, tensor in adapter.tensors.items():
        if found := _TENSOR.match(key):
            parts.setdefault(found["module"], {})[found["part"]] = tensor
        else:
            problems.append(f"unexpected: {key} {list(tensor.shape)}")
    # The style that explains most names; adapters of one run have one.
    styled = [{_styled(m, style): m for m in linear} for style in _STYLES]
    names = max(styled, key=lambda style: len(style.keys() & parts.keys()))
    dora = bool(adapter.config.get("use_dora"))
    needed = ["lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if dora else [])]
    deltas: dict[str, _Delta] = {}
    for name, tensors in parts.items():
        if name not in names:
            problems.append(f"unexpected: {name} is no linear layer of this model")
            continue
        if not adapter.targets(name):
            problems.append(f"unexpected: {name} is not among the target_modules")
        shape, rank = linear[names[name]].hf_shape, adapter.rank(name)
        shapes = {
            "lora_A.weight": (rank, *shape[1:]),
            "lora_B.weight": (shape[0], rank, *(1 for _ in shape[2:])),
            "lora_magnitude_vector": (shape[0],),
            "base_layer.weight": shape,
        }
        wrong = _part_problems(name, tensors, needed, shapes)
        problems += wrong
        if not wrong:
            exact = {part: tensor.astype(np.float32) for part, tensor in tensors.items()}
            base = exact.get("base_layer.weight")
            deltas[names[name]] = _Delta(
                a=exact["lora_A.weight"].reshape(rank, -1).T,
                b=exact["lora_B.weight"].reshape(-1, rank).T,
                scale=adapter.scale(name),
                magnitude=exact["lora_magnitude_vector"].reshape(-1) if dora else None,
                base=None if base is None else base.reshape(shape[0], -1).T,
            )
    problems += [
        f"missing: {name} is among the target_modules and has no tensors"
        for name in names
        if adapter.targets(name) and name not in parts
    ]
    if config.text.tied and "lm_head" in parts:
        problems.append("lm_head: this model's head is its embedding table, which would change too")
    if problems:
        raise _refused(adapter.directory, f"does not fit the {config.model_type} model", problems)
    return deltas


def _part_problems(
    name: str,
    tensors: dict[str, np.ndarray],
    needed: list[str],
    shapes: dict[str, tuple[int, ...]],
) -> list[str]:
    problems = [f"missing: {name}.{part}" for part in needed if part not in tensors]
    for part, tensor in tensors.items():
        if part not in (*needed, "base_layer.weight"):
            problems.append(f"unexpected: {name}.{part} (use_dora is not set)")
            continue
        # A convolution's magnitudes are stored as [1, out, 1, ...].
        vector = part == "lora_magnitude_vector"
        got = (tensor.size,) if vector else tuple(tensor.shape)
        if got != shapes[part]:
            problems.append(
                f"shape: {name}.{part} is {list(tensor.shape)}, expected {list(shapes[part])}"
            )
    return problems


def _styled(module: str, style: tuple[str, str]) -> str:
    text, vision = style
    if module.startswith("visual."):
        return vision + module.removeprefix("visual.")
    return text + module.removeprefix("model.") if module.startswith("model.") else module


def _matches(patterns: Any, module: str) -> bool:
    if not patterns:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(module == one or module.endswith(f".{one}") for one in patterns)


def _setting_problems(config: dict[str, Any]) -> list[str]:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}; only 'LORA' (and its DoRA)")
    checks: dict[str, Callable[[Any], bool]] = {
        "r": lambda x: isinstance(x, int) and x > 0,
        "lora_alpha": lambda x: isinstance(x, int | float) and x > 0,
        "target_modules": lambda x: bool(x) and isinstance(x, str | list),
    }
    problems += [f"{k} is {config.get(k)!r}" for k, ok in checks.items() if not ok(config.get(k))]
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}; trained biases are not read, only 'none'")
    if config.get("init_lora_weights") not in _STARTS:
        problems.append(
            f"init_lora_weights is {config['init_lora_weights']!r}, which changed the base weights;"
            " save the adapter as plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    known = _USED | _HARMLESS | {"peft_type", "bias", "init_lora_weights"}
    # What PEFT adds to its settings later is off when it is false or empty.
    problems += [f"{k} is {v!r}" for k, v in config.items() if k not in known and v]
    return sorted(problems)


def _require(directory: Path, name: str) -> None:
    if not (directory / name).is_file():
        raise NotFoundError(
            f"No {name} in {str(directory)!r}. A PEFT adapter needs {CONFIG} and {WEIGHTS}; an"
            " adapter_model.bin must be saved as safetensors first.",
            reason="ADAPTER_NOT_FOUND",
        )


def _damaged(path: Path, error: Exception) -> DataLossError:
    return DataLossError(
        f"{str(path)!r} is damaged ({error}). Download the adapter again.",
        reason="ADAPTER_DAMAGED",
    )


def _refused(directory: Path, what: str, problems: list[str]) -> PreconditionError:
    return PreconditionError(
        f"The adapter in {str(directory)!r} {what} ({len(problems)} problems):\n  "
        + "\n  ".join(sorted(problems)),
        reason="ADAPTER_MISMATCH",
        problems=len(problems),
    )
