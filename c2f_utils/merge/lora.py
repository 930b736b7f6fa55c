"""Read a PEFT LoRA adapter as a set of changes to its base, without ever building the full model.

W = W_base + scale * B A, with scale = alpha / r, or alpha / sqrt(r) with rank stabilisation (rsLoRA); rank and alpha
patterns and modules_to_save are honoured. What cannot be written as such a change (DoRA, biases, adapters that
changed their base) is refused.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from c2f_utils.errors import C2FError
from c2f_utils.merge.checkpoint import Checkpoint, read_config, stamp
from c2f_utils.merge.headers import Same, TensorInfo, read_header
from c2f_utils.weights import ADAPTER, ADAPTER_CONFIG, INDEX, SINGLE

_REFUSED = {
    "use_dora": "DoRA rescales rows by norms of the merged weight, which is no added change",
    "lora_bias": "a bias of the low-rank path has no place in the merged weight",
    "layer_replication": "replicated layers change the architecture",
    "trainable_token_indices": "single trained tokens are stored in another form",
    "target_parameters": "adapters on bare parameters are not supported",
    "alora_invocation_tokens": "an activated LoRA works only after its invocation tokens, so it cannot be merged",
    "use_qalora": "a quantisation-aware adapter is not a change of full weights",
    "use_bdlora": "block-diagonal factors are not supported",
    "velora_config": "compressed activations are not supported",
    "arrow_config": "a routed mixture of adapters cannot be merged",
    "kasa_config": "its factors need singular values of the base",
    "monteclora_config": "a random adapter cannot be merged",
    "megatron_config": "Megatron layers are not supported",
}
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?$")


@dataclass(frozen=True)
class Delta:
    """A low-rank change of one weight: scale * B A, `transposed` when the weight is stored [in, out]."""

    a: TensorInfo  # [r, in]
    b: TensorInfo  # [out, r]
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.transposed else (out, into)


@dataclass(frozen=True)
class Adapter:
    """Changes by weight name, and weights stored whole (modules_to_save)."""

    deltas: dict[str, Delta]
    replaced: dict[str, TensorInfo]
    same: tuple[Same, ...] = ()  # copies of base weights that PEFT stores beside adapted embeddings


def is_adapter(folder: Path) -> bool:
    """Say whether the folder holds an adapter and no full weights."""
    return (folder / ADAPTER_CONFIG).exists() and not any((folder / name).exists() for name in (SINGLE, INDEX))


def open_adapter(model: Checkpoint, base: Checkpoint, problems: list[str], notes: list[str]) -> Adapter:
    """Read an adapter's config and header against its base; what is wrong is appended to `problems`."""
    label, folder = model.label, model.folder
    config = read_config(label, folder / ADAPTER_CONFIG, model, problems)
    path = folder / ADAPTER
    if not path.exists():
        hint = (
            "; adapter_model.bin is a pickle: save it again with safe_serialization=True"
            if (folder / "adapter_model.bin").exists()
            else ""
        )
        problems.append(f"{label}: {path} does not exist{hint or '; save the adapter again'}")
        return Adapter({}, {})
    try:
        header = read_header(path)
    except C2FError as error:
        problems.append(f"{label}: {error}")
        return Adapter({}, {})
    model.stamps[f"{label}/{path.name}"] = stamp(path, header.digest)
    before = len(problems)
    _check_config(label, folder, config, problems)
    if any("lora_magnitude_vector" in name for name in header.tensors) and not config.get("use_dora"):
        problems.append(f"{label}: {path} holds DoRA magnitudes: {_REFUSED['use_dora']}; merge it with PEFT first")
    if len(problems) > before or not config:
        return Adapter({}, {})
    said = config.get("base_model_name_or_path")
    if said and Path(str(said)).name != base.folder.name:
        notes.append(
            f"{label}: the adapter says it was trained on {said}; it is applied to the recipe's base {base.folder.name}"
        )
    return _sort(label, path, header.tensors, config, base, problems)


def _check_config(label: str, folder: Path, config: dict, problems: list[str]) -> None:
    where = f"{label}: {folder / ADAPTER_CONFIG}"
    if config and config.get("peft_type") != "LORA":
        problems.append(
            f"{where}: peft_type {config.get('peft_type')!r} is not LORA; merge it with PEFT first and give "
            f"the full model"
        )
    for key, reason in _REFUSED.items():
        if config.get(key):
            problems.append(f"{where}: {key} is set: {reason}; merge it with PEFT first and give the full model")
    if config.get("bias", "none") != "none":
        problems.append(
            f"{where}: bias {config['bias']!r}: trained biases are stored apart; expected none: merge it "
            f"with PEFT first"
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGED_BASE):
        problems.append(
            f"{where}: init_lora_weights {start!r} changed the base weights; convert the adapter with "
            f"PEFT's save_pretrained first"
        )
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if config and (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or (key == "r" and value < 1)
        ):
            problems.append(f"{where}: {key} is {value!r}, expected a positive number; the adapter's config is damaged")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            problems.append(f"{where}: {key} is {config[key]!r}, expected a mapping; the adapter's config is damaged")


def _sort(
    label: str, path: Path, tensors: dict[str, TensorInfo], config: dict, base: Checkpoint, problems: list[str]
) -> Adapter:
    factors: dict[tuple[str, bool], dict[str, TensorInfo]] = {}
    replaced: dict[str, TensorInfo] = {}
    copies: list[tuple[str, TensorInfo]] = []
    for stored, info in tensors.items():
        found = _FACTOR.match(stored)
        if found:
            factors.setdefault((found["module"], bool(found["embedding"])), {})[found["side"]] = info
            continue
        name = _weight_name(stored.replace(".base_layer.", "."), base)
        if name is None:
            problems.append(
                f"{label}: {path}: tensor {stored!r} belongs to no tensor of the base; was the adapter "
                f"trained on another model?"
            )
        elif info.shape != base.tensors[name].shape:
            problems.append(
                f"{label}: {path}: {stored!r} has shape {info.shape}, the base {base.tensors[name].shape}; "
                f"it was trained on another model"
            )
        elif ".base_layer." in stored:
            copies.append((name, info))
        else:
            replaced[name] = info
    deltas = {}
    for (module, embedding), sides in factors.items():
        delta = _delta(label, path, module, embedding, sides, config, base, problems)
        if delta:
            deltas[delta[0]] = delta[1]
    if not deltas and not replaced and not problems:
        problems.append(f"{label}: {path} changes no weight; save the adapter again")
    for name, info in copies:
        if info.dtype != base.tensors[name].dtype:
            problems.append(
                f"{label}: {path}: holds its own {info.dtype} copy of {name!r}, the base has "
                f"{base.tensors[name].dtype}; save the adapter with save_embedding_layers=False"
            )
    remedy = "the adapter was trained on another base: name that one"
    return Adapter(deltas, replaced, tuple(Same(info, base.tensors[name], remedy) for name, info in copies))


def _delta(
    label: str,
    path: Path,
    module: str,
    embedding: bool,
    sides: dict[str, TensorInfo],
    config: dict,
    base: Checkpoint,
    problems: list[str],
) -> tuple[str, Delta] | None:
    where = f"{label}: {path}: {module}"
    if set(sides) != {"A", "B"}:
        problems.append(f"{where} has only lora_{next(iter(sides))}, expected A and B; save the adapter again")
        return None
    a, b = sides["A"], sides["B"]
    if (
        len(a.shape) != 2
        or len(b.shape) != 2
        or a.shape[0] != b.shape[1]
        or 0 in a.shape
        or not (a.is_float and b.is_float)
    ):
        problems.append(
            f"{where}: factors {a.shape} and {b.shape} do not fit [r, in] and [out, r]; only linear and "
            f"embedding layers are supported"
        )
        return None
    name = _weight_name(f"{module}.weight", base)
    if name is None:
        if base.tied is not False and module.endswith("lm_head"):
            problems.append(
                f"{where}: the base ties its head to the embedding, so a change of the head alone cannot be "
                f"stored; untie the base first"
            )
        else:
            problems.append(f"{where} is no module of the base; was the adapter trained on another model?")
        return None
    target = _plain(module)
    rank = _by_pattern(config.get("rank_pattern") or {}, target, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern") or {}, target, config["lora_alpha"])
    if rank != a.shape[0]:
        problems.append(
            f"{where}: the config gives rank {rank}, the factors have {a.shape[0]}; config and weights are "
            f"from different adapters"
        )
        return None
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    delta = Delta(a, b, scale, embedding or bool(config.get("fan_in_fan_out")))
    if delta.shape != base.tensors[name].shape:
        problems.append(
            f"{where}: the change has shape {delta.shape}, the base {base.tensors[name].shape}; it was "
            f"trained on another model"
        )
        return None
    return name, delta


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _weight_name(stored: str, base: Checkpoint) -> str | None:
    plain = _plain(stored)
    return next(
        (name for name in (plain, f"model.{plain}", plain.removeprefix("model.")) if name in base.tensors), None
    )


def _by_pattern(patterns: dict, target: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name, at a dot or as a whole."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", target)), default)
