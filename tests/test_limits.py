"""Laws on synthetic signals: each does what its docstring says, keeps its state, and refuses what it cannot use."""

import dataclasses
import json
import random

import numpy as np
import pytest
from reference_ppo import Logistic

from c2f_utils import limits
from c2f_utils.errors import C2FError
from c2f_utils.settings.laws import Law as LawSettings
from c2f_utils.settings.laws import make_law

ALL = {
    "fixed": {"limit": 40},
    "clock": {"shape": "linear", "start": 24, "maximum": 144, "duration": 17},
    "logistic": {"start": 24, "maximum": 144, "step": 8},
    "tail": {"start": 24, "maximum": 144, "growth": 0.12},
    "useful": {"start": 24, "maximum": 144, "growth": 0.12},
    "gated": {"start": 24, "maximum": 144, "growth": 0.2},
    "probe": {"start": 24, "maximum": 144, "growth": 0.2},
}


def make(name: str, **changes) -> limits.Law:
    return make_law(LawSettings(name=name, **(ALL[name] | changes)))


def signals(iteration: int, rng: random.Random) -> limits.Signals:
    drawn = [rng.randint(20, 40) for _ in range(8)]
    return limits.Signals(
        iteration=iteration, reward=rng.gauss(0, 1), value_error=rng.random(), truncated_share=rng.random(),
        tail_return=rng.gauss(0.2, 0.2), value_slope=rng.gauss(0, 0.1), tail_repetition=rng.random(), kl_per_token=0.02,
        useful_length=24 + 100 * rng.random(),
        rewards=tuple(rng.gauss(n / 40, 0.1) for n in drawn), limits=tuple(drawn),
    )  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_a_law_restored_from_its_state_goes_on_as_if_never_stopped(name):
    rng = random.Random(0)
    stream = [signals(i, rng) for i in range(20)]
    whole, first = make(name), make(name)
    expected = [whole.update(s) for s in stream]
    for s in stream[:9]:
        first.update(s)
    second = make(name)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.update(s) for s in stream[9:]] == expected[9:]


@pytest.mark.parametrize("name", ALL)
def test_no_law_leaves_its_bounds_and_each_gives_a_reason(name):
    rng = random.Random(1)
    law = make(name)
    for i in range(60):
        limit = law.update(signals(i, rng))
        assert isinstance(limit, int) and min(24, ALL[name].get("limit", 24)) <= limit <= law.largest
        assert law.reason and law.reason != "start"
        assert all(0 < drawn <= law.largest for drawn in law.draw(16, rng))


@pytest.mark.parametrize("name", ["logistic", "tail", "useful", "gated", "probe"])
def test_a_law_refuses_when_a_signal_it_needs_was_not_measured(name):
    with pytest.raises(C2FError, match=r"needs .* does not measure"):
        make(name).update(limits.Signals(iteration=0))


def test_the_linear_clock_arrives_exactly_when_told():
    law = make("clock")
    path = [law.update(limits.Signals(iteration=i)) for i in range(20)]
    assert path[16] == 144 and path[15] < 144 and path[19] == 144
    steps = [b - a for a, b in zip(path[:16], path[1:17], strict=True)]
    assert max(steps) - min(steps) <= 1


def test_the_geometric_clock_grows_by_a_constant_factor():
    law = make("clock", shape="geometric", duration=10)
    path = [24] + [law.update(limits.Signals(iteration=i)) for i in range(10)]
    assert path[-1] == 144
    assert all(b / a == pytest.approx(6**0.1, rel=0.04) for a, b in zip(path, path[1:], strict=False))


def test_the_cosine_clock_eases_in_and_out():
    law = make("clock", shape="cosine", duration=20)
    path = [24] + [law.update(limits.Signals(iteration=i)) for i in range(20)]
    assert path[10] == (24 + 144) / 2 and path[-1] == 144
    assert path[5] == round(24 + 120 * (1 - 0.5**0.5) / 2), "a quarter of the way round the half circle"


def test_staged_lengthening_visits_its_stages_for_equal_times():
    law = make("clock", shape="steps", steps=[24, 48, 144], start=24, duration=9)
    path = [24] + [law.update(limits.Signals(iteration=i)) for i in range(9)]
    assert path[:9] == [24, 24, 24, 48, 48, 48, 144, 144, 144]


def logistic_growth(**changes) -> float:
    base = {"iteration": 1, "reward": 0.0, "value_error": 0.5, "truncated_share": 0.5}
    law = make("logistic", step=100, maximum=1000)
    law.update(limits.Signals(**base))
    before = law.exact
    law.update(limits.Signals(**(base | changes)))
    return law.exact - before


def test_the_logistic_law_grows_faster_with_reward_and_truncation_and_slower_with_value_error():
    neutral = logistic_growth()
    assert logistic_growth(reward=1.0) > neutral > logistic_growth(reward=-1.0)
    assert logistic_growth(truncated_share=0.9) > neutral > logistic_growth(truncated_share=0.1)
    assert logistic_growth(value_error=0.1) > neutral > logistic_growth(value_error=0.9)


def test_the_logistic_law_follows_its_formula():
    rng, law, naive = random.Random(4), make("logistic"), Logistic(24, 144, 8)
    for i, jump in enumerate([0, 0, 5, 0, -5, -50, 0, 0, 0.1, 0, 0, 0]):
        reward, error, share = jump + rng.gauss(0, 0.3), rng.random(), rng.random()
        law.update(limits.Signals(iteration=i, reward=reward, value_error=error, truncated_share=share))
        naive.update(reward, error, share)
        assert law.exact == pytest.approx(naive.exact) and law.limit == naive.limit
    assert 24 < law.limit < 144


def test_in_paper_mode_truncation_has_no_say():
    law = {"weights": {"truncation": 0.0}}
    paths = []
    for share in (0.0, 1.0):
        one = make("logistic", **law)
        paths.append(
            [
                one.update(limits.Signals(iteration=i, reward=0.1 * i, value_error=0.4, truncated_share=share))
                for i in range(6)
            ]
        )
    assert paths[0] == paths[1]


def test_tail_grows_freely_until_the_tail_has_paid_once_and_brakes_when_it_has_faded():
    law = make("tail", maximum=10_000)
    early = [law.update(limits.Signals(iteration=i, tail_return=0.0)) for i in range(5)]
    assert all(b > a for a, b in zip(early, early[1:], strict=False))
    for i in range(5):
        law.update(limits.Signals(iteration=i, tail_return=0.5))
    for i in range(12):
        held = law.update(limits.Signals(iteration=i, tail_return=0.0))
    assert law.update(limits.Signals(iteration=30, tail_return=0.0)) == held
    for i in range(4):
        released = law.update(limits.Signals(iteration=i, tail_return=0.5))
    assert released > held


def test_the_tail_law_follows_its_formula():
    law = make("tail", maximum=10_000)
    # Running mean 1/4, 1/8, 1/16, 1/32; its peak is 1/4, so full growth above 1/8 and none below 1/20.
    shares = (1, 1, (1 / 16 - 0.05) / 0.075, 0)
    expected = 24.0
    for share, tail in zip(shares, (0.5, 0.0, 0.0, 0.0), strict=True):
        law.update(limits.Signals(iteration=0, tail_return=tail))
        expected *= 1 + 0.12 * share
        assert law.exact == pytest.approx(expected)


def heard(**changes) -> limits.Signals:
    return limits.Signals(
        **(
            {"iteration": 0, "truncated_share": 0.9, "tail_return": 0.5, "tail_repetition": 0.1, "useful_length": 50.0}
            | changes
        )
    )


def test_useful_stops_at_a_tail_that_repeats_itself_however_well_it_is_paid():
    law = make("useful", maximum=10_000)
    for _ in range(10):
        law.update(heard(useful_length=1e6))
    assert law.limit == pytest.approx(24 * 1.12**10, rel=0.02)
    for _ in range(20):
        law.update(heard(tail_return=5.0, tail_repetition=0.9, useful_length=1e6))
    assert law.limit < 24 * 1.12**13


def test_useful_goes_back_to_the_useful_length_with_room_and_up_again_when_it_grows():
    law = make("useful", start=100, maximum=1000)
    law.minimum = 24
    for _ in range(30):
        law.update(heard(tail_return=0.5, tail_repetition=0.9, useful_length=50.0))
    assert law.limit == 60
    for _ in range(30):
        law.update(heard(tail_return=0.5, tail_repetition=0.2, useful_length=80.0))
    assert law.limit == 96


def test_useful_never_shrinks_on_the_word_of_the_reward_alone():
    law = make("useful", start=100, maximum=1000)
    law.minimum = 24
    for _ in range(30):
        law.update(heard(tail_return=0.5, tail_repetition=0.2, useful_length=10.0))
        law.update(heard(tail_return=-0.5, tail_repetition=0.2, useful_length=10.0))
    assert law.limit >= 100


def test_useful_grows_freely_while_few_answers_are_cut_and_holds_once_they_are():
    law = make("useful", start=100, maximum=1000)
    for _ in range(10):
        law.update(heard(truncated_share=0.1, tail_return=0.0, tail_repetition=0.9, useful_length=40.0))
    assert law.limit == round(100 * 1.12**10) and not law.found
    for _ in range(100):
        law.update(heard(truncated_share=0.9, tail_repetition=0.9, useful_length=40.0))
    assert law.found and law.limit == 100  # no lower than where it began


def test_gated_backs_off_when_the_tail_repeats_itself():
    law = make("gated", start=100, maximum=200)
    law.minimum = 24
    for i in range(6):
        limit = law.update(limits.Signals(iteration=i, truncated_share=1.0, value_slope=0.1, tail_repetition=0.95))
    assert limit < 100


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 120),
        ({"truncated_share": 0.2}, 100),
        ({"value_slope": -0.05}, 100),
        ({"tail_repetition": 0.7}, 100),
        ({"tail_repetition": 0.9}, 90),
    ],
)
def test_gated_grows_only_when_all_witnesses_agree(changes, expected):
    law = make("gated", start=100, maximum=200)
    law.minimum = 24
    agreed = {"iteration": 0, "truncated_share": 0.5, "value_slope": 0.0, "tail_repetition": 0.1}
    assert law.update(limits.Signals(**(agreed | changes))) == expected


def test_the_probe_law_follows_its_formula():
    rng, law, slopes, expected = random.Random(5), make("probe", start=100, maximum=1000), [], 100.0
    drawn = law.draw(2000, rng)
    assert 75 <= min(drawn) < 77 and 123 < max(drawn) <= 125, "a quarter of the limit to both sides"
    for i in range(14):
        drawn = law.draw(16, rng)
        rewards = [0.3 * n / law.limit + rng.gauss(0, 0.05) for n in drawn]
        slopes.append(np.polyfit(np.log(drawn), rewards, 1)[0])
        law.update(limits.Signals(iteration=i, limits=tuple(drawn), rewards=tuple(rewards)))
        if i < 10:
            mean = sum(slopes) / len(slopes)
        else:
            mean += (slopes[-1] - mean) / 10
        share = 1.0 if i < 4 else min(1.0, max(-0.5, mean / 0.5))
        expected = max(100.0, expected * (1 + 0.2 * share))
        assert law.exact == pytest.approx(expected) and law.slope == pytest.approx(mean)
    assert 200 < law.limit < 1000


def test_probe_follows_the_causal_slope_in_both_directions():
    for sign in (1, -1):
        law = make("probe", start=100, maximum=400)
        law.minimum = 10
        rng = random.Random(3)
        for i in range(30):
            drawn = law.draw(64, rng)
            law.update(limits.Signals(iteration=i, limits=tuple(drawn), rewards=tuple(sign * d / 50 for d in drawn)))
        assert law.limit > 300 if sign > 0 else law.limit < 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "fixed", "start": 3, "limit": 5}, "not used by it: start"),
        ({"name": "clock", "start": 3}, "missing: maximum, duration, shape"),
        ({"name": "logistic", "start": 200, "maximum": 144, "step": 8}, "above maximum"),
        ({"name": "clock", "start": 3, "maximum": 9, "duration": 4, "shape": "steps"}, "belong together"),
        ({"name": "clock", "start": 3, "maximum": 9, "duration": 4, "shape": "steps", "steps": [3, 10]}, "none above"),
        (
            {"name": "clock", "start": 4, "maximum": 9, "duration": 4, "shape": "steps", "steps": [3, 9]},
            "to be the start",
        ),
        ({"name": "logistic", "start": 2, "maximum": 9, "step": 1, "weights": {"rewrd": 1.0}}, "unknown weights rewrd"),
    ],
)
def test_an_impossible_law_is_refused_with_what_it_takes(changes, message):
    with pytest.raises(C2FError, match=message):
        make_law(LawSettings(**changes))


def test_a_law_written_by_a_user_needs_only_a_limit_and_an_update():
    @dataclasses.dataclass
    class Doubling(limits.Law):
        def update(self, signals):
            self.limit = min(64, self.limit * 2)
            self.reason = "doubled"
            return self.limit

    law = Doubling(8)
    assert [law.update(limits.Signals(iteration=i)) for i in range(4)] == [16, 32, 64, 64]


@pytest.mark.parametrize("name", ["gated", "probe"])
def test_growth_below_half_a_token_adds_up(name):
    law = make(name, growth=0.02)
    rewards, drawn = tuple(range(8)), tuple(range(20, 28))  # a steep slope: full growth
    for i in range(40):
        law.update(
            limits.Signals(
                iteration=i, truncated_share=1.0, value_slope=0.1, tail_repetition=0.0, rewards=rewards, limits=drawn
            )
        )
    assert law.limit == round(24 * 1.02**40)


def test_a_limit_beyond_what_was_checked_is_refused_with_the_law():
    law = make("fixed")
    limits.refuse_beyond(law, [1, 144], 144)
    for wrong in (0, 145):
        with pytest.raises(C2FError, match=f"law Fixed asks for {wrong} tokens; expected 1 to 144"):
            limits.refuse_beyond(law, [10, wrong], 144)


def test_a_checkpoint_of_the_same_law_with_other_constants_is_refused():
    saved = make("tail", growth=0.12)
    limits.refuse_another(make("tail", growth=0.12), "Tail", saved.state_dict(), "step-3")
    limits.refuse_another(make("tail", growth=0.2), "Tail", None, "step-3")  # written before constants were kept
    with pytest.raises(C2FError, match=r"another law Tail \(growth: 0.12 then, 0.2 now\)"):
        limits.refuse_another(make("tail", growth=0.2), "Tail", saved.state_dict(), "step-3")
    with pytest.raises(C2FError, match="under law Tail, now Useful"):
        limits.refuse_another(make("useful"), "Tail", saved.state_dict(), "step-3")
