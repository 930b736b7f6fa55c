"""Open the inputs and give their tensors the instruct model's names.

Here adapters, wrappers' prefixes, tied heads, missing and extra tensors are dealt with.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from c2f_utils.errors import C2FError
from c2f_utils.merge import lora, names
from c2f_utils.merge.checkpoint import Checkpoint, open_checkpoint
from c2f_utils.merge.compatibility import compare_configs, compare_tokenizers
from c2f_utils.merge.headers import Same
from c2f_utils.merge.readers import Source
from c2f_utils.merge.recipe import Recipe
from c2f_utils.weights import ADAPTER, locate

_PREFIXES = ("model.", "module.", "_orig_mod.", "base_model.model.", "transformer.")


@dataclass
class Input:
    """One input with its tensors under the instruct model's names."""

    checkpoint: Checkpoint  # headers and configs; for an adapter those of its base
    folder: Path
    sources: dict[str, Source] = field(default_factory=dict)
    same: tuple[Same, ...] = ()


def open_inputs(
    recipe: Recipe, found: list[str], notes: list[str], stamps: dict[str, str], stamped: dict[str, Path]
) -> dict[str, Input]:
    wanted = {"base": recipe.base, "instruct": recipe.instruct}
    wanted |= {f"coarse.{k}": weighted.path for k, weighted in enumerate(recipe.coarse_models)}
    folders = {}
    for role, source in wanted.items():
        try:
            folders[role] = locate(source, role)
        except C2FError as error:  # the other models are still to be looked at
            found.append(str(error))
    seen: dict[Path, str] = {}
    for role, folder in folders.items():
        other = seen.setdefault(folder.resolve(), role)
        if other != role and {other, role} != {"base", "instruct"}:
            found.append(
                f"{role} and {other} are the same folder {folder}; the residue would be zero or counted "
                f"twice: name another model"
            )
    models: dict[str, Input] = {}
    for role in ("base", *(role for role in folders if role != "base")):
        if role not in folders:
            continue
        folder = folders[role]
        if lora.is_adapter(folder):
            if role == "base":
                found.append(f"base: {folder} is an adapter; name the full model it was trained on")
            elif "base" in models:
                models[role] = _adapted(role, folder, models["base"].checkpoint, found, notes, stamps, stamped)
            continue
        checkpoint = open_checkpoint(role, folder, found)
        models[role] = Input(checkpoint, folder, {name: Source(info) for name, info in checkpoint.tensors.items()})
        stamps.update(checkpoint.stamps)
        stamped.update({f"{role}/{path.name}": path for path in checkpoint.headers})
    if not found:
        for role, model in models.items():
            if role != "instruct":
                compare_configs(
                    models["instruct"].checkpoint, replace(model.checkpoint, label=role), recipe.allow, found, notes
                )
                compare_tokenizers(
                    replace(models["instruct"].checkpoint, folder=models["instruct"].folder),
                    replace(model.checkpoint, label=role, folder=model.folder),
                    found,
                    notes,
                )
    return models


def _adapted(
    role: str,
    folder: Path,
    base: Checkpoint,
    found: list[str],
    notes: list[str],
    stamps: dict[str, str],
    stamped: dict[str, Path],
) -> Input:
    shell = Checkpoint(role, folder)
    adapter = lora.open_adapter(shell, base, found, notes)
    stamps.update(shell.stamps)
    stamped.update({f"{role}/{ADAPTER}": folder / ADAPTER})
    sources = {name: Source(info, adapter.deltas.get(name)) for name, info in base.tensors.items()}
    sources.update({name: Source(info) for name, info in adapter.replaced.items()})
    return Input(replace(base, label=role), folder, sources, adapter.same)


def _embedding(tensors: dict) -> str | None:
    return next(
        (
            name
            for name in tensors
            if re.search(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings)\.weight$", name)
        ),
        None,
    )


def _head(tensors: dict) -> str | None:
    return next((name for name in tensors if re.search(r"(?:^|\.)(?:lm_head|embed_out)\.weight$", name)), None)


def drop_second_head(model: Input, equal: list[Same], notes: list[str]) -> dict[str, Source]:
    """A tied model that stores its head twice is written once, after a check that both are the same."""
    head, embedding = _head(model.sources), _embedding(model.sources)
    if model.checkpoint.tied is True and head and embedding:
        remedy = "set tie_word_embeddings to false in its config.json to keep a separate head, or remove the head"
        equal.append(Same(model.sources[head].info, model.sources[embedding].info, remedy))
        notes.append(f"{model.checkpoint.label} ties its head and stores it twice; it is treated once")
        return {name: source for name, source in model.sources.items() if name != head}
    return dict(model.sources)


def align_all(
    models: dict[str, Input], ignore: tuple[str, ...], equal: list[Same], found: list[str], notes: list[str]
) -> dict[str, dict[str, Source]]:
    """Every model's sources by role, all under instruct's names."""
    kept = drop_second_head(models["instruct"], equal, notes)
    others = {role: model for role, model in models.items() if role != "instruct"}
    return {"instruct": kept} | {
        role: align(role, model, kept, ignore, equal, found, notes) for role, model in others.items()
    }


def align(
    role: str,
    model: Input,
    kept: dict[str, Source],
    ignore: tuple[str, ...],
    equal: list[Same],
    found: list[str],
    notes: list[str],
) -> dict[str, Source]:
    """Give the model's sources under instruct's names; missing and extra tensors are problems."""
    equal += model.same
    sources = drop_second_head(model, equal, notes)
    sources = {
        name: source for name, source in sources.items() if not any(re.search(pattern, name) for pattern in ignore)
    }
    sources = _rename(role, sources, kept, notes)
    head, embedding = _head(kept), _embedding(sources)
    if head and head not in sources and embedding and not _head(sources):
        if model.checkpoint.tied is False:
            found.append(
                f"{role}: {model.folder} says its head is not tied, but stores no {head!r}; save it with its head"
            )
            return sources
        sources[head] = sources[embedding]
        notes.append(f"{role} ties its head; its embedding stands for {head!r}")
    missing = [name for name in kept if name not in sources and not names.is_buffer(name)]
    if missing:
        found.append(
            f"{role}: {model.folder} lacks {len(missing)} tensors of instruct, first {missing[0]!r}; use a "
            f"model of the same architecture"
        )
    for name in kept:
        if names.is_buffer(name) and name not in sources:
            sources[name] = kept[name]  # a table that old versions stored; the output keeps instruct's
    extra = [name for name in sources if name not in kept and not names.is_buffer(name)]
    if extra:
        untied = _head(sources) in extra if _head(sources) else False
        hint = (
            "instruct ties its head: untie it, or leave this head out with"
            if untied
            else "its residue would be lost: leave it out on purpose with"
        )
        found.append(
            f"{role}: {model.folder} has {len(extra)} tensors that instruct lacks, first {extra[0]!r}; "
            f"{hint} ignore: ['{re.escape(extra[0])}']"
        )
    return sources


def _rename(role: str, sources: dict[str, Source], kept: dict[str, Source], notes: list[str]) -> dict[str, Source]:
    """Wrappers and headless saves prefix names; take the prefix change under which most names agree."""
    best, best_count, how = sources, sum(name in kept for name in sources), ""
    for prefix in _PREFIXES:
        for how_now, change in (
            (f"without {prefix!r}", lambda n, p=prefix: n.removeprefix(p)),
            (f"with {prefix!r}", lambda n, p=prefix: p + n),
        ):
            renamed = {(name if name in kept else change(name)): source for name, source in sources.items()}
            count = sum(name in kept for name in renamed)
            if len(renamed) == len(sources) and count > best_count:
                best, best_count, how = renamed, count, how_now
    if how:
        notes.append(f"{role}: names are taken {how}")
    return best
