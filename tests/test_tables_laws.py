"""Tables and figures of notebook 09's study: right numbers from made-up runs, and words where there is nothing."""

import json
import math

import pytest

from c2f_utils.report import figures, law_study, tables_laws

KNOWN = next(iter(law_study.KNOWN))
HACKED = next(iter(law_study.HACKED))


def run(gain: float, limits: tuple[int, ...] = (24, 30)) -> dict:
    tokens = (0, 20_000, 40_000, law_study.BUDGET, law_study.LONG)
    values = (0.0, gain, gain, gain, gain)
    return {"curve": {"tokens": tokens, "utility": values, "seconds": [t / 5_000 for t in tokens]}, "limits": limits}


def study() -> dict:
    gains = {"fixed long": 0.5, "linear 9 from 24": 1.0, "grow 12 %": 0.9, "useful": 0.95}
    laws = {name: {seed: run(gain + 0.01 * int(seed)) for seed in "12"} for name, gain in gains.items()}
    ends = {
        "useful": {"1": run(1, (24, 60)), "2": run(1, (24, 50))},
        "logistic": {"1": run(1, (24, 288)), "2": run(1, (24, 280))},
    }
    return {"runs": {"l_max 96": laws, "short problems": laws, HACKED: ends, KNOWN: ends}}


def test_the_worst_regret_of_each_law_is_found_with_its_condition():
    frame = tables_laws.worst_table(study()).set_index("law")
    assert frame.loc["linear 9 from 24", "worst regret"] == pytest.approx(0.0)
    assert frame.loc["fixed long", "worst regret"] == pytest.approx(0.5 / 1.015, rel=1e-6)
    assert frame.loc["useful", "kind"] == "law" and frame.loc["grow 12 %", "kind"] == "agnostic clock"
    assert list(frame["worst regret"]) == sorted(frame["worst regret"]) and set(frame["conditions"]) == {2}


def test_ends_say_how_far_the_last_limit_is_from_the_right_one():
    frame = tables_laws.ends_table(study()).set_index(["condition", "law"])
    right = law_study.ALL[KNOWN].right_length
    assert frame.loc[(KNOWN, "useful"), "furthest off"] == pytest.approx(60 / right - 1)
    assert frame.loc[(HACKED, "logistic"), "shortest end"] == 280


def test_savings_are_given_for_both_families_of_clocks_and_both_units():
    frame = tables_laws.savings_table(study(), "useful")
    assert set(frame["against"]) == {"knows the maximum", "agnostic"} and set(frame["unit"]) == {"tokens", "seconds"}
    assert set(frame["n"]) == {2} and (frame["ratio"] > 0).all()


def arms() -> dict:
    """Two conditions; in the second `masked` ran on one seed more and `late` not at all."""

    def made(gain: float, seeds: str) -> dict:
        found = {seed: run(gain + 0.1 * int(seed) * (gain > 1)) for seed in seeds}
        for each in found.values():
            each["curve"] |= {"mean_tokens": [30.0] * 5, "eos_rate": [0.5] * 5}
        return found

    first = {"grow 12 %": made(1.0, "123"), "masked": made(0.5, "123"), "late": made(1.2, "123")}
    return {"runs": {"l_max 96": first, "l_max 144": {"grow 12 %": made(1.0, "123"), "masked": made(0.1, "1234")}}}


def test_arms_are_compared_on_the_seeds_and_conditions_that_both_have():
    whole = 1 - 20_000 / law_study.BUDGET / 2  # of a gain that is reached linearly over the first 20,000 tokens
    frame = tables_laws.arms_table(arms()).set_index(["condition", "arm"])
    assert frame.loc[("l_max 144", "masked"), "n"] == 3
    assert frame.loc[("l_max 96", "late"), "difference"] == pytest.approx(0.4 * whole)
    late = frame.loc[("l_max 96", "late")]
    assert late["last utility"] == pytest.approx(1.4) and late["iterations"] == 1 and late["seconds"] == 22
    overall = tables_laws.arms_overall(arms()).set_index("arm")
    assert list(overall.index) == ["late", "masked"]
    assert overall.loc["masked", "difference"] == pytest.approx(-0.7 * whole)
    assert overall.loc["masked", "worst"] == pytest.approx(-0.9 * whole)
    assert overall.loc["masked", "where"] == "l_max 144"
    begun = arms()
    begun["runs"]["l_max 144"]["late"] = {"1": run(5.0)}  # one seed of a second condition so far
    assert tables_laws.arms_overall(begun).set_index("arm")["conditions"].to_dict() == {"late": 1, "masked": 2}
    assert list(overall["conditions"]) == [1, 2] and list(overall["seeds"]) == [3, 3]
    assert list(overall["higher"]) == [1, 0] and list(overall["lower"]) == [0, 2]
    assert list(overall["p_holm"]) == pytest.approx([overall["p"]["late"], 0.0], abs=1e-9)
    assert overall.loc["late", "p"] == pytest.approx(0.0202, abs=1e-4)  # t = 6.93 of two degrees


@pytest.mark.parametrize("content", [study(), arms(), {"runs": {}}], ids=["study", "arms", "nothing yet"])
def test_the_figures_draw_what_there_is(content):
    drawn = [figures.regret_map(content), figures.limit_paths(content, ("useful", "logistic"))]
    drawn.append(figures.arms_map(content))
    for figure in drawn:
        figure.draw_without_rendering()
    if content == arms():
        assert len(drawn[-1].axes[0].patches) == 5  # framed: each of the three cells, and both means
    assert len(figures.regret_map(content).data) == len(tables_laws.regret_table(content))


def stage(folder, laws: dict, rows: list[dict]):
    place = folder / "04_length_schedules"
    place.mkdir(parents=True)
    (place / "results.json").write_text(json.dumps({"laws": laws}))
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_costs_are_read_off_curves_and_metrics_and_compared_with_fixed_long(tmp_path):
    def curve(*points):
        return {"curve": [{"rollout_tokens": t, "utility": u, "reward": u} for t, u in points]}

    laws = {
        "fixed_long": {"label": "fixed 144", "seeds": {"0": curve((0, 0), (100, 1)), "1": curve((0, 0), (100, 1))}},
        "quick": {"label": "quick", "seeds": {"0": curve((0, 0), (50, 1)), "1": curve((0, 0), (50, 1))}},
        "never": {"label": "never", "seeds": {"0": curve((0, 0), (50, 0.1))}},
    }
    rows = [
        {"law": law, "seed": seed, "rollout_tokens": t, "seconds": 1.0}
        for law, step in (("fixed_long", 50), ("quick", 10))
        for seed in (0, 1)
        for t in range(step, 101, step)
    ]
    frame = tables_laws.cost_table(stage(tmp_path, laws, rows)).set_index("law")
    assert frame.loc["quick", "tokens ratio"] == pytest.approx(0.5)
    assert frame.loc["quick", "tokens"] == pytest.approx(47.5) and frame.loc["quick", "seconds"] == pytest.approx(4.75)
    assert frame.loc["fixed 144", "seconds"] == pytest.approx(1.9)
    assert frame.loc["never", "reached"] == 0


def test_rewards_at_equal_length_are_means_over_the_seeds_that_have_them():
    seeds = {
        "0": {"curve": [{"rollout_tokens": 1}], "prefix_rewards": {"32": 1.0}},
        "1": {"curve": [{"rollout_tokens": 1}], "prefix_rewards": {"32": 2.0}},
        "2": {"curve": [{"rollout_tokens": 1}], "prefix_rewards": None},
    }
    frame = tables_laws.prefix_reward_table({"laws": {"a": {"label": "a", "seeds": seeds}}})
    assert frame.loc[0, "first 32 tokens"] == 1.5 and frame.loc[0, "seeds"] == 2


def test_what_averaging_the_cut_adds_is_paired_by_seed():
    made = study()
    made["runs"]["l_max 96"] = dict(made["runs"]["l_max 96"])
    made["runs"]["l_max 96"]["useful, averaged cut"] = {seed: run(1.05 + 0.01 * int(seed)) for seed in "12"}
    table = tables_laws.averaging_table(made)
    assert list(table["condition"]) == ["l_max 96"] and list(table["law"]) == ["useful"]
    area = 1 - 10_000 / law_study.BUDGET  # a straight rise to the gain within 20,000 tokens
    assert table["difference"][0] == pytest.approx(0.1 * area) and table["n"][0] == 2
    worst = tables_laws.worst_table(made).set_index("law")
    assert worst.loc["useful, averaged cut", "kind"] == "averaged cut"
    assert set(tables_laws.savings_table(made, "useful, averaged cut")["against"]) == {"knows the maximum", "agnostic"}


def test_the_end_of_longer_runs_is_compared_with_one_clock_where_both_ran():
    table = tables_laws.last_table(study()).set_index("law")
    assert set(table["condition"]) == {"short problems"}
    assert table.loc["useful", "difference"] == pytest.approx(0.05) and table.loc["grow 12 %", "difference"] == 0
    assert tables_laws.last_table({"runs": {}}).empty


def test_the_registered_comparisons_pair_seeds_and_choose_the_best_clock_on_the_others():
    shares = {kind: 1.0 for kind in ("fixed_long", "fixed_long, averaged cut")}
    shares |= {"linear clock, averaged cut": 0.5, "useful, averaged cut": 0.4, "linear 9, averaged cut": 0.45}
    arms = {arm: {"2 threads": {"seconds": [share * (k + 1) for k in range(5)]}} for arm, share in shares.items()}
    runs = {
        f"laws-{seed}": {
            arm: {"reached": seed < 4, "limits": [round(1000 * share * (1 + 0.01 * (seed * len(arm) % 7)))]}
            for arm, share in shares.items()
        }
        for seed in range(5)
    }
    # On its own seed the slow clock is best once; chosen on the others it is not.
    runs["laws-0"]["linear clock, averaged cut"]["limits"] = [100]
    frame = tables_laws.registered_table({"runs": runs, "arms": arms}).set_index(["arm", "against"])
    best = frame.loc[("useful, averaged cut", "best clock of the other seeds")]
    spent = {arm: [math.log(sum(run[arm]["limits"])) for run in runs.values()] for arm in arms}
    others = ["linear 9, averaged cut"] + ["linear clock, averaged cut"] * 4
    gaps = [spent["useful, averaged cut"][i] - spent[clock][i] for i, clock in enumerate(others)]
    assert best["tokens"] == pytest.approx(math.exp(sum(gaps) / 5)) and best["seeds"] == 5 and best["missed"] == 1
    primary = frame[frame["kind"] == "primary"]
    assert len(primary) == 3 and (primary["p_holm"] >= primary["p"]).all()
    assert frame[frame["kind"] == "secondary"]["p_holm"].isna().all()
    seconds = ["seconds", "seconds low", "seconds high"]
    assert frame.loc[("useful, averaged cut", "fixed_long"), seconds].tolist() == pytest.approx([0.4] * 3)
    timed = math.exp((math.log(0.4 / 0.45) + 4 * math.log(0.4 / 0.5)) / 5)
    assert best["seconds"] == pytest.approx(timed), "the clock that was chosen by tokens"
    assert "generated" not in frame, "which was not counted"
    for run in runs.values():
        for arm, tokens in (("fixed_long", 800), ("useful, averaged cut", 600)):
            run[arm]["generated"] = tokens
    counted = tables_laws.registered_table({"runs": runs, "arms": arms}).set_index(["arm", "against"])["generated"]
    assert counted["useful, averaged cut", "fixed_long"] == pytest.approx(0.75) and counted.notna().sum() == 1
    clear = frame.loc[("useful, averaged cut", "fixed_long")]
    assert clear["tokens"] == pytest.approx(0.4, rel=0.1) and clear["tokens high"] < 1 and clear["p_holm"] < 0.001


def test_final_utility_is_that_of_the_last_two_evaluations_paired_by_seed():
    runs = {
        f"laws-{seed}": {
            "linear clock, averaged cut": {"utility": [0.0, 2.0 + 0.1 * seed, 2.4 + 0.1 * seed]},
            "fixed_long": {"utility": [9.0, 2.0, 2.2]},
        }
        for seed in range(3)
    }
    found = tables_laws.registered_utility({"runs": runs})
    assert found.value == pytest.approx(0.2) and found.n == 3 and found.low < 0.2 < found.high
