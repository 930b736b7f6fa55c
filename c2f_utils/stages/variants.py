"""Variants of the merge that notebook 06 compares with one coefficient for all tensors.

Parts of the network, profiles over depth, other operators, averages of coarse actors, decode-time merging, output
dtypes. All on validation problems, each with its paired difference to the one-coefficient merge.
"""

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from c2f_utils import merge, weights
from c2f_utils.merge.names import layer_count
from c2f_utils.models import loading
from c2f_utils.report.results import operator_name
from c2f_utils.rollout.proxy import ProxyDecoder
from c2f_utils.runs.run import Run
from c2f_utils.stages.bench import Bench, portable

DTYPES = ("float32", "bfloat16", "bfloat16_stochastic")
# Multiples of the chosen coefficient at depth 0, 1/2 and 1; each has mean 1 over depth.
PROFILES = {"rising": (0.5, 1.0, 1.5), "falling": (1.5, 1.0, 0.5), "middle": (0.5, 1.5, 0.5), "ends": (1.5, 0.5, 1.5)}


def expected(bench: Bench) -> int:
    """How many merges everything below but the roundings measures, at most."""
    layers, settings = layer_count(bench.states["instruct"]), bench.settings.merge
    each = {"layers": 2 * (min(4, layers) + 3), "depths": len(PROFILES), "averages": 4, "proxies": 2}
    sections = sum(count for name, count in each.items() if name in settings.sections)
    return sections + len(settings.other_operators) * len(settings.coefficients)


def parts(bench: Bench, operator: dict, coefficient: float) -> list[dict]:
    """The residue kept in one part only, and everywhere but there; deep networks are cut into four blocks of layers."""
    layers = layer_count(bench.states["instruct"])
    blocks = [(i * layers // min(4, layers), (i + 1) * layers // min(4, layers)) for i in range(min(4, layers))]
    inside = {}
    for low, high in blocks:
        numbers = "|".join(str(n) for n in range(low, high))
        inside[f"layer {low}" if high == low + 1 else f"layers {low}-{high - 1}"] = rf"\.layers\.({numbers})\."
    inside |= {"attention": r"self_attn\.", "mlp": r"\.mlp\.", "embedding, head, norms": r"embed_tokens|lm_head|norm"}
    only = [(f"only {name}", [{"match": f"^(?!.*({pattern}))", "set": 0.0}]) for name, pattern in inside.items()]
    without = [(f"without {name}", [{"match": pattern, "set": 0.0}]) for name, pattern in inside.items()]
    return [
        {"name": name, "rules": rules, **bench.measure(bench.recipe(operator, coefficient, rules=rules))}
        for name, rules in only + without
    ]


def depths(bench: Bench, operator: dict, coefficient: float) -> list[dict]:
    """The coefficient as a function of depth, with the chosen one as its mean."""
    rows = []
    for name, heights in PROFILES.items():
        knots = [
            [depth, round(coefficient * height, 6)] for depth, height in zip((0.0, 0.5, 1.0), heights, strict=True)
        ]
        rows.append({"name": name, "knots": knots, **bench.measure(bench.recipe(operator, coefficient, knots=knots))})
    return rows


def others(bench: Bench, operators: list[dict]) -> list[dict]:
    """Every other operator at the best coefficient of the same grid."""
    rows = []
    for spec in operators:
        row = max(bench.sweep(spec), key=lambda row: row["score"])
        rows.append({"operator": operator_name(spec), "spec": spec, **row})
    return rows


def averages(run: Run, bench: Bench, operator: dict, coefficient: float) -> list[dict]:
    """Residues of averaged coarse actors: over the run's own snapshots, and over actors of other laws and seeds from
    the same base."""
    rows = []
    for name, states in _families(run, bench):
        if len(states) > 1:
            state = _weighted(states)
            row = bench.measure(bench.recipe(operator, coefficient), state, name)
            rows.append({"name": name, "actors": len(states), **row})
    return rows


def _families(run: Run, bench: Bench) -> Iterator[tuple[str, list[tuple[float, merge.StateDict]]]]:
    """Names and weighted actors. SWA: equal weights (Izmailov et al. 2018); EMA: halved per step back; LaWA: the
    latest three (Kaddour 2022); ratatouille: fine-tunings of one base that differ in law or seed (after Rame et al.
    2023)."""
    trained = run.parent("03_coarse_rlhf")
    files = weights.files(trained.model("snapshots")) if "snapshots" in trained.models() else []
    snapshots = [load_file(path) for path in files]
    equal = [(1.0, state) for state in snapshots]
    yield "SWA over snapshots", equal
    yield "EMA over snapshots", [(0.5 ** (len(snapshots) - 1 - i), state) for i, state in enumerate(snapshots)]
    yield "LaWA, latest three", equal[-3:]
    others = run.parent("04_length_schedules")
    folders = [others.model(name) for name in others.models() if name.startswith("models/")]
    actors = [bench.states["coarse"], *(bench.actor(folder) for folder in folders)]
    yield "ratatouille over laws and seeds", [(1.0, state) for state in actors]


def _weighted(states: list[tuple[float, merge.StateDict]]) -> merge.StateDict:
    total, first = sum(weight for weight, _ in states), states[0][1]

    def mean(name: str) -> Tensor:
        return sum(weight / total * state[name].double() for weight, state in states).to(first[name].dtype)

    return merge.Lazy(first, mean)


def proxies(bench: Bench, coefficient: float) -> list[dict]:
    """Merging at decode time: instruct logits + c (coarse - base) logits, three models per token (after Liu et al.
    2024). Left out on CUDA, where no test of it has run yet."""
    inputs = bench.inputs
    if loading.device(inputs.settings.models).type == "cuda":
        print("proxy-tuning is left out: it has not been run on CUDA (tests/test_cuda.py would show it)", flush=True)
        return []
    trio = functools.cache(lambda: (inputs.instruct(), inputs.coarse(), inputs.base()))
    longest = max(len(p.ids) for p in bench.prompts) + inputs.settings.evaluation.max_tokens

    def row(c: float) -> dict:
        stops = inputs.stop_strings()
        return bench.sampled(ProxyDecoder(*trio(), inputs.tokenizer, c, stop_strings=stops, longest=longest))

    return [
        {
            "name": f"proxy-tuning, c = {c:g}", "coefficient": c, "forward_passes_per_token": 3,
            **bench.kept(["proxy", c], lambda c=c: row(c)),
        }
        for c in dict.fromkeys((coefficient, 1.0))
    ]  # fmt: skip


def roundings(run: Run, bench: Bench, recipe: merge.Recipe) -> list[dict]:
    """How much of the wanted change is left after each output dtype, and what that does to the answers."""
    rows = []
    for dtype in DTYPES:
        rounded = recipe.model_copy(update={"out_dtype": dtype})
        row = bench.kept(["rounding", portable(rounded)], lambda rounded=rounded: _rounding(run, bench, rounded))
        rows.append({"out_dtype": dtype, **row})
    return rows


def _rounding(run: Run, bench: Bench, recipe: merge.Recipe) -> dict:
    with tempfile.TemporaryDirectory(prefix=".", dir=run.here.dir) as scratch:
        report = merge.run_merge(merge.plan_merge(recipe), Path(scratch) / "model")
        model = bench.written(Path(scratch) / "model")
    return {"survival": report.survival, **bench.row(bench.answers(model))}
