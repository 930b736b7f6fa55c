"""What length costs, and what becomes of answers that the limit cut, beyond the comparison with `reference_ppo.py`."""

import pytest
import torch
from tiny_models import LAWS, PrefixReward, trainer, weights

from c2f_utils.coarse.experience import Experience
from c2f_utils.coarse.shaping import DualPrice, last_prefixes, overlong
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import C2FError
from c2f_utils.limits import Signals
from c2f_utils.settings.laws import Law, make_law
from c2f_utils.settings.load import load_settings


def test_the_soft_punishment_rises_over_the_last_part_of_the_limit_and_follows_it():
    tokens = torch.tensor([10.0, 60, 75, 87.5, 100])
    assert overlong(tokens, torch.full((5,), 100.0), 0.25).tolist() == [0, 0, 0, 0.5, 1]
    assert overlong(tokens / 2, torch.full((5,), 50.0), 0.25).tolist() == [0, 0, 0, 0.5, 1], "with l(t)"
    process = trainer("fixed", overlong=2.0)
    e = process.credit(process.judge(process.collect()))
    cut = torch.tensor([s.cut for s in e.samples])
    assert torch.allclose((e.rewards - e.shaped)[cut], torch.tensor(2.0)) and cut.any()
    short = torch.tensor([s.tokens <= 12 for s in e.samples])
    assert torch.equal(e.shaped[short], e.rewards[short]) and short.any()


def test_the_dual_price_moves_until_answers_have_the_length_that_was_asked_for():
    price, length = DualPrice(budget=50, rate=0.5), 100.0
    assert price.cost(torch.tensor([100.0])).item() == 0
    for _ in range(200):  # answers that get shorter as length costs
        price.update(torch.tensor([length - 10, length + 10]))
        length = 100 - 40 * price.price
    assert length == pytest.approx(50, abs=0.5) and price.price == pytest.approx(1.25, abs=0.02)
    assert price.cost(torch.tensor([25.0, 50, 100])).tolist() == pytest.approx([0, 0, price.price])
    price.update(torch.tensor([0.0]))
    assert price.price == pytest.approx(0.75, abs=0.02)
    for _ in range(5):
        price.update(torch.tensor([0.0]))
    assert price.price == 0, "never below nothing"
    assert DualPrice().cost(torch.tensor([5.0])).tolist() == [0.0]


def test_cut_answers_go_on_under_the_larger_limit_and_their_beginning_is_not_trained_again():
    process = trainer("clock", cut="continue", prompts=8)
    first = process.credit(process.judge(process.collect()))
    process.advance(first, process.improve(first))
    cut = [list(s.ids) for s in first.samples if s.cut]
    assert len(cut) > 4 and [begun for _, begun in process.unfinished] == cut[:4], "at most half of the batch"
    second = process.credit(process.judge(process.collect()))
    limit = process.law.limit
    for sample, begun in zip(second.samples, cut[:4], strict=False):
        assert list(sample.prompt.forced) == begun and sample.prompt.ids[-len(begun) :] == tuple(begun)
        assert len(sample.answer) <= limit and len(sample.ids) <= limit - len(begun) and len(sample.answer) > len(begun)
    assert all(not s.prompt.forced and s.limit == limit for s in second.samples[4:])
    assert second.mask.sum() == sum(len(s.ids) for s in second.samples), "new tokens only"
    row = process.advance(second, process.improve(second))
    assert row["mean_tokens"] == pytest.approx(sum(len(s.answer) for s in second.samples) / 8)
    assert row["rollout_tokens"] == sum(len(s.ids) for s in (*first.samples, *second.samples))


def test_an_answer_cut_at_the_largest_limit_is_scored():
    process = trainer("fixed", cut="continue")
    e = process.credit(process.judge(process.collect()))
    assert any(s.cut for s in e.samples) and not e.expected.any() and torch.equal(e.shaped, e.rewards)
    process.advance(e, process.improve(e))
    assert process.unfinished == []


@pytest.mark.parametrize("changes", [{"cut": "continue"}, {"length_budget": 8, "length_price_rate": 0.5}])
def test_a_training_that_was_stopped_goes_on_with_its_unfinished_answers_and_its_price(changes, tmp_path):
    whole = trainer("clock", **changes)
    rows = [whole.step() for _ in range(4)]
    for _ in range(2):
        trainer("clock", tmp_path, **changes).step()
    resumed = trainer("clock", tmp_path, **changes)
    assert resumed.iteration == 2 and (resumed.unfinished or resumed.dual.price)
    again = [resumed.step() for _ in range(2)]
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows[2:]]
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items())


def test_where_every_answer_was_cut_and_left_out_nothing_is_learnt():
    process = trainer(make_law(Law(name="fixed", limit=2)), cut="mask")
    e = process.credit(process.judge(process.collect()))
    assert all(s.cut for s in e.samples)
    before = weights(process)
    row = process.advance(e, process.improve(e))
    assert all(torch.equal(value, before[name]) for name, value in weights(process).items())
    assert row["policy_loss"] == 0 and process.rollout_tokens == 16


def test_a_clock_can_shrink_and_no_other_law():
    law = make_law(Law(name="clock", shape="linear", start=24, maximum=8, duration=4))
    assert law.largest == 24
    assert [law.update(Signals(iteration)) for iteration in range(5)] == [20, 16, 12, 8, 8]
    assert trainer(law).step()["next_limit"] == 20
    with pytest.raises(C2FError, match="only clocks without steps can shrink"):
        make_law(Law(name="tail", start=24, maximum=8))
    with pytest.raises(C2FError, match="only clocks without steps can shrink"):
        make_law(Law(name="clock", shape="steps", start=24, maximum=8, duration=4, steps=[24, 8]))


@pytest.mark.parametrize("stops", [("eos", "string", "limit"), ("eos", "limit", "limit")])
def test_where_most_answers_end_an_averaged_cut_is_paid_as_it_stands(stops):
    samples = [Sample(Prompt((9,), ""), list(range(16)), stop, 16) for stop in stops]
    e = Experience(samples, 16, prefix_rewards=[torch.arange(16.0) + k for k in range(3)])
    e.rewards = torch.stack([row[-1] for row in e.prefix_rewards])
    averaged = stops.count("limit") == 2
    assert last_prefixes(e).tolist() == [15.0, 16.0 - 0.5 * averaged, 17.0 - 0.5 * averaged]


def test_a_law_is_told_the_penalty_of_a_cut_and_its_average():
    process = trainer("fixed", cut="penalty", cut_penalty=2.0)
    e = process.credit(process.judge(process.collect()))
    assert torch.equal(e.earned, e.rewards - 2.0 * torch.tensor([s.cut for s in e.samples]))
    process = trainer("fixed", cut="average", reward=PrefixReward())
    e = process.credit(process.judge(process.collect()))
    assert torch.equal(e.earned, e.shaped) and not torch.equal(e.earned, e.rewards)


@pytest.mark.parametrize("changes", [{"coarse.cut": "mask"}, {"coarse.cut": "continue"}, {"coarse.overlong": 1.0}])
def test_what_the_librarys_trainers_do_not_know_is_refused_beside_them(changes):
    entries = {"a": {"trainer": "grpo", "law": LAWS["clock"].model_dump(exclude_none=True)}}
    with pytest.raises(C2FError, match="coarse.cut = |coarse.overlong and coarse.length_budget"):
        load_settings("smoke", overrides={"schedules.critic_free": entries, **changes}, study=True)
