"""The plan: what will be read, computed and written, decided from headers and configs alone.

Everything that can be wrong with three models is found here and reported together, before a byte of weights is read.
The output has the instruct model's tensors, names, shards and small files; only values (and, if asked, dtypes)
change.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from c2f_utils.errors import problems as error_of
from c2f_utils.merge import names
from c2f_utils.merge.aligned import Input, align_all, open_inputs
from c2f_utils.merge.checkpoint import Checkpoint
from c2f_utils.merge.companions import CODE, companions
from c2f_utils.merge.headers import ITEM_BYTES, Same, TensorInfo, build_header
from c2f_utils.merge.kernels import BLOCK
from c2f_utils.merge.operators import Operator, fingerprint, resolve
from c2f_utils.merge.readers import FACTORS_KEPT, Source
from c2f_utils.merge.recipe import Recipe

if TYPE_CHECKING:
    import pandas

FORMAT = 1  # of journal and partial folder; part of the key, so that versions never mix


@dataclass(frozen=True)
class Segment:
    """A flat range of one tensor with one treatment: `merge`, or take `instruct` or `coarse` as they are."""

    kind: str
    start: int
    stop: int


@dataclass(frozen=True)
class Placement:
    """One output tensor: its coefficient, its sources and its place in the output."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    coefficient: float
    sources: dict[str, Source]
    segments: tuple[Segment, ...]
    file: str
    offset: int
    nbytes: int
    rank_two: bool = False  # merged by a matrix operator

    @property
    def numel(self) -> int:
        return self.nbytes // ITEM_BYTES[self.dtype]

    @property
    def merged(self) -> int:
        return sum(segment.stop - segment.start for segment in self.segments if segment.kind == "merge")

    @property
    def action(self) -> str:
        kinds = {segment.kind for segment in self.segments}
        return "+".join(sorted(kinds)) or "empty"


@dataclass(frozen=True)
class OutputFile:
    name: str
    header: bytes
    nbytes: int  # of the whole file


@dataclass(frozen=True)
class Plan:
    """A checked merge.

    `problems` is empty unless the plan was made with strict=False; `notes` are worth reading, not wrong.
    """

    recipe: Recipe
    operator: Operator
    options: dict[str, object]
    placements: tuple[Placement, ...] = ()
    files: tuple[OutputFile, ...] = ()
    copies: tuple[Path, ...] = ()
    config: dict = field(default_factory=dict)
    equal: tuple[Same, ...] = ()  # pairs to be checked before merging
    stamps: dict[str, str] = field(default_factory=dict)
    stamped: dict[str, Path] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sharded: bool = False

    @property
    def key(self) -> str:
        """Hash of everything that decides the output bytes: recipe, operator code and inputs."""
        what = [FORMAT, self.recipe.to_dict(), fingerprint(self.operator), self.stamps]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @property
    def bytes_written(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read: once for merging and once for each kind of statistics (samples and further passes not
        counted)."""
        wanted = self.operator.statistics
        total = 0
        for placement in self.placements:
            roles = list(placement.sources)
            passes = [roles]
            if "gram" in wanted or "instruct_threshold" in wanted:
                passes.append(roles)
            elif wanted:
                passes.append([role for role in roles if role != "instruct"])
            if "scales" in wanted:
                passes.append(roles)
            for read in passes:
                infos = {(info.file, info.offset): info for info in (placement.sources[role].info for role in read)}
                total += placement.merged * sum(ITEM_BYTES[info.dtype] for info in infos.values())
            for segment in placement.segments:
                if segment.kind != "merge":
                    role = "instruct" if segment.kind == "instruct" else "coarse.0"
                    total += (segment.stop - segment.start) * ITEM_BYTES[placement.sources[role].info.dtype]
        return total

    def peak_memory(self, chunk_mib: float = 4, threads: int = 2) -> int:
        """Bytes beyond interpreter and torch: buffers of every thread, or the largest matrix of a matrix operator."""
        roles = max((len(placement.sources) for placement in self.placements), default=3)
        deltas = [source.delta for p in self.placements for source in p.sources.values() if source.delta]
        low_rank = FACTORS_KEPT * max((8 * (delta.a.numel + delta.b.numel) for delta in deltas), default=0)
        thread = int(chunk_mib * 2**20) * (roles + 1 + 2 * bool(deltas)) + 16 * BLOCK * 4
        statistics = 40 * 2**20 if "thresholds" in self.operator.statistics else 0
        matrices = [p.numel * 4 * (4 * len(p.sources) + 4) for p in self.placements if p.rank_two]
        return threads * thread + low_rank + statistics + max(matrices, default=0)

    def table(self) -> "pandas.DataFrame":
        """Give one row per output tensor as a DataFrame: place, coefficient, action, bytes."""
        import pandas

        layers = names.layer_count(placement.name for placement in self.placements)
        rows = [
            {
                "tensor": p.name,
                "layer": names.layer_of(p.name),
                "module": names.module_of(p.name),
                "depth": names.depth_of(p.name, layers),
                "coefficient": p.coefficient,
                "action": p.action,
                "shape": "x".join(map(str, p.shape)),
                "instruct_dtype": p.sources["instruct"].info.dtype,
                "out_dtype": p.dtype,
                "bytes_read": sum({(s.info.file, s.info.offset): s.info.nbytes for s in p.sources.values()}.values()),
                "bytes_written": p.nbytes,
                "file": p.file,
            }
            for p in self.placements
        ]
        table = pandas.DataFrame(rows).astype({"layer": "Int64"}) if rows else pandas.DataFrame()
        table.attrs.update(bytes_read=self.bytes_read, bytes_written=self.bytes_written, peak_memory=self.peak_memory())
        return table


def plan_merge(recipe: Recipe, strict: bool = True) -> Plan:
    """Plan from headers and configs only.

    Raises C2FError listing every problem at once; with strict=False the plan carries them instead and cannot be run.
    """
    operator, options = resolve(recipe.operator)
    found: list[str] = []
    notes: list[str] = []
    stamps: dict[str, str] = {}
    stamped: dict[str, Path] = {}
    models = open_inputs(recipe, found, notes, stamps, stamped)
    plan = Plan(recipe, operator, options, stamps=stamps, stamped=stamped)
    if not found:
        plan = _place(plan, models, found, notes)
    plan = replace(plan, problems=tuple(found), notes=tuple(notes))
    if found and strict:
        raise error_of("the merge cannot be planned:", found)
    return plan


def _place(plan: Plan, models: dict[str, Input], found: list[str], notes: list[str]) -> Plan:
    recipe, operator = plan.recipe, plan.operator
    instruct = models["instruct"]
    equal: list[Same] = list(instruct.same)
    aligned = align_all(models, recipe.ignore, equal, found, notes)
    kept = aligned["instruct"]
    layers = names.layer_count(kept)
    placements = []
    for name, source in kept.items():
        sources = {role: model[name] for role, model in aligned.items() if name in model}
        if len(sources) < len(aligned):
            continue  # missing somewhere: already a problem
        placed = _place_tensor(plan, name, source, sources, layers, equal, found, notes)
        if placed:
            placements.append(placed)
    for rule in recipe.coefficient.rules:
        if not any(re.search(rule.match, name) for name in kept):
            notes.append(f"rule {rule.match!r} matches no tensor")
    if operator.matrix:
        notes.append(
            f"{operator.name} merges matrices; vectors are merged as residue, and memory grows with the largest matrix"
        )
    files, placements = _lay_out(instruct.checkpoint, placements)
    config = dict(instruct.checkpoint.config)
    if recipe.out_dtype != "same":
        dtype = "float32" if recipe.out_dtype == "float32" else "bfloat16"
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if config.pop(CODE, None):
        notes.append(f"instruct's config names code of its own ({CODE}), which is not copied and no longer named")
    return replace(
        plan,
        placements=tuple(placements),
        files=files,
        config=config,
        copies=companions((instruct.checkpoint.folder, instruct.folder)),
        equal=tuple(equal),
        sharded=instruct.checkpoint.sharded,
    )


def _place_tensor(
    plan: Plan,
    name: str,
    source: Source,
    sources: dict[str, Source],
    layers: int,
    equal: list[Same],
    found: list[str],
    notes: list[str],
) -> Placement | None:
    recipe, operator, info = plan.recipe, plan.operator, source.info
    others = {role: s.info for role, s in sources.items() if role != "instruct"}
    if not info.is_float or names.is_buffer(name):
        for role, other in others.items():
            if (other.dtype, other.shape) != (info.dtype, info.shape):
                found.append(
                    f"{name!r}: a constant of {info.dtype}{list(info.shape)} in instruct, "
                    f"{other.dtype}{list(other.shape)} in {role}; use models that agree"
                )
            elif other is not info:
                equal.append(Same(info, other, "use models that agree"))
        return _placement(name, info, info.dtype, 0.0, {"instruct": source}, [Segment("instruct", 0, info.numel)])
    strange = {role: other.dtype for role, other in others.items() if not other.is_float}
    if strange:
        role, dtype = next(iter(strange.items()))
        found.append(
            f"{name!r}: {dtype} in {role}, {info.dtype} in instruct; expected floating point: use unquantised weights"
        )
        return None
    merged = _mergeable(recipe, name, info, others, found)
    coefficient = recipe.coefficient.at(name, layers)
    if coefficient is None:
        found.append(
            f"{name!r}: nothing says where in the network it is; give its coefficient with a rule "
            f"{{match: '{re.escape(name)}', set: 0.0}}"
        )
    elif coefficient < 0 and not operator.negative:
        found.append(
            f"{name!r}: coefficient {coefficient} is negative, which {operator.name} cannot vote with; use 0 or more"
        )
    if merged is None or coefficient is None:
        return None
    kind = kind_of(plan, coefficient)
    wanted = roles_read(plan, kind, sources)
    segments = [Segment(kind, 0, merged), Segment("instruct", merged, info.numel)]
    return _placement(
        name,
        info,
        stored_as(recipe, info.dtype),
        coefficient,
        {role: sources[role] for role in wanted},
        segments,
        rank_two=operator.matrix and kind == "merge" and len(info.shape) == 2 and merged == info.numel,
    )


def stored_as(recipe: Recipe, dtype: str) -> str:
    """The safetensors dtype in which a merged tensor of this dtype is stored."""
    return {"same": dtype, "float32": "F32"}.get(recipe.out_dtype, "BF16")


def kind_of(plan: Plan, coefficient: float) -> str:
    """How a tensor with this coefficient is made: `merge`, or `instruct` or `coarse` where it is just that."""
    if coefficient == 0 and plan.operator.zero_is_instruct:
        return "instruct"
    if coefficient == 1 and plan.operator.one_is_coarse and plan.recipe.coarse_models[0].weight == 1:
        return "coarse"
    return "merge"


def roles_read(plan: Plan, kind: str, roles: Iterable[str]) -> tuple[str, ...]:
    """Which models must be read for it, the instruct model among them."""
    if kind != "merge":
        return {"instruct": ("instruct",), "coarse": ("instruct", "coarse.0")}[kind]
    return tuple(role for role in roles if role == "instruct" or role.partition(".")[0] in plan.operator.reads)


def _mergeable(
    recipe: Recipe, name: str, info: TensorInfo, others: dict[str, TensorInfo], found: list[str]
) -> int | None:
    """How many leading elements all models share: all of them, or the common rows of a vocabulary by explicit rule."""
    shapes = {role: other.shape for role, other in others.items() if other.shape != info.shape}
    if not shapes:
        return info.numel
    vocabulary = names.family_of(name) in ("embedding", "head") and all(
        len(shape) == len(info.shape) >= 1 and shape[1:] == info.shape[1:] for shape in shapes.values()
    )
    role, shape = next(iter(shapes.items()))
    if vocabulary and recipe.vocab == "common_prefix":
        rows = min(info.shape[0], *(other.shape[0] for other in others.values()))
        return info.numel // info.shape[0] * rows if info.shape[0] else 0
    remedy = (
        "use vocab: common_prefix to merge the rows all share and keep instruct's others"
        if vocabulary
        else "use models of the same size"
    )
    found.append(f"{name!r}: shape {list(info.shape)} in instruct, {list(shape)} in {role}; {remedy}")
    return None


def _placement(
    name: str,
    info: TensorInfo,
    dtype: str,
    coefficient: float,
    sources: dict[str, Source],
    segments: list[Segment],
    rank_two: bool = False,
) -> Placement:
    kept = tuple(segment for segment in segments if segment.stop > segment.start)
    nbytes = info.numel * ITEM_BYTES[dtype]
    return Placement(name, info.shape, dtype, coefficient, sources, kept, info.file.name, 0, nbytes, rank_two)


def _lay_out(checkpoint: Checkpoint, placements: list[Placement]) -> tuple[tuple[OutputFile, ...], list[Placement]]:
    """Give every tensor its place; the instruct model's own header is reused where nothing in it changes."""
    files, placed = [], []
    by_file: dict[str, list[Placement]] = {}
    for placement in placements:
        by_file.setdefault(placement.file, []).append(placement)
    for path, raw in checkpoint.headers.items():
        inside = by_file.get(path.name, [])
        stored = [info for info in checkpoint.tensors.values() if info.file == path]
        same = [(p.name, p.dtype) for p in inside] == [(info.name, info.dtype) for info in stored]
        metadata = {"format": "pt", **checkpoint.metadata}
        header = (
            raw
            if same and checkpoint.metadata
            else build_header(((p.name, p.dtype, p.shape, p.nbytes) for p in inside), metadata)
        )
        position = len(header)
        for placement in inside:
            placed.append(replace(placement, offset=position))
            position += placement.nbytes
        files.append(OutputFile(path.name, header, position))
    return tuple(files), placed
