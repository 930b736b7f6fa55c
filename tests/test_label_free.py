"""Choosing a coefficient without labels: what each rule takes, what that costs, and its tables."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from c2f_utils import stats
from c2f_utils.errors import C2FError
from c2f_utils.measure import label_free
from c2f_utils.report import contents, tables_label_free

STAGE = "06_residue_merging"
GRID = (0.2, 0.5, 1.0)


def test_answers_agree_where_both_state_the_same_result():
    assert label_free.agreement([3, 4, None, 0], [3, 5, None, 0]) == 0.5
    with pytest.raises(C2FError, match="1 answers are compared with 2"):
        label_free.agreement([1], [1, 2])


def test_the_majority_is_that_over_coefficients_and_a_tie_counts_in_part():
    votes = [[1, 7, None], [1, 8, None], [2, None, None]]
    assert label_free.agreement_with_majority(votes) == pytest.approx([0.5, 0.5, 0.0])
    with pytest.raises(C2FError, match="at least one coefficient and one prompt"):
        label_free.agreement_with_majority([[], []])


POINTS = st.lists(st.tuples(st.floats(0, 1), st.floats(1.0, 50.0)), min_size=1, max_size=12)


@given(POINTS)
def test_what_is_nearest_to_the_ideal_is_beaten_by_no_other_point_in_both(points):
    high, low = zip(*points, strict=True)
    chosen = label_free.nearest_to_ideal(high, low)
    beaten = [k for k in range(len(points)) if high[k] > high[chosen] + 1e-6 and low[k] < low[chosen] * (1 - 1e-6)]
    assert not beaten


def test_agreement_is_weighed_against_perplexity_on_equal_scales():
    assert label_free.nearest_to_ideal([0.2, 0.75, 0.8], [2.0, 2.2, 8.0]) == 1
    assert label_free.nearest_to_ideal([0.02, 0.075, 0.08], np.exp([0.2, 0.4, 3.0])) == 1
    assert label_free.nearest_to_ideal([0.5, 0.5, 0.5], [3.0, 2.0, 2.5]) == 1
    assert label_free.nearest_to_ideal([0.5, 0.6, 0.6], [2.0, 2.0, 2.0]) == 1  # the first of equal ones


def row(majority, draws, perplexity, prompts, reward, tokens, score) -> dict:
    keys = (
        "agreement_majority",
        "agreement_draws",
        "perplexity",
        "prompt_perplexity",
        "reward",
        "mean_tokens",
        "score",
    )
    return dict(zip(keys, (majority, draws, perplexity, prompts, reward, tokens, score), strict=True))


ROWS = [
    row(0.9, 0.5, 2.0, 3.0, 0.0, 10.0, 1.0),
    row(0.5, 0.9, 2.0, 3.5, 0.5, 20.0, 2.0),
    row(0.5, 0.8, 2.0, 3.0, 1.5, 80.0, 1.5),
]
JUDGED = [{"utility": 1.0, "score": 0.8}, {"utility": 2.0, "score": 1.6}, {"utility": 2.5, "score": 0.9}]


def test_every_rule_chooses_by_its_own_quantities():
    chosen = label_free.choices(ROWS, token_price=0.02)
    assert chosen == {"agreement_majority": 0, "agreement_draws": 1, "dots": 2, "reward": 1, "checker": 1}
    assert label_free.choices(ROWS, token_price=0.0)["reward"] == 2
    unknown = [{**one, "agreement_majority": None, "agreement_draws": None, "score": None} for one in ROWS]
    assert {rule for rule, k in label_free.choices(unknown, 0.02).items() if k is not None} == {"reward"}


def test_regret_is_what_the_checker_s_choice_is_better_by_on_other_answers():
    chosen = label_free.choices(ROWS, token_price=0.02)
    found = {one["rule"]: one for one in label_free.regrets(GRID, chosen, JUDGED)}
    assert found["checker"] == {
        "rule": "checker", "coefficient": 0.5, "same": 1.0, "regret_utility": 0.0, "regret_score": 0.0,
    }  # fmt: skip
    assert found["agreement_majority"]["regret_utility"] == 1.0 and found["agreement_majority"]["same"] == 0.0
    assert found["dots"]["regret_utility"] == -0.5 and found["dots"]["regret_score"] == pytest.approx(0.7)
    assert found["blind"]["same"] == pytest.approx(1 / 3) and found["blind"]["coefficient"] is None
    assert found["blind"]["regret_utility"] == pytest.approx(2.0 - 5.5 / 3)


def test_without_a_checker_no_regret_is_claimed():
    unknown = [{**one, "agreement_majority": None, "agreement_draws": None, "score": None} for one in ROWS]
    found = label_free.regrets(GRID, label_free.choices(unknown, 0.02), None)
    assert {one["coefficient"] for one in found if one["rule"] == "reward"} == {0.5}
    assert all(one[key] is None for one in found for key in ("same", "regret_utility", "regret_score"))


def results(shift: float = 0.0, checker: bool = True) -> dict:
    judged = [{**one, "utility": one["utility"] + shift * k} for k, one in enumerate(JUDGED)]
    rows = [{"coefficient": c, **one, "judged": j if checker else None}
            for c, one, j in zip(GRID, ROWS, judged, strict=True)]  # fmt: skip
    if not checker:
        rows = [{**one, "agreement_majority": None, "agreement_draws": None, "score": None} for one in rows]
    rules = label_free.regrets(GRID, label_free.choices(rows, 0.02), judged if checker else None)
    return {"label_free": {"rows": rows, "rules": rules, "prompts": 8, "token_price": 0.02}}


def test_tables_say_what_each_rule_chose_and_by_what():
    table = tables_label_free.label_free_table(results())
    assert len(table) == 6 and list(table["coefficient"])[:5] == [0.2, 0.5, 1.0, 0.5, 0.5]
    quantities = tables_label_free.quantities_table(results())
    assert list(quantities["coefficient"]) == [*GRID] and list(quantities["utility"]) == [1.0, 2.0, 2.5]
    assert "8 validation prompts, 0.02 per token; regret" in tables_label_free.in_words(results())
    assert "no regret is known" in tables_label_free.in_words(results(checker=False))
    assert tables_label_free.quantities_table(results(checker=False))["utility"].isna().all()


def test_a_run_in_which_it_is_off_says_so_and_has_no_such_table():
    assert "add label_free to merge.sections" in tables_label_free.in_words({"sweep": []})
    made = {key: make for key, make, _ in contents.tables_of(STAGE, {"sweep": []}) if key.startswith("label_free")}
    assert len(made) == 2 and all(make().empty for make in made.values())


def test_regret_over_seeds_has_t_intervals_over_runs(outputs):
    shifts = (0.0, 0.3, 0.9)
    for seed, shift in enumerate(shifts):
        (folder := outputs / f"chosen-s{seed}" / STAGE).mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results(shift)))
    runs = [{"run": f"chosen-s{seed}", "seed": seed, "point": {}} for seed in range(3)]
    record = {"sweep": "chosen", "notebooks": [STAGE], "profile": "tiny", "grid": {}, "seeds": [0, 1, 2], "runs": runs}
    (outputs / "chosen").mkdir()
    (outputs / "chosen" / "sweep.json").write_text(json.dumps(record))
    table = tables_label_free.regret_over_seeds("chosen")
    assert table.equals(tables_label_free.regret_over_seeds([results(shift) for shift in shifts]))
    found = table.set_index("rule").loc[tables_label_free.RULES["agreement_majority"]]
    wanted = stats.seed_interval([1.0 + shift for shift in shifts])  # the checker takes the second coefficient
    assert (found["regret_utility"], found["regret_utility_low"], found["regret_utility_high"]) == wanted[:3]
    assert found["seeds"] == 3 and found["same"] == 0.0
    assert table.set_index("rule").loc[tables_label_free.RULES["reward"], "same"] == 1.0


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([], "regret over no runs"),
        ([{"sweep": []}], "run 1: nothing was chosen without labels; run 06 again"),
        ([results(), results(checker=False)], "run 2: regret needs a checker"),
    ],
)
def test_regret_over_seeds_refuses_runs_that_do_not_know_it(sources, said):
    with pytest.raises(C2FError, match=said):
        tables_label_free.regret_over_seeds(sources)
