"""The study of laws: its measures on curves whose answers are known, its conditions, and one toy run end to end."""

import math

import law_runs
import laws as benchmark
import pytest
import torch
from tiny_models import TOKENIZER, PrefixReward, causal

from c2f_utils import limits
from c2f_utils.domain import stories
from c2f_utils.domain.problems import EOS, check
from c2f_utils.domain.samples import Sample, make_prompts
from c2f_utils.report import law_study
from c2f_utils.settings.laws import Law, make_law
from c2f_utils.settings.load import load_settings
from c2f_utils.stages.inputs import Inputs


def scored() -> torch.nn.Module:
    """A random reward model of the tiny shape, for the critic to start from."""
    from transformers import AutoModelForSequenceClassification, MistralConfig

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(
        MistralConfig(**causal().config.to_diff_dict() | {"num_labels": 1})
    ).eval()


def methods() -> dict:
    return {name: getattr(PrefixReward, name) for name in ("prefix_scores", "__call__")}


def run(*points: tuple[float, float], seconds: float = 0.01) -> dict:
    tokens, values = zip(*points, strict=True)
    curve = {"tokens": tokens, "utility": values, "seconds": [t * seconds for t in tokens]}
    return {"curve": curve, "limits": [24, 30, 36]}


def test_mean_utility_is_the_area_up_to_the_budget_and_no_further():
    straight = run((0, 0.0), (100, 1.0))
    assert law_study.mean_utility(straight, 100) == pytest.approx(0.5)
    assert law_study.mean_utility(run((0, 0.0), (50, 0.5), (200, 2.0)), 100) == pytest.approx(0.5)
    assert law_study.mean_utility(run((0, 0.0), (10, 1.0), (100, 1.0)), 100) == pytest.approx(0.95)


def test_cost_waits_for_two_evaluations_in_a_row_and_charges_a_run_that_never_arrives_in_full():
    lucky = run((0, 0.0), (10, 1.0), (20, 0.5), (30, 1.0), (40, 1.1))
    assert law_study.cost_to(lucky, 1.0, budget=50) == (40.0, True)
    assert law_study.cost_to(lucky, 1.0, "seconds", budget=50) == (pytest.approx(0.4), True)
    assert law_study.cost_to(lucky, 2.0, budget=50) == (50.0, False)
    assert law_study.cost_to(run((0, 0.0), (64, 0.1)), 2.0, budget=50) == (50.0, False)  # overshoot is not charged
    assert law_study.cost_to(run((0, 0.0), (64, 0.1)), 2.0, "seconds", budget=50) == (pytest.approx(0.5), False)
    long = run((0, 0.0), (40, 0.1), (55, 1.0), (70, 1.0))
    assert law_study.cost_to(long, 1.0, budget=50) == (50.0, False)  # what lies beyond the budget does not count
    assert law_study.cost_to(long, 1.0, budget=60) == (60.0, True)  # in the run that passes it, as late as it can be


def seeds(*gains: float) -> dict:
    return {str(seed): run((0, 0.0), (law_study.BUDGET, 2 * gain)) for seed, gain in enumerate(gains)}


def test_regret_is_the_share_of_the_best_clocks_gain_and_negative_when_no_clock_is_as_good():
    laws = {"slow": seeds(0.5, 0.7), "right": seeds(1.0, 1.2), "law": seeds(1.1, 1.3)}
    found = law_study.regrets(laws, ["slow", "right"])
    assert found["right"]["regret"] == 0 and found["right"]["best"] == "right"
    assert found["slow"]["regret"] == pytest.approx(0.5 / 1.1)
    assert found["law"]["regret"] == pytest.approx(-0.1 / 1.1)
    assert found["law"]["low"] == pytest.approx(found["law"]["high"])  # equal on both seeds


def test_a_law_is_compared_on_the_seeds_that_it_shares_with_all_clocks():
    laws = {"a": seeds(1.0, 2.0, 9.0), "b": seeds(1.0, 1.0), "law": seeds(0.5), "none": {}}
    assert law_study.complete_seeds({name: laws[name] for name in "ab"}) == ["0", "1"]
    found = law_study.regrets(laws, ["a", "b"])
    assert found["a"]["n"] == 2 and found["law"]["n"] == 1 and "none" not in found
    assert found["a"]["best"] == "a" and found["law"]["regret"] == pytest.approx(0.5 / 1.5)  # of the clocks' mean gain


def test_savings_compare_with_the_cheapest_clock_seed_by_seed():
    def steep(at: int) -> dict:
        return run((0, 0.0), (at, 1.0), (at + 1_000, 1.0), (law_study.BUDGET, 1.0))

    laws = {
        "law": {"0": steep(9_000), "1": steep(19_000)},
        "clock": {"0": steep(19_000), "1": steep(39_000)},
        "late": {"0": steep(40_000), "1": steep(50_000)},
    }
    found = law_study.savings(laws, "law", ["clock", "late"])
    assert found["clock"] == "clock" and found["ratio"] == pytest.approx(0.5) and found["missed"] == 0
    assert found["low"] <= 0.5 <= found["high"]


def test_what_a_law_could_save_at_most_is_what_the_clock_spent_beyond_its_last_limit():
    def steep(*limits: int) -> dict:
        return run((0, 0.0), (9_000, 1.0), (10_000, 1.0), (law_study.BUDGET, 1.0)) | {"limits": list(limits)}

    clock = {str(seed): steep(50, 100, 200, 400) for seed in range(2)}
    law = {"0": steep(24, 50), "1": steep(24, 400)}  # 10,000 tokens: the clock's first three iterations, 350 an answer
    found = law_study.savings({"law": law, "clock": clock}, "law", ["clock"])
    assert found["beyond"] == pytest.approx((200 / 350 + 0) / 2)


@pytest.mark.parametrize(("tokens", "beyond"), [(9_600, 50 / 150), (9_601, 200 / 350)])
def test_what_a_clock_has_spent_counts_whole_iterations_of_64_answers(tokens, beyond):
    def steep(*limits: int) -> dict:
        return run((0, 0.0), (9_000, 1.0), (tokens, 1.0), (law_study.BUDGET, 1.0)) | {"limits": list(limits)}

    clock = {str(seed): steep(50, 100, 200, 400) for seed in range(2)}  # 64 x (50 + 100) = 9,600
    law = {str(seed): steep(24, 50) for seed in range(2)}
    assert law_study.savings({"law": law, "clock": clock}, "law", ["clock"])["beyond"] == pytest.approx(beyond)


@pytest.mark.parametrize("condition", law_study.CONDITIONS.values())
def test_every_clock_of_the_grid_ends_at_the_conditions_maximum(condition):
    clocks = law_study.grid(condition.maximum)
    assert len(clocks) >= 8
    for settings in {**clocks, **law_study.agnostic(condition.maximum)}.values():
        law = make_law(settings)
        for iteration in range(60):
            limit = law.update(limits.Signals(iteration=iteration))
        assert limit == condition.maximum


def test_an_agnostic_clock_grows_alike_whatever_the_maximum():
    for name in law_study.agnostic(96):
        paths = []
        for maximum in (288, 576):
            law = make_law(law_study.agnostic(maximum)[name])
            paths.append([law.update(limits.Signals(iteration=i)) for i in range(10)])
        assert all(math.isclose(a, b, rel_tol=0.05) for a, b in zip(*paths, strict=True))


def test_a_paid_reward_pays_every_prefix_for_its_own_length():
    class Flat:
        def prefix_scores(self, samples):
            return [torch.full((len(s),), 2.0) for s in samples]

    paid = law_runs.Paid(Flat(), bonus=0.5, quality=0.0)
    assert paid([[1, 2, 3], [4]]).tolist() == [1.5, 0.5]
    assert paid.prefix_scores([[1, 2, 3]])[0].tolist() == [0.5, 1.0, 1.5]


def test_law_settings_of_the_grid_are_ordinary_laws():
    assert all(isinstance(law, Law) for law in law_study.grid(144).values())


def test_the_reward_up_to_the_first_result_rises_with_it_and_not_after():
    problem = stories.Problem("anna", "coins", 3, (("finds", 2), ("loses", 1)))
    worked = "let us think . start with 3 . first finds 2 so 3 + 2 = 5 . second loses 1 so 5 - 1 = 4 . answer : 4 ."
    after = " let us check . answer : 9 . answer : 4 ."
    answers = [
        Sample(make_prompts([problem])[0], stories.encode((worked + more).split()), "limit", 99) for more in ("", after)
    ]
    reward = law_runs.FirstAnswer()
    short, long = reward.prefix_scores(answers)
    right = law_study.Condition(288, (2, 2), known=True).right_length
    assert right == len(worked.split()) == len(short)
    assert long[right - 1] == short[-1] == long[-1] and long[right - 2] < long[right - 1]
    assert reward(answers).tolist() == [check(problem, answers[0].ids).utility] * 2


def test_a_toy_run_spends_its_budget_and_measures_on_the_way(monkeypatch):
    class Stage:
        stop_requested = staticmethod(lambda: False)

    class Toy(Inputs):
        def __init__(self):
            self.settings = load_settings("smoke", overrides={"data.train_prompts": 16})
            self.run = type("Run", (), {"here": Stage})

        tokenizer = TOKENIZER
        reward = type("Model", (), {"model": scored(), "mean": 0.0, "std": 1.0, **methods()})()

        def base(self):
            return causal()

    monkeypatch.setattr(law_runs, "EVALUATED", 4)
    law = make_law(Law(name="useful", start=8, maximum=32))
    found = law_runs.run_one(Toy(), law_study.Condition(32), law, budget=400, every=2)
    tokens = found["curve"]["tokens"]
    assert tokens[0] == 0 and tokens[-1] >= 400 > tokens[-2] and len(tokens) == len(found["curve"]["utility"])
    assert found["limits"][0] == 8 and found["limits"][-1] == law.limit
    again = law_runs.run_one(
        Toy(), law_study.Condition(32), make_law(Law(name="useful", start=8, maximum=32)), budget=400, every=2
    )
    assert again["limits"] == found["limits"] and again["curve"]["utility"] == found["curve"]["utility"]


@pytest.mark.parametrize("arm", law_study.rivals(288))
def test_what_others_do_about_length_is_made_of_settings_that_exist(arm):
    for condition in (law_study.CONDITIONS | law_study.UNLEARNING).values():
        found = law_study.rivals(condition.maximum)[arm]
        settings = load_settings("tiny", overrides={f"coarse.{key}": value for key, value in found.changes.items()})
        assert {key: getattr(settings.coarse, key) for key in found.changes} == found.changes
        assert make_law(found.law).largest <= condition.maximum


def test_a_base_that_writes_long_answers_and_ends_them_has_read_whole_analyses_alone():
    for document in law_runs._complete(5000, 0, (5, 5)):
        text = stories.decode(document)
        question, answer = text.split("?")
        assert document[-1] == EOS and answer.split()[:4] == "let us think .".split()
        assert answer.count("so") == 5 and answer.count("answer :") == 1, "five steps and one result"


def test_noise_is_in_what_a_law_sees_and_not_in_what_is_paid():
    class Flat:
        def prefix_scores(self, samples):
            return [torch.full((n,), 2.0) for n in samples]

        def __call__(self, samples):
            return torch.full((len(samples),), 2.0)

    lengths = [400] * 50
    noisy = law_runs.Noisy(Flat(), 0.5, torch.Generator().manual_seed(0))
    rows = torch.stack(noisy.prefix_scores(lengths))
    assert (rows[:, -1] == 2.0).all() and noisy(lengths).tolist() == [2.0] * 50
    assert rows[:, :-1].std().item() == pytest.approx(0.5, rel=0.02)
    assert rows.mean().item() == pytest.approx(2.0, abs=0.02)
    again = law_runs.Noisy(Flat(), 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(torch.stack(again.prefix_scores(lengths)), rows)


@pytest.mark.parametrize(
    ("to", "field", "low", "high", "others"),
    [
        ("repetition", "tail_repetition", 0.0, 0.9, {"tail_return": 1.0, "useful_length": 30.0}),
        ("tail return", "tail_return", 0.0, 1.0, {"tail_repetition": 0.0, "useful_length": 30.0}),
        ("useful length", "useful_length", 10.0, 80.0, {"tail_return": 0.0, "tail_repetition": 0.9}),
    ],
)
def test_a_deaf_law_goes_its_way_whatever_the_witness_says_and_a_whole_one_does_not(to, field, low, high, others):
    began = {"truncated_share": 1.0, "tail_return": 1.0, "tail_repetition": 0.3, "useful_length": 100.0}
    settings = law_study.laws(288)["useful"]

    def path(law: limits.Law, said: float) -> list[int]:
        heard = [began] * 12 + [{"truncated_share": 1.0, field: said} | others] * 12
        return [law.update(limits.Signals(iteration=i, **each)) for i, each in enumerate(heard)]

    assert path(law_runs.deaf(settings, to), low) == path(law_runs.deaf(settings, to), high)
    assert path(make_law(settings), low) != path(make_law(settings), high)


def test_a_learned_reward_is_fitted_to_the_checkers_order_up_to_the_first_result(monkeypatch):
    class Toy:
        settings = load_settings(
            "smoke", overrides={"reward.pairs": 60, "reward.label_noise": 0.0, "reward.base_share": 0.0}
        )
        tokenizer, base_source = TOKENIZER, "nowhere"

        def base(self):
            return causal()

    fitted = []

    def fit(source, pairs, *_, **__):
        fitted.extend(pairs)
        return scored()

    monkeypatch.setattr(law_runs.rewards, "train", fit)
    toy = Toy()
    assert law_runs.learned_first_answer(toy) is law_runs.learned_first_answer(toy), "trained once for a seed"
    problems = {
        tuple(p.problem.prompt_ids): make_prompts([p.problem])[0]
        for p in law_runs.data.embedded_pairs(toy.settings, causal(), TOKENIZER, 60, toy.settings.seed)
    }
    gaps = []
    for chosen, rejected in fitted:
        size = chosen.index(stories.IDS["?"]) + 1
        prompt = problems[tuple(chosen[:size])]
        worth = law_runs.FirstAnswer()([Sample(prompt, ids[size:], "limit", 99) for ids in (chosen, rejected)])
        gaps.append(float(worth[0] - worth[1]))
    assert len(gaps) == 60 and min(gaps) >= 0 and max(gaps) > 1


def test_the_conditions_of_the_witnesses_are_left_to_their_own_study():
    assert not law_study.witnesses("l_max 96")
    for name in law_study.NOISY | law_study.LEARNED:
        assert not benchmark.jobs([name], []) and not benchmark.rivals([name], [])
        assert law_study.ALL[name].right_length in (42, 62)
    arms = [(condition, arm) for condition, arm, *_ in benchmark.witnesses(list(law_study.ALL), [])]
    assert len(arms) == len(set(arms)) == 4 * 3 + 1 * 4 + 5 * 2
    paths = {benchmark.path_of(1, *arm, "witnesses") for arm in arms}
    assert len(paths) == len(arms)
