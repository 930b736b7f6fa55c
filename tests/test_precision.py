"""bfloat16: float32 where it matters, small updates are not swallowed, resuming is exact, mismatch is visible;
checkpointed activations.
"""

import copy

import pytest
import torch
from tiny_models import SHAPE, TOKENIZER, causal, prompts, samples, trainer, weights

from c2f_utils import limits
from c2f_utils.coarse import actor_critic, heads
from c2f_utils.coarse.trainer import CoarseTrainer
from c2f_utils.domain.problems import PAD
from c2f_utils.models import loading
from c2f_utils.models.packing import collate
from c2f_utils.rollout import decoder
from c2f_utils.rollout.anatomy import trunk_of
from c2f_utils.settings.config import Coarse, Lora
from c2f_utils.settings.laws import Law


def half(folder=None, lora: bool = False, **changes) -> CoarseTrainer:
    """A trainer whose trunks and reference are bfloat16."""
    from tiny_models import PrefixReward

    actor = causal().to(torch.bfloat16)
    if lora:
        torch.manual_seed(5)
        actor = loading.add_lora(actor, Lora(rank=4, alpha=8))
    policy = actor_critic.ActorCritic(
        actor, actor_critic.Critic(SHAPE.hidden_size, copy.deepcopy(causal(1).model).to(torch.bfloat16))
    )
    settings = {
        "iterations": 4,
        "prompts": 8,
        "tokens_per_micro_batch": 400,
        "checkpoint_every": 1,
        "critic_head": "zero",
    } | changes
    return CoarseTrainer(
        policy, PrefixReward(), decoder.KVDecoder(actor, TOKENIZER), prompts(), limits.Fixed(16),
        Coarse(law=Law(name="fixed", limit=16), **settings),
        seed=0, pad_id=PAD, folder=folder,
    )  # fmt: skip


def test_trunks_and_reference_are_bfloat16_and_heads_adapters_and_log_probs_float32():
    process = half(lora=True)
    kinds = {name: p.dtype for name, p in process.policy.named_parameters()}
    assert all(
        t == (torch.float32 if "lora_" in n or n.startswith("critic.head") else torch.bfloat16)
        for n, t in kinds.items()
    )
    batch = collate(samples(causal()), PAD)
    logps, entropy, values = process.policy(batch)
    assert logps.dtype == entropy.dtype == values.dtype == process.policy.reference_logps(batch).dtype == torch.float32
    whole = half().policy  # nothing learnt yet: a reference of another type would round elsewhere
    with torch.no_grad():
        assert torch.equal(whole.reference_logps(batch), whole(batch)[0])


@pytest.mark.parametrize("vocabulary", [400, 5000], ids=["full", "chunked"])
def test_the_head_computes_in_float32_whatever_the_trunk_does(vocabulary):
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 64).bfloat16(), torch.randn(vocabulary, 64).bfloat16()
    targets = torch.randint(vocabulary, (40,))
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)[torch.arange(40), targets]
    assert (heads.token_logps(hidden, weight, targets, 1.0)[0] - exact).abs().max() < 1e-4


def test_old_log_probs_are_recomputed_and_the_samplers_mismatch_is_logged():
    rows = {kind: half(old_logps=kind).step() for kind in ("auto", "recorded")}
    assert rows["auto"]["sampler_mismatch"] > 1e-4 and rows["recorded"]["sampler_mismatch"] == 0.0
    assert rows["auto"]["ratio_error"] < rows["recorded"]["ratio_error"]
    exact = trainer("fixed", old_logps="recomputed").step()
    assert exact["ratio_error"] < 1e-5 and exact["sampler_mismatch"] < 1e-5


def test_old_log_probs_recomputed_with_the_same_packing_give_a_first_ratio_of_exactly_one():
    process = trainer("fixed", old_logps="recomputed", minibatches=1)
    assert process.step()["ratio_error"] == 0.0


def test_updates_smaller_than_bfloat16_can_show_add_up():
    process = half(actor_learning_rate=1e-6, critic_learning_rate=1e-6)
    start = {n: w.detach().clone() for n, w in process.updates.weights.items()}
    for _ in range(3):
        process.step()
    name = "actor.model.layers.0.self_attn.q_proj.weight"
    moved = (process.updates.weights[name] - start[name]).abs()
    assert process.updates.weights[name].dtype == torch.float32 and moved.mean() > 3e-6
    for n, parameter in process.policy.trainable().items():
        assert torch.equal(parameter, process.updates.weights[n].to(parameter.dtype)), n


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_resuming_is_exact_with_masters(lora, tmp_path):
    whole = half(tmp_path / "whole", lora)
    rows = [whole.step() for _ in range(4)]
    first = half(tmp_path / "parts", lora)
    first.step(), first.step()
    resumed = half(tmp_path / "parts", lora)
    resumed.step(), resumed.step()
    drop = lambda table: [{k: v for k, v in row.items() if k != "seconds"} for row in table]  # noqa: E731
    assert drop(resumed.history) == drop(rows)
    for name, value in whole.updates.weights.items():
        assert torch.equal(value, resumed.updates.weights[name]), name
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_activations_of_both_trunks_are_recomputed_and_gradients_are_the_same(lora):
    gradients, calls = [], []
    for recompute in (False, True):
        process = trainer("fixed", lora=lora, minibatches=1)
        if recompute:
            process.policy.recompute_activations()
        e = process.credit(process.judge(process.collect()))
        count = {"actor": 0, "critic": 0}
        trunks = {"actor": trunk_of(process.policy.actor), "critic": process.policy.critic.trunk}
        for name, trunk in trunks.items():
            trunk.layers[0].self_attn.register_forward_hook(
                lambda *_, name=name, count=count: count.update({name: count[name] + 1})
            )
        process.loss(e, [0, 1, 2], 30)[0].backward()
        gradients.append({n: p.grad for n, p in process.policy.trainable().items() if p.grad is not None})
        calls.append(count)
    assert calls == [{"actor": 1, "critic": 1}, {"actor": 2, "critic": 2}]
    for name, value in gradients[0].items():
        assert torch.allclose(value, gradients[1][name], atol=1e-7), name


def test_gradients_of_several_micro_batches_add_up_in_masters():
    process = half()
    e = process.credit(process.judge(process.collect()))

    def gradients(groups: list[list[int]]) -> dict[str, torch.Tensor]:
        process.updates.clear()
        for group in groups:
            process.updates.backward(process.loss(e, group, 100)[0])
        return {n: w.grad.clone() for n, w in process.updates.weights.items() if w.grad is not None}

    first, second, both = gradients([[0, 1]]), gradients([[2, 3]]), gradients([[0, 1], [2, 3]])
    for name, value in both.items():
        assert value.dtype == torch.float32 and torch.allclose(value, first[name] + second[name], atol=1e-8), name
