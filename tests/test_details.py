"""The details that break PPO when they are wrong (the table in `docs/ppo_details.md`), those that no other file holds
to their word.
"""

import ast
import copy
import re
from pathlib import Path

import pytest
import torch
from test_ranks import Two
from tiny_models import SHAPE, TOKENIZER, causal, samples, trainer
from transformers import MistralConfig, MistralForCausalLM, MistralForSequenceClassification

from c2f_utils import files
from c2f_utils.coarse import ppo
from c2f_utils.domain.problems import PAD
from c2f_utils.models import loading, packing, rewards
from c2f_utils.settings.load import load_settings


def test_every_one_of_the_23_details_is_listed_with_a_test_that_exists():
    text = (files.root() / "docs" / "ppo_details.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:3].strip("| ").isdigit()]
    assert [int(number) for number, *_ in rows] == list(range(1, 24))
    for number, _, _, tests in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
        assert named and tests.count("`") == 2 * len(named), f"detail {number} names no test: {tests}"
        for file, name in named:
            tree = ast.parse((Path(__file__).parent / file).read_text(encoding="utf-8"))
            found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name in found, f"detail {number}: {file} has no {name}"


def test_what_the_details_say_of_the_package_is_there():
    text = (files.root() / "docs" / "ppo_details.md").read_text(encoding="utf-8")
    for name, file in re.findall(r"`(\w+)` (?:in |\()`([\w/]+\.py)`", text):
        tree = ast.parse((files.root() / "c2f_utils" / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (name, file)


def test_dropout_is_off_even_in_training_mode():
    shape = MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, attention_dropout=0.5,
    )  # fmt: skip
    model = MistralForCausalLM(shape).train()
    ids = torch.arange(30)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    loading.disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_tokenizer_that_pads_with_eos_gets_another_pad(tmp_path):
    sloppy = copy.deepcopy(TOKENIZER)
    sloppy.pad_token = sloppy.eos_token
    sloppy.save_pretrained(tmp_path)
    mended = loading.load_tokenizer(tmp_path)
    assert mended.pad_token_id != mended.eos_token_id and len(mended) == len(TOKENIZER)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_policy_and_reference_share_one_temperature(temperature):
    process = trainer("fixed", temperature=temperature)
    e = process.judge(process.collect())
    assert ppo.kl_k3(e.logps, e.reference)[e.mask].max() < 1e-8
    sample = e.samples[0]
    ids = torch.tensor([[*sample.prompt.ids, *sample.ids]])
    with torch.no_grad():
        before = process.policy.actor(ids).logits[0, len(sample.prompt.ids) - 1 : -1]
    expected = (before / temperature).log_softmax(-1)[torch.arange(sample.tokens), torch.tensor(sample.ids)]
    assert torch.allclose(sample.logps, expected, atol=1e-5)


def test_the_reward_is_the_score_at_the_last_real_token_whatever_is_padded_behind():
    shape = MistralConfig(**causal().config.to_diff_dict() | {"num_labels": 1, "pad_token_id": PAD})
    torch.manual_seed(0)
    model = MistralForSequenceClassification(shape).eval()
    batch = samples(causal(), 6, [2, 20, 7, 20, 11, 3])
    found = rewards.RewardModel(model, PAD)(batch)
    for value, sample in zip(found, batch, strict=True):
        with torch.no_grad():
            alone = model.score(model.model(torch.tensor([[*sample.prompt.ids, *sample.ids]])).last_hidden_state[0, -1])
        assert float(value) == pytest.approx(float(alone), abs=1e-5)
    normal = rewards.RewardModel(model, PAD).normalised_on(batch)(batch)
    assert normal.mean().abs() < 1e-5 and normal.std() == pytest.approx(1.0, abs=1e-4)


def test_a_new_reward_head_is_small(tmp_path):
    causal().save_pretrained(tmp_path)
    model = rewards.new_reward_model(tmp_path, load_settings("smoke"), seed=0)
    assert float(model.score.weight.detach().std()) == pytest.approx((SHAPE.hidden_size + 1) ** -0.5, rel=0.4)


def test_every_epoch_visits_every_answer_once_in_a_new_order():
    process = trainer("fixed", epochs=3, minibatches=2)
    e = process.credit(process.judge(process.collect()))
    visits, loss = [], process.loss
    process.loss = lambda e, group, tokens: visits.append(group) or loss(e, group, tokens)
    process.improve(e)
    epochs = [visits[i] + visits[i + 1] for i in (0, 2, 4)]  # a budget for whole minibatches: one group each
    assert len(visits) == 6 and all(sorted(order) == list(range(8)) for order in epochs)
    assert len({tuple(sorted(visits[i])) for i in (0, 2, 4)}) > 1


def test_the_optimiser_has_the_known_epsilon_no_decay_and_a_rate_for_each_part():
    groups = trainer("fixed", actor_learning_rate=1e-4, critic_learning_rate=3e-4).updates.optimiser.param_groups
    assert [(g["lr"], g["eps"], g["weight_decay"]) for g in groups] == [(1e-4, 1e-5, 0.0), (3e-4, 1e-5, 0.0)]


def test_absurd_log_ratios_stay_finite():
    far = torch.tensor([-1e4, 0.0, 1e4])
    loss, ratio, _ = ppo.policy_loss(far, torch.zeros(3), torch.ones(3), 0.2)
    assert torch.isfinite(loss).all() and torch.isfinite(ratio).all()
    assert torch.isfinite(ppo.kl_k3(far, torch.zeros(3))).all()


def test_processes_share_the_order_of_prompts_and_not_the_sampling_seed():
    asked = {}
    whole = [sample.prompt for sample in trainer("probe").collect().samples]
    for rank in (0, 1):
        two = Two()
        two.rank = rank
        process = trainer("probe", those=two)
        process.sampler = lambda p, n, temperature, seed, rank=rank: asked.__setitem__(rank, (p, n, seed)) or []
        process.collect()
        assert asked[rank][0] == whole[rank::2]
    assert asked[1][2] - asked[0][2] == 100_003


def test_a_micro_batch_of_weight_zero_adds_nothing_and_reaches_every_parameter():
    process = trainer("fixed")
    e = process.credit(process.judge(process.collect()))
    process.updates.backward(process.loss(e, [0], 100)[0], weight=0.0)
    gradients = [p.grad for p in process.policy.trainable().values()]
    assert all(g is not None for g in gradients) and not any(g.any() for g in gradients)


def test_an_answer_without_tokens_is_refused():
    sample = samples(causal(), 1)[0]
    sample.ids = []
    with pytest.raises(ValueError, match="no answer tokens"):
        packing.collate([sample], PAD)


def test_the_running_scale_is_the_root_mean_square_of_all_rewards_so_far_and_shifts_nothing():
    scale, seen = ppo.RunningScale(), []
    for batch in (torch.tensor([1.0, -3.0]), torch.tensor([2.0, 2.0, 5.0])):
        seen.append(batch)
        found = scale.update(batch)
        assert found == pytest.approx(float(torch.cat(seen).square().mean().sqrt()))


def test_length_entropy_and_repetition_are_logged_beside_the_reward():
    row = trainer("fixed").step()
    watched = (
        "reward",
        "mean_tokens",
        "p95_tokens",
        "truncated_share",
        "entropy",
        "rep4",
        "kl_per_token",
        "explained_variance",
        "sampler_mismatch",
    )
    assert all(row[key] is not None for key in watched)


def test_minibatches_change_from_one_iteration_to_the_next():
    process, visits = trainer("fixed", epochs=1, minibatches=2), {}
    e = process.credit(process.judge(process.collect()))
    loss = process.loss
    for process.iteration in (0, 1, 0):
        seen = visits.setdefault(process.iteration, [])
        process.loss = lambda e, group, tokens, seen=seen: seen.append(sorted(group)) or loss(e, group, tokens)
        process.improve(e)
    assert visits[0][:2] == visits[0][2:], "a function of seed and iteration, so that a resumed run goes on as it would"
    assert visits[0][:2] != visits[1]
