"""The trainer: exact first ratio, invariance to packing, exact resume, honest treatment of cuts, loud failure."""

import json

import pytest
import torch
from tiny_models import LAWS, PrefixReward, causal, distinct_tokens, prompts, trainer, weights

from c2f_utils import limits
from c2f_utils.coarse import checkpoints
from c2f_utils.coarse.experience import signals, tail_return, useful_length
from c2f_utils.coarse.heads import token_logps
from c2f_utils.domain import stories
from c2f_utils.domain.problems import PAD
from c2f_utils.errors import C2FError
from c2f_utils.models import packing
from c2f_utils.settings.laws import Law, make_law


def run(process, steps: int) -> list[dict]:
    return [process.step() for _ in range(steps)]


def groups(process, e) -> list[list[int]]:
    return packing.pack([len(s.prompt.ids) + s.tokens for s in e.samples], process.budget.tokens)


def comparable(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_first_ratio_is_one(lora):
    process = trainer(lora=lora, critic="shared" if lora else "separate")
    assert process.step()["ratio_error"] <= 1e-4


def test_the_ratio_is_exactly_one_when_recomputed_with_the_same_packing():
    process = trainer(minibatches=1)
    e = process.credit(process.judge(process.collect()))
    for group in groups(process, e):
        batch = packing.collate([e.samples[i] for i in group], PAD)
        with torch.no_grad():
            first, second = (process.policy(batch)[0] for _ in range(2))
        assert torch.equal((first - second).exp(), torch.ones_like(first))


def test_later_ratios_are_not_one():
    process = trainer(minibatches=1, epochs=1, actor_learning_rate=1e-2)
    e = process.credit(process.judge(process.collect()))
    process.improve(e)
    assert process.improve(e)["ratio_error"] > 1e-3


def test_packing_changes_no_gradient():
    gradients = []
    for budget in (70, 200, 10_000):
        process = trainer(minibatches=1, tokens_per_micro_batch=budget)
        e = process.credit(process.judge(process.collect()))
        tokens = sum(s.tokens for s in e.samples)
        for group in groups(process, e):
            process.loss(e, group, tokens)[0].backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in process.policy.trainable().values() if p.grad is not None])
        )
    for other in gradients[1:]:
        assert (gradients[0] - other).norm() / gradients[0].norm() < 1e-5


def test_padding_changes_no_logp_and_no_value():
    process = trainer()
    batch = process.collect().samples
    short = min(batch, key=lambda s: len(s.prompt.ids) + s.tokens)
    with torch.no_grad():
        alone = process.policy(packing.collate([short], PAD))
        together = process.policy(packing.collate([short, *batch], PAD))
    for a, b in zip(alone, together, strict=True):
        assert torch.allclose(a, b[: short.tokens], atol=1e-6)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_reference_is_the_base_and_stays_it(lora):
    process = trainer(lora=lora, actor_learning_rate=1e-2)
    base = causal()
    run(process, 2)
    batch = packing.collate(process.collect().samples, PAD)
    reference = process.policy.reference_logps(batch)
    with torch.no_grad():
        hidden = base.model(input_ids=batch.ids).last_hidden_state[batch.rows, batch.columns]
        expected = token_logps(hidden, base.lm_head.weight, batch.targets, 1.0)[0]
        moved = process.policy(batch)[0]
    assert torch.allclose(reference, expected, atol=1e-6)
    assert (moved - expected).abs().max() > 1e-2


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_two_and_two_steps_equal_four_bit_for_bit(law, lora, tmp_path):
    whole = trainer(law, tmp_path / "whole", lora)
    rows = run(whole, 4)
    run(trainer(law, tmp_path / "parts", lora), 2)
    resumed = trainer(law, tmp_path / "parts", lora)
    assert resumed.iteration == 2
    run(resumed, 2)
    assert comparable(resumed.history) == comparable(rows)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    rows = [comparable(run(trainer(seed=seed), 2)) for seed in (3, 3, 4)]
    assert rows[0] == rows[1] != rows[2]


def test_a_checkpoint_of_another_law_or_model_is_refused(tmp_path):
    trainer("logistic", tmp_path).step()
    with pytest.raises(C2FError, match="law Logistic"):
        trainer("fixed", tmp_path)
    with pytest.raises(C2FError, match="other parameters"):
        trainer("logistic", tmp_path, lora=True)


def test_a_checkpoint_of_the_same_law_with_another_maximum_is_refused(tmp_path):
    trainer("useful", tmp_path, reward=PrefixReward()).step()
    trainer("useful", tmp_path, reward=PrefixReward())
    with pytest.raises(C2FError, match="maximum: 24 then, 25 now"):
        trainer(make_law(Law(name="useful", start=8, maximum=25, growth=0.2)), tmp_path, reward=PrefixReward())


def test_a_law_that_passes_what_was_checked_is_stopped_and_a_prefix_without_a_number_too():
    class Endless(limits.Law):
        def update(self, signals):
            self.limit *= 2
            return self.limit

    with pytest.raises(C2FError, match="law Endless asks for 16 tokens; expected 1 to 8"):
        trainer(Endless(8)).step()

    class Holed(PrefixReward):
        def prefix_scores(self, batch):
            found = super().prefix_scores(batch)
            found[1][2] = float("nan")
            return found

    with pytest.raises(C2FError, match=r"non-finite reward of a prefix in iteration 1, samples \[1\]"):
        trainer("tail", reward=Holed()).step()


def test_a_half_written_checkpoint_is_never_taken_for_one(tmp_path):
    process = trainer(folder=tmp_path)
    process.step()
    (tmp_path / ".step-00009.partial").mkdir()
    assert checkpoints.latest(tmp_path).name == "step-00001"
    assert trainer(folder=tmp_path).iteration == 1


def test_only_the_last_two_checkpoints_stay(tmp_path):
    run(trainer(folder=tmp_path), 4)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00003", "step-00004"]


def test_a_stop_request_saves_and_ends(tmp_path):
    asked = []
    process = trainer(folder=tmp_path, checkpoint_every=100)
    process.stop = lambda: len(asked) >= 2
    for row in process:
        asked.append(row)
    assert len(asked) == 2 and checkpoints.latest(tmp_path).name == "step-00002"


def test_a_cut_answer_is_scored_bootstrapped_or_penalised_as_asked():
    shaped, returns = {}, {}
    for mode in ("score", "bootstrap", "penalty"):
        process = trainer("fixed", cut=mode, cut_penalty=2.0)
        torch.nn.init.constant_(process.policy.critic.head.bias, 0.5)
        e = process.credit(process.judge(process.collect()))
        shaped[mode], returns[mode] = e.shaped, e.returns
    cut = torch.tensor([s.cut for s in e.samples])
    assert cut.any() and not cut.all()
    assert torch.equal(shaped["penalty"], shaped["score"] - 2.0 * cut)
    assert (shaped["bootstrap"][cut] == 0).all() and torch.equal(shaped["bootstrap"][~cut], shaped["score"][~cut])
    last = torch.tensor([s.tokens - 1 for s in e.samples])
    rows = torch.arange(len(last))
    # Bootstrapped, the last token of a cut answer is worth what the critic expects after it (plus the small KL price).
    assert (returns["bootstrap"][rows, last][cut] - e.values[rows, last][cut]).abs().max() < 0.6
    assert not torch.allclose(returns["bootstrap"][rows, last][cut], returns["score"][rows, last][cut])


def test_an_averaged_cut_is_worth_the_mean_of_its_last_prefixes_and_an_ended_answer_what_it_was():
    process = trainer("fixed", cut="average", reward=PrefixReward())
    e = process.credit(process.judge(process.collect()))
    assert {s.cut for s in e.samples} == {True, False}
    for sample, rows, raw, shaped in zip(e.samples, e.prefix_rewards, e.rewards, e.shaped, strict=True):
        expected = sum(rows[-2:].tolist()) / 2 if sample.cut else raw  # an eighth of 16 tokens
        assert shaped == pytest.approx(float(expected)) and raw == rows[-1]
    with pytest.raises(C2FError, match="coarse.cut = 'average' asks the reward for every prefix"):
        trainer("fixed", cut="average", reward=distinct_tokens)


def test_the_reward_lands_on_the_last_token_and_kl_on_every_token():
    process = trainer("fixed", discount=1.0, lambda_policy=1.0, lambda_critic=1.0, kl_coefficient=0.0)
    torch.nn.init.constant_(process.policy.critic.head.bias, 0.5)
    e = process.credit(process.judge(process.collect()))
    for i, sample in enumerate(e.samples):
        assert torch.allclose(e.returns[i, : sample.tokens], e.shaped[i].expand(sample.tokens), atol=1e-5)


def moved(process):
    """The same trainer, its actor no longer the reference."""
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in process.policy.actor.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return process


def test_every_token_pays_the_kl_price_of_itself_and_of_what_follows():
    still = {"discount": 1.0, "lambda_policy": 1.0, "lambda_critic": 1.0, "kl_coefficient": 0.5}
    process = moved(trainer("fixed", reward=lambda batch: torch.zeros(len(batch)), **still))
    e = process.credit(process.judge(process.collect()))
    for i, sample in enumerate(e.samples):
        left = (e.logps - e.reference)[i, : sample.tokens]
        for t in range(sample.tokens):
            assert e.returns[i, t] == pytest.approx(-0.5 * float(left[t:].sum()), abs=1e-5)
    assert e.returns[:, 0].mean() < -0.1, "leaving the reference costs"


def test_a_token_price_is_charged_per_token():
    free, priced = (trainer("fixed", token_price=p) for p in (0.0, 0.1))
    a, b = (t.credit(t.judge(t.collect())) for t in (free, priced))
    assert torch.allclose(a.shaped - b.shaped, torch.tensor([0.1 * s.tokens for s in a.samples]), atol=1e-5)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_during_critic_warmup_only_the_critic_moves_and_its_tokens_count(critic):
    process = trainer("fixed", critic_warmup=1, critic=critic, epochs=3)
    before = weights(process)
    process.step()
    after = weights(process)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("critic.") for name in moved) and process.rollout_tokens > 0
    process.step()
    assert any(not torch.equal(after[n], weights(process)[n]) for n in before if n.startswith("actor."))


def test_training_raises_a_reward_that_can_be_raised():
    def mentions(batch):
        return torch.tensor([s.ids.count(stories.IDS["coins"]) / 4 for s in batch])

    process = trainer(
        "fixed",
        reward=mentions,
        iterations=30,
        prompts=16,
        actor_learning_rate=3e-3,
        kl_coefficient=0.0,
        critic_learning_rate=3e-3,
    )
    rows = list(process)
    assert sum(r["reward"] for r in rows[-5:]) / 5 > sum(r["reward"] for r in rows[:5]) / 5 + 0.2


def test_the_critic_learns_to_explain_the_returns():
    def known_from_the_prompt(batch):
        return torch.tensor([2.0 * (s.prompt.ids[3] % 2) for s in batch])

    rows = list(
        trainer(
            "fixed", reward=known_from_the_prompt, iterations=20, critic_learning_rate=3e-3, actor_learning_rate=1e-6
        )
    )
    assert rows[-1]["explained_variance"] > 0.8 and rows[0]["explained_variance"] < 0.3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_reward_stops_before_the_update_and_names_its_samples(bad, tmp_path):
    process = trainer(folder=tmp_path)
    process.step()
    before = weights(process)
    process.reward = lambda batch: distinct_tokens(batch).index_fill(0, torch.tensor([2]), bad)
    with pytest.raises(C2FError, match=r"non-finite reward in iteration 2, samples \[2\]"):
        process.step()
    assert all(torch.equal(before[n], w) for n, w in weights(process).items())


def test_impossible_work_is_refused_before_it_starts():
    with pytest.raises(C2FError, match="positions, the model has 128"):
        trainer(limits.Fixed(500))
    process = trainer()
    with pytest.raises(C2FError, match="no prompts"):
        type(process)(
            process.policy, process.reward, process.sampler, [], process.law, process.config, seed=0, pad_id=0
        )


def test_a_law_without_its_signal_is_refused_at_the_first_step():
    with pytest.raises(C2FError, match="needs tail_return"):
        trainer("tail", reward=distinct_tokens).step()


def test_useful_length_is_where_the_mean_reward_of_prefixes_has_made_its_rise():
    step = torch.tensor([0.0] * 9 + [1.0] * 11)
    assert useful_length([step], 20) == 10
    assert useful_length([step, step[:10]], 20) == 10  # a finished answer keeps its reward
    assert useful_length([torch.arange(100.0)], 100) == pytest.approx(90, abs=1)  # a mean over 12 prefixes ahead
    spiked = torch.cat([torch.linspace(0, 1, 60), torch.ones(40)])
    spiked[35] = 1.0  # where most answers end a sentence a reward peaks; stopping one token later is worth no more
    assert useful_length([spiked], 100) == pytest.approx(52, abs=2)
    assert useful_length([torch.zeros(5)], 20) == 1
    assert useful_length([torch.tensor([0, 0.5, 1, 0.5, 0, -5, -10, -20])], 8) == 3  # a fall behind the best is no rise
    assert useful_length([torch.tensor([0.9, 0.5, -3, -3, 0, 0.5, 0.8, 1])], 8) == 7
    assert useful_length([-torch.arange(8.0)], 8) == 1


def test_laws_see_the_price_that_the_policy_pays():
    process = trainer(law="useful", reward=PrefixReward())
    e = process.credit(process.judge(process.collect()))
    free, price = signals(e, 0), 0.05
    process.config = process.config.model_copy(update={"token_price": price})
    paid = signals(process.credit(e), 0, lambda tokens, limits: price * tokens)
    spent = [[min(k + 1, s.tokens) for k in range(e.limit)] for s in e.samples]
    half, three = e.limit // 2, 3 * e.limit // 4
    more = sum(sum(row[three:]) / (e.limit - three) - sum(row[half:three]) / (three - half) for row in spent)
    assert more > 0 and paid.tail_return == pytest.approx(free.tail_return - price * more / len(spent), abs=1e-6)
    assert paid.useful_length <= free.useful_length
    expected = [r - price * s.tokens for r, s in zip(free.rewards, e.samples, strict=True)]
    assert paid.rewards == pytest.approx(expected, abs=1e-6)
    assert paid.reward == pytest.approx(sum(expected) / len(expected)) and paid.reward < free.reward


def test_tail_return_compares_the_last_two_quarters_and_counts_finished_answers_as_zero():
    ramp = torch.arange(8).float()
    assert tail_return([ramp], 8) == pytest.approx(2.0)
    assert tail_return([ramp, torch.ones(2)], 8) == pytest.approx(1.0)
    assert tail_return([ramp, torch.ones(5)], 8) == pytest.approx(1.0), "it keeps its reward after its end"


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_smallest_batches_and_limits_leave_finite_rows(limit, tmp_path):
    row = trainer(limits.Fixed(limit), tmp_path, prompts=1, minibatches=1).step()
    assert all(value == value for value in row.values() if isinstance(value, float))


def two_collected(process):
    """What is collected in the first iteration and in the second."""
    for process.iteration in (0, 1):
        yield process.collect()


def test_prompts_are_visited_equally_often_in_a_new_order_each_pass():
    process = trainer(prompts=12)
    first, second = ([s.prompt.ids for s in e.samples] for e in two_collected(process))
    assert sorted(first) == sorted(second) == sorted(p.ids for p in prompts()) and first != second


def test_history_survives_as_plain_json(tmp_path):
    process = trainer("tail", tmp_path, reward=PrefixReward())
    run(process, 2)
    state = json.loads((checkpoints.latest(tmp_path) / "state.json").read_text())
    assert state["history"] == process.history and state["law"]["limit"] == process.law.limit
