"""Open a checkpoint folder: its config, its headers, its tokenizer's ids. No tensor data is read here.

Problems are collected, not raised one by one: a plan reports everything that is wrong with three models at once.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from c2f_utils.errors import C2FError
from c2f_utils.files import UNPARSABLE, too_deep
from c2f_utils.merge.headers import TensorInfo, read_header
from c2f_utils.weights import INDEX, SINGLE, is_shard

_UNSAFE = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "consolidated.00.pth")


@dataclass
class Checkpoint:
    """Headers and configs of one model folder; `tensors` in file order; `stamps` tell an overwrite between plan and
    run.
    """

    label: str
    folder: Path
    config: dict = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    headers: dict[Path, bytes] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    stamps: dict[str, str] = field(default_factory=dict)
    sharded: bool = False

    @property
    def tied(self) -> bool | None:
        return self.config.get("tie_word_embeddings")


def open_checkpoint(label: str, folder: Path, problems: list[str]) -> Checkpoint:
    """Read config, index and headers of a full model; what is wrong is appended to `problems`."""
    model = Checkpoint(label, folder)
    model.config = read_config(label, folder / "config.json", model, problems)
    if model.config.get("quantization_config"):
        problems.append(f"{label}: {folder} is quantised; merge the full-precision weights and quantise the result")
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        problems.append(
            f"{label}: {folder} holds both {SINGLE} and {INDEX}; one is stale: remove it (loaders disagree "
            f"on which counts)"
        )
    elif single.exists():
        _add_file(model, single, problems)
    elif index.exists():
        model.sharded = True
        _add_shards(model, index, problems)
    else:
        unsafe = [name for name in _UNSAFE if (folder / name).exists()]
        hint = (
            f"; {unsafe[0]} is a pickle: save it again with safe_serialization=True"
            if unsafe
            else "; save a model there first"
        )
        problems.append(f"{label}: {folder} holds neither {SINGLE} nor {INDEX}{hint}")
    return model


def read_config(label: str, path: Path, model: Checkpoint, problems: list[str]) -> dict:
    """Read a JSON object and stamp it; problems name the file."""
    try:
        raw = path.read_bytes()
        config = json.loads(raw)
        if not isinstance(config, dict) or too_deep(config):
            raise ValueError("not a JSON object of reasonable depth")
    except FileNotFoundError:
        problems.append(f"{label}: {path} does not exist; copy it from the model's source")
        return {}
    except OSError as error:
        problems.append(f"{label}: {path} cannot be read ({error.strerror})")
        return {}
    except UNPARSABLE as error:
        problems.append(f"{label}: {path} is damaged ({error}); copy it again from the model's source")
        return {}
    model.stamps[f"{label}/{path.name}"] = hashlib.sha256(raw).hexdigest()
    return config


def _add_file(model: Checkpoint, path: Path, problems: list[str]) -> dict[str, TensorInfo]:
    try:
        header = read_header(path)
    except C2FError as error:
        problems.append(f"{model.label}: {error}")
        return {}
    for name in header.tensors:
        if name in model.tensors:
            problems.append(
                f"{model.label}: tensor {name!r} is in both {model.tensors[name].file.name} and "
                f"{path.name}; save the model again"
            )
    ordered = dict(sorted(header.tensors.items(), key=lambda item: item[1].offset))
    model.tensors.update(ordered)
    model.headers[path] = header.raw
    model.metadata = model.metadata or header.metadata
    model.stamps[f"{model.label}/{path.name}"] = stamp(path, header.digest)
    return ordered


def stamp(path: Path, digest: str) -> str:
    """Text that changes when a weight file is overwritten, without reading the weights."""
    stat = os.stat(path)
    return f"{stat.st_size}:{stat.st_mtime_ns}:{digest}"


def _add_shards(model: Checkpoint, index: Path, problems: list[str]) -> None:
    where = f"{model.label}: {index}"
    try:
        raw = index.read_bytes()
        weight_map = json.loads(raw)["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("weight_map is not a filled object")
    except (OSError, KeyError, TypeError, *UNPARSABLE) as error:
        problems.append(f"{where} is damaged ({type(error).__name__}: {error}); copy it again from the model's source")
        return
    model.stamps[f"{model.label}/{index.name}"] = hashlib.sha256(raw).hexdigest()
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not is_shard(file):
            problems.append(
                f"{where}: tensor {name!r} is said to be in {file!r}, expected a plain file name in the "
                f"same folder that ends in .safetensors; save it again"
            )
            continue
        shards.setdefault(file, set()).add(name)
    for file, names in sorted(shards.items()):
        path = index.parent / file
        if not path.exists():
            problems.append(
                f"{where}: shard {file} is missing ({len(names)} tensors, first {min(names)!r}); download or copy it"
            )
            continue
        before = len(problems)
        found = _add_file(model, path, problems)
        if len(problems) > before:
            continue
        for name in sorted(names - set(found)):
            problems.append(
                f"{where}: tensor {name!r} is said to be in {file}, which does not hold it; save the model again"
            )
        for name in sorted(set(found) - names):
            problems.append(
                f"{where}: {file} holds tensor {name!r}, which the index does not place there; save the model again"
            )


def token_ids(folder: Path) -> dict[str, int] | None:
    """Give the tokenizer's token -> id table, or None when the folder has no `tokenizer.json` that says it."""
    path = folder / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocab = content["model"]["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {entry[0]: position for position, entry in enumerate(vocab)}
        ids.update({token["content"]: token["id"] for token in content.get("added_tokens", [])})
        return ids
    except (OSError, LookupError, TypeError, AttributeError, *UNPARSABLE):
        return None
