"""The same merge into memory, for sweeps that merge one trio again and again, and the random-residue control.

Kernels, statistics and rounding are those of the stream, on the same blocks or, on a GPU, on larger pieces: on the CPU
values are bit for bit those of `run_merge`. One tensor at a time exists beside the models, so that a merge can be
written straight into a model, on its device.
"""

import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from c2f_utils.errors import problems
from c2f_utils.merge import gather, names, random_bits, ranges
from c2f_utils.merge.compute import merge_block, take_block
from c2f_utils.merge.headers import ITEM_BYTES
from c2f_utils.merge.kernels import BLOCK, Statistics
from c2f_utils.merge.operators import resolve
from c2f_utils.merge.plan import Placement, Plan, Segment, kind_of, roles_read, stored_as
from c2f_utils.merge.readers import Workspace
from c2f_utils.merge.recipe import Recipe
from c2f_utils.merge.rounding import TORCH, inner
from c2f_utils.merge.stored import Held, Lazy, Stored
from c2f_utils.merge.workers import Workers

StateDict = Mapping[str, Tensor]
_CODES = {dtype: code for code, dtype in TORCH.items()}
_READ_AT_ONCE = 8  # blocks
_ON_DEVICE = 1 << 24  # elements of a piece on a GPU: enough to keep it busy, 64 MiB in float32
_AT_ONCE = 4  # pieces at most that are on a GPU: reading them from the disk takes longest


def merge_state_dicts(
    recipe: Recipe, base: StateDict, instruct: StateDict, coarse: StateDict | Sequence[StateDict]
) -> dict[str, Tensor]:
    """Merge state dicts on the CPU; the recipe's paths are not looked at, its weights are.

    Returns instruct's tensors (new ones, contiguous, tied ones still shared) with merged values. Raises C2FError as
    `Merger` does.
    """
    merger = Merger(base, instruct, coarse)
    merged = dict(merger.tensors(recipe))
    return {name: merged[owner] for name, owner in merger.owner.items()}


class Merger:
    """Merges one base, instruct and coarse again and again; models are state dicts, of which `Stored` ones are read
    as needed.

    What an operator must know of whole tensors is found once and kept. Raises C2FError listing every tensor that is
    missing or differs in shape.
    """

    def __init__(
        self,
        base: StateDict,
        instruct: StateDict,
        coarse: StateDict | Sequence[StateDict],
        device: torch.device | str = "cpu",
    ) -> None:
        several = [coarse] if isinstance(coarse, Mapping) else list(coarse)
        self.models = {"instruct": instruct, "base": base, **{f"coarse.{k}": one for k, one in enumerate(several)}}
        self.device = torch.device(device)
        self.owner = _owners(instruct)
        self._known: dict[str, dict[str, Statistics]] = {}
        self._refuse_misfits()

    def tensors(self, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
        """Merged tensors by instruct's names, new ones on the device, one after another; of tied ones the embedding.

        Raises C2FError for tensors without a place in the network, NaN, infinity and overflow.
        """
        plan = Plan(recipe, *resolve(recipe.operator))
        placements = self._placed(plan)
        threads = torch.get_num_threads()
        with Workers(threads if self.device.type == "cpu" else min(threads, _AT_ONCE)) as workers:
            statistics = self._statistics(plan, placements, workers)
            filling: deque[tuple[Placement, Tensor, bool]] = deque()

            def pieces() -> Iterator[tuple[Placement, Tensor, int, int]]:
                for placement in placements:
                    out = torch.empty(placement.numel, dtype=TORCH[placement.dtype], device=self.device)
                    for low, high in self._cut(placement):
                        filling.append((placement, out, high == placement.numel))
                        yield placement, out, low, high

            def fill(piece: tuple[Placement, Tensor, int, int], workspace: Workspace) -> None:
                placement, out, start, stop = piece
                roles = roles_read(plan, placement.action, self.models)
                loaded = self._held(placement.name).load(start, stop, workspace, roles).to(self.device)
                for low, high in self._blocks(placement, start, stop):
                    part = out[low:high]
                    if placement.action == "merge":
                        merge_block(plan, placement, loaded, part, low, high, statistics.get(placement.name))
                    else:
                        take_block(plan, placement, loaded, roles[-1], part, low, high)

            for _ in workers.map(fill, pieces()):
                placement, out, last = filling.popleft()
                if last:
                    yield placement.name, out.view(placement.shape)

    def _placed(self, plan: Plan) -> list[Placement]:
        """What each tensor becomes; raises C2FError for coefficients that are unknown or mean nothing."""
        recipe, found, placements = plan.recipe, [], []
        if len(self.models) - 2 != len(recipe.coarse_models):
            count = len(self.models) - 2
            found.append(f"{count} coarse state dicts for a recipe with {len(recipe.coarse_models)}; give one each")
        layers = names.layer_count(self.owner)
        for name in dict.fromkeys(self.owner.values()):
            shape, code = _shape(self.models["instruct"], name), _code(self.models["instruct"], name)
            constant = not TORCH[code].is_floating_point or names.is_buffer(name)
            c = 0.0 if constant else recipe.coefficient.at(name, layers)
            if c is None:
                found.append(
                    f"{name!r}: nothing says where in the network it is; give its coefficient with a rule that sets it"
                )
            elif c < 0 and not plan.operator.negative:
                found.append(
                    f"{name!r}: coefficient {c} is negative, which {plan.operator.name} cannot vote with; use 0 or more"
                )
            else:
                code = code if constant else stored_as(recipe, code)
                count, kind = math.prod(shape), "instruct" if constant else kind_of(plan, c)
                whole = kind == "merge" and plan.operator.matrix and len(shape) == 2
                segments, nbytes = (Segment(kind, 0, count),), count * ITEM_BYTES[code]
                placements.append(Placement(name, shape, code, c, {}, segments, "the merge", 0, nbytes, whole))
        if found:
            raise problems("the models cannot be merged:", found)
        return placements

    def _statistics(self, plan: Plan, placements: list[Placement], workers: Workers) -> dict[str, Statistics]:
        """By tensor; no coefficient changes them, so a sweep finds them once."""
        if not plan.operator.statistics:
            return {}
        wanted = [placement for placement in placements if placement.action == "merge" and placement.numel]
        together = [p.name for p in wanted] if plan.options.get("scope") == "global" else []
        key = json.dumps([plan.operator.name, plan.options, plan.recipe.seed, together], sort_keys=True)
        known = self._known.setdefault(key, {})
        new = [ranges.Target(p.name, self._held(p.name), p.numel) for p in wanted if p.name not in known]
        if new:
            coarse, seed = len(plan.recipe.coarse_models), plan.recipe.seed
            found = gather.gather(plan.operator, plan.options, new, coarse, seed, self._step, workers)
            known.update({target.name: statistics for target, statistics in zip(new, found, strict=True)})
        return known

    def _held(self, name: str) -> Held:
        return Held(name, self.models)

    @property
    def _step(self) -> int:
        return _READ_AT_ONCE * ranges.BLOCK if self.device.type == "cpu" else _ON_DEVICE

    def _cut(self, placement: Placement) -> list[tuple[int, int]]:
        whole = placement.rank_two or not placement.numel
        return [(0, placement.numel)] if whole else list(ranges.chunks(0, placement.numel, self._step))

    def _blocks(self, placement: Placement, start: int, stop: int) -> list[tuple[int, int]]:
        whole = placement.rank_two or self.device.type != "cpu"
        return [(start, stop)] if whole else list(ranges.blocks(start, stop))

    def _refuse_misfits(self) -> None:
        found, instruct = [], self.models["instruct"]
        for role, model in self.models.items():
            if missing := [name for name in instruct if name not in model]:
                found.append(
                    f"{role} lacks {len(missing)} tensors of instruct, first {missing[0]!r}; use models of the "
                    "same architecture"
                )
            for name in instruct:
                if name in model and _shape(model, name) != (shape := _shape(instruct, name)):
                    found.append(
                        f"{name!r}: shape {list(shape)} in instruct, {list(_shape(model, name))} in {role}; use "
                        "models of the same size"
                    )
        if found:
            raise problems("the models cannot be merged:", found)


def _shape(model: StateDict, name: str) -> tuple[int, ...]:
    return model.shape(name) if isinstance(model, Lazy) else tuple(model[name].shape)


def _code(model: StateDict, name: str) -> str:
    return model.sources[name].info.dtype if isinstance(model, Stored) else _CODES.get(model[name].dtype, "F32")


def _owners(tensors: StateDict) -> dict[str, str]:
    """Give for every tensor the name under which it is merged: of tied ones the embedding's, as when stored."""
    if isinstance(tensors, Lazy):  # nothing in memory, so nothing shared
        return {name: name for name in tensors}
    groups: dict[tuple, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.data_ptr(), tensor.shape) if tensor.numel() else (name,), []).append(name)
    first = [min(group, key=lambda name: (names.family_of(name) != "embedding", name)) for group in groups.values()]
    owners = {name: owner for owner, group in zip(first, groups.values(), strict=True) for name in group}
    return {name: owners[name] for name in tensors}


def random_residue(base: StateDict, coarse: StateDict, seed: int = 0) -> StateDict:
    """Give base plus Gaussian noise with, tensor by tensor, the norm of the coarse residue: the control for "any
    residue would do".

    Made when asked for. Constants are those of coarse. The noise depends on seed and tensor name only, tied tensors
    get the same.
    """
    owner = _owners(coarse)

    def make(name: str) -> Tensor:
        tensor = coarse[name]
        if not tensor.is_floating_point() or names.is_buffer(name) or not tensor.numel():
            return tensor.detach().clone()
        start = base[name].detach().float().reshape(-1)
        norm = math.sqrt(_square(tensor.detach().float().reshape(-1) - start))
        noise = torch.from_numpy(random_bits.normal(seed, f"{owner[name]}|random_residue", start.numel()))
        scale = norm / math.sqrt(_square(noise))
        return (start + scale * noise).to(tensor.dtype).view(tensor.shape)

    return Lazy(coarse, make)


def _square(flat: Tensor) -> float:
    return math.fsum(inner(part, part) for part in flat.split(BLOCK))
