"""Promises of the operators: each is its formula, with its edge cases, and one's own can join them."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_models import load, trio

from c2f_utils.errors import C2FError
from c2f_utils.merge import (
    Recipe,
    anatomy,
    known_operators,
    merge_state_dicts,
    plan_merge,
    random_residue,
    register_operator,
    run_merge,
)
from c2f_utils.merge import operators as registry
from c2f_utils.merge import thresholds as search
from c2f_utils.merge.kernels import BLOCK, slerp_weights
from c2f_utils.merge.random_bits import bits, chosen, spread
from c2f_utils.merge.ranges import Target
from c2f_utils.merge.rounding import stochastic_bfloat16, stochastic_on_device
from c2f_utils.merge.stored import Held
from c2f_utils.merge.workers import Workers

NAME = "model.layers.0.mlp.up_proj.weight"


def one(values: object) -> dict[str, torch.Tensor]:
    return {NAME: torch.as_tensor(values, dtype=torch.float32)}


def merge(
    operator: dict, base: object, instruct: object, *coarse: object, c: float = 0.3, seed: int = 0, **changes: object
) -> torch.Tensor:
    names = (
        "c"
        if len(coarse) == 1
        else [{"path": f"c{k}", "weight": changes.pop(f"w{k}", 1.0)} for k in range(len(coarse))]
    )
    recipe = Recipe(
        base="b", instruct="i", coarse=names, operator=operator, coefficient={"default": c}, seed=seed, **changes
    )
    return merge_state_dicts(recipe, one(base), one(instruct), [one(model) for model in coarse])[NAME]


def random_trio(seed: int, *shape: int, dtype: np.dtype = np.float32) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(seed)
    base = generator.standard_normal(shape).astype(dtype)
    return (
        base,
        base + 0.1 * generator.standard_normal(shape).astype(dtype),
        base + 0.05 * generator.standard_normal(shape).astype(dtype),
    )


def close(result: torch.Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(result.numpy().astype(np.float64), wanted, rtol=2e-6, atol=2e-7)


# --- formulas against references written apart from the kernels -----------------------------------------------------


@pytest.mark.parametrize("c", [-0.5, 0.3, 1.0, 1.7])
def test_residue_and_lerp_are_their_formulas(c):
    base, instruct, coarse = random_trio(0, 300)
    b, i, k = (part.astype(np.float64) for part in (base, instruct, coarse))
    close(merge({"name": "residue"}, base, instruct, coarse, c=c), i + c * (k - b))
    close(merge({"name": "lerp"}, base, instruct, coarse, c=c), (1 - c) * i + c * k)


def test_several_residues_add_with_their_weights():
    base, instruct, first = random_trio(1, 200)
    second = random_trio(2, 200)[2]
    b, i, k, m = (part.astype(np.float64) for part in (base, instruct, first, second))
    result = merge({"name": "residue"}, base, instruct, first, second, c=0.4, w0=0.5, w1=-1.5)
    close(result, i + 0.4 * (0.5 * (k - b) - 1.5 * (m - b)))


@pytest.mark.parametrize("c", [0.3, 0.5, 1.4])
def test_slerp_turns_the_task_vector_along_the_sphere(c):
    base, instruct, coarse = random_trio(3, 400)
    b, i, k = (part.astype(np.float64) for part in (base, instruct, coarse))
    u, v = i - b, k - b
    angle = math.acos(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
    close(
        merge({"name": "slerp"}, base, instruct, coarse, c=c),
        b + math.sin((1 - c) * angle) / math.sin(angle) * u + math.sin(c * angle) / math.sin(angle) * v,
    )


@pytest.mark.parametrize(
    ("gram", "expected"),
    [
        (((0.0, 0.0), (0.0, 1.0)), (0.7, 0.3)),  # instruct is base
        (((1.0, 0.0), (0.0, 0.0)), (0.7, 0.3)),  # coarse is base
        (((1.0, 2.0), (2.0, 4.0)), (0.7, 0.3)),  # parallel
        (((1.0, -2.0), (-2.0, 4.0)), (0.7, 0.3)),  # opposite: no single shortest way
        (((1.0, 2.0000001), (2.0000001, 4.0)), (0.7, 0.3)),  # a cosine that rounding pushed past 1
        (((1.0, 0.0), (0.0, 1.0)), (math.sin(0.7 * math.pi / 2), math.sin(0.3 * math.pi / 2))),
    ],
)
def test_slerp_is_linear_where_the_sphere_has_no_direction(gram, expected):
    assert slerp_weights(gram, (1.0,), 0.3) == pytest.approx(expected)


def test_orthogonal_adds_nothing_along_the_instruct_residue():
    base, instruct, coarse = random_trio(4, 500)
    b, i, k = (part.astype(np.float64) for part in (base, instruct, coarse))
    u, v = i - b, k - b
    result = merge({"name": "orthogonal"}, base, instruct, coarse, c=0.8)
    close(result, i + 0.8 * (v - (u @ v) / (u @ u) * u))
    assert abs((result.numpy() - i) @ u) < 1e-4 * np.linalg.norm(u)


def test_orthogonal_to_nothing_is_the_residue():
    base, _, coarse = random_trio(5, 100)
    assert torch.equal(
        merge({"name": "orthogonal"}, base, base, coarse), merge({"name": "residue"}, base, base, coarse)
    )


def reference_trim(values: np.ndarray, density: float) -> np.ndarray:
    flat = np.zeros_like(values.ravel())
    kept = np.argsort(-np.abs(values.ravel()), kind="stable")[: max(1, int(density * values.size)) if density else 0]
    flat[kept] = values.ravel()[kept]
    return flat.reshape(values.shape)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.2, 0.5, 1.0])
def test_trim_keeps_the_largest_share(density):
    base, instruct, coarse = random_trio(6, 40, 25)
    b, i, k = (part.astype(np.float64) for part in (base, instruct, coarse))
    close(merge({"name": "trim", "density": density}, base, instruct, coarse), i + 0.3 * reference_trim(k - b, density))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_ties_of_magnitude_are_broken_to_hit_the_density(density):
    generator = np.random.default_rng(0)
    steps = generator.integers(-3, 4, 5000).astype(np.float32) / 64  # few distinct magnitudes, as bf16 residues have
    result = merge({"name": "trim", "density": density}, np.zeros(5000), np.zeros(5000), steps, c=1.0)
    wanted = min(int(density * 5000), int(np.count_nonzero(steps)))
    assert int(torch.count_nonzero(result)) == wanted
    smallest = result[result != 0].abs().min()
    chosen = np.flatnonzero((result.abs() == smallest).numpy())
    tied = np.flatnonzero(np.abs(steps) == float(smallest))
    if len(chosen) < len(tied):  # the ties that were kept lie everywhere, not at the front
        assert chosen.mean() / 5000 == pytest.approx(0.5, abs=0.06)


def reference_ties(
    base: np.ndarray, instruct: np.ndarray, coarse: list, c: float, weights: list, density: float
) -> np.ndarray:
    votes = np.stack(
        [reference_trim(instruct - base, density)]
        + [c * w * reference_trim(k - base, density) for k, w in zip(coarse, weights, strict=True)]
    )
    scale = np.array([1.0, *(c * w for w in weights)]).reshape(-1, *[1] * base.ndim)
    elected = np.where(votes.sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(votes) == elected
    below = (agree * scale).sum(0)
    return base + (votes * agree).sum(0) / np.where(below == 0, 1, below)


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_ties_elects_signs_and_averages_those_that_agree(density):
    base, instruct, first = random_trio(7, 30, 20)
    second = random_trio(8, 30, 20)[2]
    parts = [part.astype(np.float64) for part in (base, instruct, first, second)]
    result = merge({"name": "ties", "density": density}, base, instruct, first, second, c=0.6, w0=1.0, w1=0.5)
    close(result, reference_ties(*parts[:2], parts[2:], 0.6, [1.0, 0.5], density))


def test_ties_mirrors_with_its_inputs():
    base, instruct, coarse = random_trio(9, 999)
    plus = merge({"name": "ties"}, np.zeros(999), instruct - base, coarse - base)
    minus = merge({"name": "ties"}, np.zeros(999), base - instruct, base - coarse)
    assert torch.equal(plus, -minus)


def test_ties_of_nothing_is_base_and_of_one_element_is_defined():
    assert torch.equal(merge({"name": "ties"}, np.ones(8), np.ones(8), np.ones(8)), torch.ones(8))
    assert merge({"name": "ties"}, [0.0], [2.0], [4.0], c=0.5) == pytest.approx((2.0 + 0.5 * 4.0) / 1.5)
    # votes that cancel exactly elect plus, as the paper's implementation does
    assert merge({"name": "ties", "density": 1.0}, [0.0], [1.0], [-2.0], c=0.5) == pytest.approx(1.0)


def test_dare_keeps_the_expectation_and_the_share():
    size = 200_000
    result = merge({"name": "dare", "density": 0.25}, np.zeros(size), np.zeros(size), np.ones(size), c=1.0)
    assert set(result.unique().tolist()) == {0.0, 4.0}
    assert result.mean().item() == pytest.approx(1.0, abs=4 * math.sqrt(3.0 / size))
    assert torch.equal(
        merge({"name": "dare", "density": 1.0}, np.zeros(9), np.zeros(9), np.ones(9), c=1.0), torch.ones(9)
    )


def test_dare_draws_apart_for_each_coarse_model_tensor_and_seed():
    ones, zeros = np.ones(4000), np.zeros(4000)
    both = merge({"name": "dare"}, zeros, zeros, ones, ones, c=1.0)
    assert (both == 2.0).float().mean().item() == pytest.approx(0.5, abs=0.05)  # independent masks: 0, 2 or 4
    assert not torch.equal(
        merge({"name": "dare"}, zeros, zeros, ones), merge({"name": "dare"}, zeros, zeros, ones, seed=1)
    )
    assert not torch.equal(
        merge({"name": "dare"}, zeros, zeros, ones), merge({"name": "dare", "seed": 1}, zeros, zeros, ones)
    )


def reference_dots(
    base: np.ndarray, instruct: np.ndarray, coarse: list, factors: tuple[float, ...], density: float
) -> np.ndarray:
    merged = base.copy()
    for factor, model in zip(factors, (instruct, *coarse), strict=True):
        delta = model - base
        kept = reference_trim(delta, density)
        merged += factor * kept * np.linalg.norm(delta) / np.linalg.norm(kept)
    return merged


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_dots_adds_the_top_of_both_deltas_with_their_norms(density):
    base, instruct, first = random_trio(10, 30, 20)
    second = random_trio(11, 30, 20)[2]
    parts = [part.astype(np.float64) for part in (base, instruct, first, second)]
    spec = {"name": "dots", "density": density, "instruct": 0.8}
    result = merge(spec, base, instruct, first, second, c=-0.6, w0=1.0, w1=0.5)
    close(result, reference_dots(*parts[:2], parts[2:], (0.8, -0.6, -0.3), density))


def test_dots_with_all_of_both_deltas_is_their_sum_and_with_one_coefficient_zero_the_other_alone():
    base, instruct, coarse = random_trio(12, 1000)
    b, i, k = (part.astype(np.float64) for part in (base, instruct, coarse))
    close(merge({"name": "dots", "density": 1.0}, base, instruct, coarse, c=1.0), i + k - b)
    alone = merge({"name": "dots", "instruct": 0.0}, np.zeros(1000), instruct - base, coarse - base, c=1.0)
    assert int(torch.count_nonzero(alone)) == 300
    assert torch.linalg.norm(alone).item() == pytest.approx(np.linalg.norm(k - b), rel=1e-5)
    assert torch.equal(merge({"name": "dots"}, base, base, base, c=1.0), torch.from_numpy(base))  # no norm to keep


def test_dots_keeps_norms_whose_squares_float32_cannot_hold():
    values = np.array([3.0, 4.0, 0.5, -0.25], np.float32)
    for scale in (1e-25, 1e25):
        result = merge({"name": "dots", "density": 0.5}, np.zeros(4), np.zeros(4), scale * values, c=1.0)
        assert torch.linalg.norm(result.double()).item() == pytest.approx(scale * np.linalg.norm(values), rel=1e-5)


def test_dots_keeps_the_norm_over_all_tensors_in_the_global_scope():
    other = "model.norm.weight"
    small, large = torch.linspace(0.001, 0.002, 50), torch.linspace(1, 2, 50)
    models = [{NAME: factor * large, other: factor * small} for factor in (0.0, 0.0, 1.0)]
    spec = {"name": "dots", "density": 0.25, "scope": "global"}
    found = merge_state_dicts(Recipe(base="b", instruct="i", coarse="c", operator=spec, coefficient=1.0), *models)
    assert not found[other].any() and int(torch.count_nonzero(found[NAME])) == 25
    whole = torch.cat([large, small])
    assert torch.linalg.norm(found[NAME]).item() == pytest.approx(torch.linalg.norm(whole).item(), rel=1e-5)


def test_tsv_recombines_orthogonal_tasks_without_loss():
    generator = np.random.default_rng(0)
    q = np.linalg.qr(generator.standard_normal((12, 12)))[0]
    p = np.linalg.qr(generator.standard_normal((20, 20)))[0]
    first = (q[:, :3] * [3.0, 2.0, 1.0]) @ p[:, :3].T
    second = (q[:, 3:6] * [2.5, 1.5, 0.5]) @ p[:, 3:6].T
    result = merge({"name": "tsv"}, np.zeros((12, 20)), first, second, c=0.5)
    np.testing.assert_allclose(result.numpy(), first + 0.5 * second, atol=1e-5)


def test_tsv_separates_tasks_that_share_directions():
    generator = np.random.default_rng(1)
    base, instruct, coarse = (
        np.zeros((16, 16)),
        generator.standard_normal((16, 16)),
        generator.standard_normal((16, 16)),
    )
    keep, deltas = 8, [instruct, coarse]
    parts = [np.linalg.svd(delta) for delta in deltas]
    left = np.concatenate([u[:, :keep] for u, _, _ in parts], axis=1)
    right = np.concatenate([vh[:keep] for _, _, vh in parts], axis=0)
    values = np.concatenate([w * s[:keep] for w, (_, s, _) in zip((1.0, 0.3), parts, strict=True)])
    polar = [
        u @ vh for u, _, vh in (np.linalg.svd(left, full_matrices=False), np.linalg.svd(right, full_matrices=False))
    ]
    np.testing.assert_allclose(
        merge({"name": "tsv"}, base, instruct, coarse).numpy(), polar[0] * values @ polar[1], atol=2e-4
    )


# --- thresholds -----------------------------------------------------------------------------------------------------


def thresholds_of(parts: list[np.ndarray], density: float) -> search.Threshold:
    targets = []
    for number, values in enumerate(parts):
        flat = torch.from_numpy(values)
        models = {"base": torch.zeros_like(flat), "instruct": flat, "coarse.0": flat}
        held = Held("t", {role: {"t": values} for role, values in models.items()})
        targets.append(Target(f"t{number}", held, values.size))
    with Workers(1) as workers:
        return search.thresholds(targets, 1, 1, density, 0, BLOCK, workers)[1]


KINDS = {
    "normal": lambda g, n: g.standard_normal(n),
    "heavy tails": lambda g, n: g.standard_t(1, n).clip(-1e6, 1e6),
    "sorted": lambda g, n: np.sort(g.standard_normal(n)),
    "mostly zero": lambda g, n: g.standard_normal(n) * (g.random(n) < 0.05),
    "three values": lambda g, n: g.integers(-1, 2, n) / 8,
    "two scales": lambda g, n: np.concatenate([g.standard_normal(n // 2), 1e-6 * g.standard_normal(n - n // 2)]),
    "constant": lambda g, n: np.full(n, 0.5),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.01, 0.5, 0.9])
def test_thresholds_are_exact_however_the_values_lie(monkeypatch, kind, density):
    monkeypatch.setattr(search, "COLLECT", 2000)  # so that bracket, thinning and narrowing all happen
    generator = np.random.default_rng(0)
    parts = [KINDS[kind](generator, size).astype(np.float32) for size in (150_000, 50_001)]
    threshold = thresholds_of(parts, density)
    sizes = np.abs(np.concatenate(parts))
    wanted = int(density * sizes.size)
    exact = np.sort(sizes)[sizes.size - wanted]
    above, tied = int((sizes > threshold.value).sum()), int((sizes == threshold.value).sum())
    if exact == 0:
        assert threshold.value == 0
    elif threshold.tie_cut:
        assert threshold.value == exact and above < wanted < above + tied
        assert above + tied * threshold.tie_cut / 2**32 == pytest.approx(wanted, abs=1)
    else:
        assert above == wanted


def test_a_global_scope_ranks_all_tensors_together():
    small, large = np.full(100, 0.001, np.float32), np.linspace(1, 2, 100, dtype=np.float32)
    threshold = thresholds_of([small, large], 0.25)
    assert (small > threshold.value).sum() == 0 and (large > threshold.value).sum() == 50


# --- random bits and rounding ---------------------------------------------------------------------------------------


@given(start=st.integers(0, 10_000), count=st.integers(1, 300), width=st.sampled_from([8, 16, 32]))
def test_random_bits_depend_on_the_position_only(start, count, width):
    whole = bits(7, "tensor", 0, start + count, width)
    assert np.array_equal(bits(7, "tensor", start, count, width), whole[start:])


def test_random_streams_differ_and_are_uniform():
    first, second = bits(0, "a", 0, 100_000, 32), bits(0, "b", 0, 100_000, 32)
    assert not np.array_equal(first, second) and not np.array_equal(first, bits(1, "a", 0, 100_000, 32))
    assert np.abs(np.corrcoef(first, second)[0, 1]) < 0.02
    for words in (first, bits(0, "a", 0, 100_000, 16).astype(np.uint32) << 16, spread(0, "a", 0, 100_000)):
        counts = np.bincount(words >> 28, minlength=16)
        assert ((counts - 6250) ** 2 / 6250).sum() < 45  # chi-square with 15 degrees of freedom


@pytest.mark.parametrize("share", [2.0**-16, 0.25, 0.3, 1.0])
def test_elements_are_chosen_with_their_probability_wherever_the_draw_starts(share):
    share, size = round(share * 2**16) / 2**16, 200_000
    keep = chosen(0, "a", 0, size, share)
    assert abs(keep.mean() - share) <= 5 * math.sqrt(share * (1 - share) / size)
    assert np.array_equal(chosen(0, "a", 12_345, 700, share), keep[12_345:13_045])


def test_tied_elements_are_chosen_evenly_wherever_the_sequence_starts():
    words = spread(0, "a", 0, 100_000)
    for step in (1, 7, 4096):  # also where the tied ones lie at regular distances, as in a column
        part = words[::step]
        assert abs((part < 0.3 * 2**32).mean() - 0.3) < 3 / len(part)
    assert np.array_equal(spread(0, "a", 12_345, 700), words[12_345:13_045])
    assert not np.array_equal(spread(1, "a", 0, 9), words[:9]) and not np.array_equal(spread(0, "b", 0, 9), words[:9])


def test_stochastic_rounding_is_unbiased():
    value, size = 1.0 + 2.0**-9 * 0.3, 400_000
    rounded = stochastic_bfloat16(torch.full((size,), value), bits(0, "r", 0, size, 16)).double()
    unit = 2.0**-7
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + unit}
    spread = unit * math.sqrt(0.075 * 0.925 / size)
    assert abs(rounded.mean().item() - value) < 4 * spread


@settings(deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_stochastic_rounding_gives_a_neighbour_and_never_an_infinity(values):
    exact = torch.tensor(values, dtype=torch.float32)
    rounded = stochastic_bfloat16(exact, bits(1, "r", 0, len(values), 16))
    down = (exact.view(torch.int32) & -65536).view(torch.float32)
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isnan(rounded), torch.isnan(exact)) and torch.equal(
        torch.isinf(rounded), torch.isinf(exact)
    )
    assert bool(torch.isfinite(rounded)[finite].all())
    up = (down.view(torch.int32) + 65536).view(torch.float32)
    hits = (rounded.float() == down) | (rounded.float() == up)
    assert bool(hits[finite].all())
    assert torch.equal(torch.signbit(rounded)[finite], torch.signbit(exact)[finite])
    same = (exact == exact.bfloat16().float()) & finite
    assert torch.equal(rounded[same].float(), exact[same])


@pytest.mark.parametrize("top", (1.0, 1e30, math.inf))
def test_stochastic_rounding_is_the_same_on_a_device(top):
    generator = torch.Generator().manual_seed(0)
    values = torch.cat(
        [
            torch.randn(4096, generator=generator) * 10.0 ** torch.randint(-30, 8, (4096,)),
            torch.tensor([0.0, -0.0, 3.4e38, -3.4e38, top, -top, math.nan if top > 1e31 else 1.0]),
        ]
    )
    words = bits(5, "t", 0, values.numel(), 16)
    found = stochastic_on_device(values, torch.from_numpy(words.view(np.int16)))
    assert torch.equal(found.view(torch.int16), stochastic_bfloat16(values, words).view(torch.int16))


def test_stochastic_rounding_carries_into_the_exponent():
    value = torch.tensor([2.0 - 2.0**-20])
    ups = [stochastic_bfloat16(value, np.array([word], np.uint16)).item() for word in (0, 0xFFFF)]
    assert ups == [2.0 - 2.0**-7, 2.0]


# --- operators of one's own -----------------------------------------------------------------------------------------


@pytest.fixture
def clean_registry():
    before = registry.known_operators()
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


def test_an_operator_defined_in_a_notebook_cell_merges(tmp_path, clean_registry):
    # -- a notebook cell of ten lines --
    def clipped(piece, c, limit):
        spread = (piece.stats.gram[1][1] / piece.stats.count) ** 0.5
        return piece.instruct + c * piece.residue.clamp(-limit * spread, limit * spread)

    register_operator("clipped", clipped, options={"limit": 3.0}, statistics=("gram",), zero_is_instruct=True)
    # -- end of the cell --
    paths = trio(tmp_path)
    recipe = Recipe(**paths, operator={"name": "clipped", "limit": 1.0}, coefficient={"default": 1.0})
    report = run_merge(plan_merge(recipe), tmp_path / "out")
    base, instruct, coarse = (load(paths[role]) for role in ("base", "instruct", "coarse"))
    delta = coarse[NAME] - base[NAME]
    bound = delta.square().mean().sqrt()
    assert torch.allclose(
        load(tmp_path / "out")[NAME], instruct[NAME] + delta.clamp(-bound, bound), rtol=1e-6, atol=1e-8
    )
    assert "user" in report.formula
    assert torch.equal(merge_state_dicts(recipe, base, instruct, coarse)[NAME], load(tmp_path / "out")[NAME])


def test_an_own_operator_may_trim_and_draw(clean_registry):
    def sparse_noise(piece, c, density):
        return piece.instruct + c * piece.trimmed(piece.residue, 1) * (piece.uniform("keep") < 0.5)

    register_operator("sparse_noise", sparse_noise, options={"density": 0.5}, statistics=("thresholds",))
    result = merge(
        {"name": "sparse_noise"}, np.zeros(4000), np.zeros(4000), np.random.default_rng(0).standard_normal(4000), c=1.0
    )
    assert torch.count_nonzero(result).item() / 4000 == pytest.approx(0.25, abs=0.03)


def test_a_changed_cell_never_continues_an_older_cell_s_merge(tmp_path, clean_registry):
    paths = trio(tmp_path)
    register_operator("own", lambda piece, c: piece.instruct + c)
    first = plan_merge(Recipe(**paths, operator={"name": "own"})).key
    register_operator("own", lambda piece, c: piece.instruct - c)
    assert plan_merge(Recipe(**paths, operator={"name": "own"})).key != first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("residue", lambda piece, c: piece.instruct), "built-in"),
        (("two words", lambda piece, c: piece.instruct), "plain name"),
    ],
)
def test_a_wrong_registration_is_refused(clean_registry, arguments, words):
    with pytest.raises(C2FError, match=words):
        register_operator(*arguments)


@pytest.mark.parametrize(
    ("options", "words"), [({"statistics": ("median",)}, "gram"), ({"statistics": ("thresholds",)}, "density")]
)
def test_a_registration_that_asks_for_the_impossible_is_refused(clean_registry, options, words):
    with pytest.raises(C2FError, match=words):
        register_operator("own", lambda piece, c: piece.instruct, **options)


@pytest.mark.parametrize(
    "result", [lambda piece: piece.instruct[:3], lambda piece: piece.instruct.double(), lambda piece: 3.0]
)
def test_an_own_operator_with_a_wrong_result_is_named(tmp_path, clean_registry, result):
    register_operator("own", lambda piece, c: result(piece))
    paths = trio(tmp_path)
    with pytest.raises(C2FError, match="operator 'own' gave"):
        run_merge(plan_merge(Recipe(**paths, operator={"name": "own"})), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


# --- merging in memory, controls, anatomy ---------------------------------------------------------------------------


def test_a_sweep_step_in_memory_takes_milliseconds(tmp_path):
    import time

    sets = [load(path) for path in trio(tmp_path).values()]
    big = [{name: tensor.repeat(4, 1) if tensor.dim() == 2 else tensor for name, tensor in one.items()} for one in sets]
    recipe = Recipe(base="b", instruct="i", coarse="c")
    merge_state_dicts(recipe, *big)
    started = time.process_time()
    for _ in range(5):
        merge_state_dicts(recipe, *big)
    assert (time.process_time() - started) / 5 < 0.05


def test_tied_tensors_in_memory_stay_tied(tmp_path):
    sets = []
    for path in trio(tmp_path).values():
        tensors = load(path)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        sets.append(tensors)
    recipe = Recipe(base="b", instruct="i", coarse="c", coefficient={"knots": [[0, 0.1], [1, 0.9]]})
    merged = merge_state_dicts(recipe, *sets)
    assert merged["lm_head.weight"] is merged["model.embed_tokens.weight"]
    head = sets[1]["lm_head.weight"] + 0.1 * (sets[2]["lm_head.weight"] - sets[0]["lm_head.weight"])
    assert torch.allclose(merged["lm_head.weight"], head)


def test_state_dicts_that_do_not_fit_are_refused_with_every_reason(tmp_path):
    base, instruct, coarse = (load(path) for path in trio(tmp_path).values())
    base.pop(NAME)
    coarse["lm_head.weight"] = coarse["lm_head.weight"][:5]
    recipe = Recipe(base="b", instruct="i", coarse="c")
    with pytest.raises(C2FError) as error:
        merge_state_dicts(recipe, base, instruct, coarse)
    assert NAME in str(error.value) and "lm_head.weight" in str(error.value)
    with pytest.raises(C2FError, match="2 coarse state dicts"):
        merge_state_dicts(Recipe(base="b", instruct="i", coarse="c"), instruct, instruct, [instruct, instruct])


@pytest.mark.parametrize("role", range(3))
@pytest.mark.parametrize("operator", ({"name": "residue"}, {"name": "trim", "density": 0.3}), ids=("residue", "trim"))
def test_what_is_no_number_is_named_and_never_spread(tmp_path, role, operator):
    sets = [load(path) for path in trio(tmp_path).values()]
    sets[role]["model.norm.weight"][2] = math.nan
    name = ("base", "instruct", "coarse.0")[role]
    with pytest.raises(C2FError, match=f"'model.norm.weight' of {name} has nan at element 2"):
        merge_state_dicts(Recipe(base="b", instruct="i", coarse="c", operator=operator), *sets)


def test_inputs_in_memory_are_left_alone(tmp_path):
    sets = [load(path) for path in trio(tmp_path).values()]
    before = [{name: tensor.clone() for name, tensor in one.items()} for one in sets]
    for c in (0.0, 0.3):
        merged = merge_state_dicts(Recipe(base="b", instruct="i", coarse="c", coefficient={"default": c}), *sets)
        for tensor in merged.values():
            tensor.add_(1)
    assert all(torch.equal(one[name], old[name]) for one, old in zip(sets, before, strict=True) for name in old)


def test_the_random_residue_has_the_norm_and_none_of_the_direction(tmp_path):
    base, _, coarse = (load(path) for path in trio(tmp_path).values())
    control = random_residue(base, coarse, seed=1)
    for name in base:
        real, made = coarse[name] - base[name], control[name] - base[name]
        assert made.norm().item() == pytest.approx(real.norm().item(), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(
        (control[NAME] - base[NAME]).flatten(), (coarse[NAME] - base[NAME]).flatten(), dim=0
    )
    assert abs(cosine.item()) < 0.25
    assert all(torch.equal(random_residue(base, coarse, 1)[name], control[name]) for name in base)
    assert not torch.equal(random_residue(base, coarse, 2)[NAME], control[NAME])
    assert all(torch.equal(tensor, base[name]) for name, tensor in random_residue(base, base).items())


def test_anatomy_describes_the_residue_the_same_from_folders_and_memory(tmp_path):
    paths = trio(tmp_path)
    base, instruct, coarse = (load(path) for path in paths.values())
    coarse[NAME] = base[NAME].clone()
    coarse[NAME][:6] += torch.outer(torch.arange(1.0, 7.0), torch.ones(16))  # rank one, three quarters zero
    rows = {row["tensor"]: row for row in anatomy(base, instruct, coarse)}
    row = rows[NAME]
    assert row["sparsity"] == pytest.approx(0.75) and row["top_energy"] == pytest.approx(1.0, abs=1e-5)
    delta = coarse[NAME] - base[NAME]
    assert (
        row["norm_coarse"] == pytest.approx(delta.norm().item(), rel=1e-5)
        and row["layer"] == 0
        and row["module"] == "up_proj"
    )
    other = rows["model.layers.1.self_attn.q_proj.weight"]
    values = torch.linalg.svdvals(coarse[other["tensor"]] - base[other["tensor"]]).square()
    assert other["top_energy"] == pytest.approx((values[:2].sum() / values.sum()).item(), rel=1e-4)
    assert rows["model.norm.weight"]["top_energy"] is None and rows["lm_head.weight"]["layer"] is None
    again = anatomy(paths["base"], paths["instruct"], paths["coarse"])
    assert [row["tensor"] for row in again] == list(load(paths["instruct"]))
    assert next(r for r in again if r["tensor"] == other["tensor"]) == other
    assert anatomy(base, instruct, base)[0]["cosine"] is None


def test_settings_know_the_options_that_the_kernels_take():
    from c2f_utils.settings.merge_options import OPTIONS

    built_in = {name: operator for name, operator in known_operators().items() if operator.builtin}
    taken = {n: [*inspect.signature(o.kernel).parameters][2:] for n, o in built_in.items()}
    assert taken == {name: [*options] for name, options in OPTIONS.items()}


def test_the_options_of_ones_own_operator_are_those_of_its_function():
    def scaled(piece, c, factor: float = 2.0):
        return piece.instruct + c * factor * piece.residue

    assert register_operator("scaled_twice", scaled).options == {"factor": 2.0}


def test_an_operator_of_ones_own_may_be_named_in_the_settings(monkeypatch):
    from c2f_utils.errors import C2FError
    from c2f_utils.merge import operators
    from c2f_utils.settings.load import load_settings

    load_settings("smoke", overrides={"merge.operator": "clipped"})  # notebook 06 may register it later
    with pytest.raises(C2FError, match="must be registered before"):
        load_settings("smoke", overrides={"merge.operator": "trim2"})
    monkeypatch.setitem(operators._REGISTRY, "trim2", operators._REGISTRY["trim"])
    load_settings("smoke", overrides={"merge.operator": "trim2"})
