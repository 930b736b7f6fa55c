"""On a GPU: training, both samplers, captured steps, the embedded path; skipped where torch sees none.

`test_gpu_demo.py` runs all notebooks, on the GPU where there is one.
"""

import copy
import gc

import pytest
import torch
from tiny_models import SHAPE, TOKENIZER, PrefixReward, causal, prompts
from torch import nn

from c2f_utils import limits
from c2f_utils.coarse import actor_critic, heads
from c2f_utils.coarse.trainer import CoarseTrainer
from c2f_utils.domain import stories
from c2f_utils.domain.problems import EOS, PAD
from c2f_utils.models import instruct, loading, pretrain, rewards
from c2f_utils.models.packing import collate
from c2f_utils.models.pretrain import new_model
from c2f_utils.rollout import decoder, decoder_gpu
from c2f_utils.rollout.check import agree
from c2f_utils.rollout.continuous import ContinuousBatching
from c2f_utils.rollout.proxy import ProxyDecoder
from c2f_utils.rollout.vllm import VLLMSampler, engine
from c2f_utils.settings.config import Coarse, Lora, Pretrain
from c2f_utils.settings.laws import Law
from c2f_utils.settings.load import load_settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")


def adapted(dtype=torch.float32) -> nn.Module:
    """A tiny model on the GPU whose adapters have moved."""
    torch.manual_seed(0)
    model = loading.add_lora(causal().to(dtype), Lora(rank=4, alpha=8), alike=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model.cuda().eval()


def made(dtype, shared: bool, sampler=decoder.KVDecoder) -> CoarseTrainer:
    actor = adapted(dtype) if shared else causal().to(dtype).cuda()
    critic = actor_critic.Critic(SHAPE.hidden_size, None if shared else copy.deepcopy(causal(1).model).to(dtype))
    policy = actor_critic.ActorCritic(actor, critic.cuda())
    if shared:
        policy.recompute_activations()
    config = Coarse(
        law=Law(name="fixed", limit=24), iterations=2, prompts=8, tokens_per_micro_batch=400, critic_head="zero",
        critic="shared" if shared else "separate",
    )  # fmt: skip
    return CoarseTrainer(
        policy, PrefixReward(), sampler(actor, TOKENIZER, 1024), prompts(), limits.Fixed(24), config, seed=0,
        pad_id=PAD,
    )  # fmt: skip


@pytest.mark.parametrize("shared", [False, True], ids=["separate, all weights", "shared, adapters, recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_two_iterations_change_what_is_trained_and_the_first_ratio_is_one(dtype, shared):
    process = made(dtype, shared)
    before = {name: w.detach().clone() for name, w in process.updates.weights.items()}
    rows = [process.step() for _ in range(2)]
    assert all(row["ratio_error"] < (1e-3 if dtype == torch.float32 else 0.1) for row in rows)
    assert all(not torch.equal(before[name], w) for name, w in process.updates.weights.items() if "lora_A" in name)
    assert any(not torch.equal(before[name], w) for name, w in process.updates.weights.items())


def test_compiled_layers_give_nearly_the_same_log_probabilities_and_train():
    process = made(torch.float32, True)
    drawn = process.collect().samples
    batches = [collate(drawn[:n], PAD, "cuda") for n in (8, 3, 5)]  # another shape each time
    with torch.no_grad():
        plain = [process.policy(batch)[0] for batch in batches]
        process.policy.compile_layers()
        fused = [process.policy(batch)[0] for batch in batches]
        off = process.policy.reference_logps(batches[0])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, fused, strict=True))
    assert (off - fused[0]).abs().max() > 1e-2
    assert [process.step() for _ in range(2)][0]["ratio_error"] < 1e-2


def test_captured_steps_give_the_librarys_greedy_answers():
    model = causal().cuda()
    for sample in decoder.KVDecoder(model, TOKENIZER)(prompts(6), 40, temperature=0.0):
        ids = torch.tensor([sample.prompt.ids], device="cuda")
        theirs = model.generate(
            ids, max_new_tokens=40, do_sample=False, pad_token_id=PAD, attention_mask=torch.ones_like(ids)
        )
        assert sample.ids == theirs[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("lora", [False, True])
def test_captured_steps_equal_the_cpus_when_rows_end_and_the_attended_width_grows(lora, monkeypatch):
    monkeypatch.setattr(decoder_gpu, "BUCKET", 16)
    model = adapted() if lora else causal().cuda()
    allowed = [1, 3, 30, 5, 30, 2, 16, 60, 8]
    there = decoder.KVDecoder(model, TOKENIZER)(prompts(9), allowed, temperature=0.0)
    here = decoder.KVDecoder(model.cpu(), TOKENIZER)(prompts(9), allowed, temperature=0.0)
    assert [(s.ids, s.stop, s.text) for s in there] == [(s.ids, s.stop, s.text) for s in here]
    assert all(torch.allclose(a.logps, b.logps, atol=1e-3) for a, b in zip(there, here, strict=True))


def test_recorded_logps_are_those_of_the_training_forward_with_adapters():
    model = adapted()
    drawn = decoder.KVDecoder(model, TOKENIZER)(prompts(8), 30, seed=1)
    policy = actor_critic.ActorCritic(model, actor_critic.Critic(SHAPE.hidden_size).cuda())
    with torch.no_grad():
        flat = policy(collate(drawn, PAD, "cuda"))[0].cpu()
    assert (flat - torch.cat([s.logps for s in drawn])).abs().max() < 1e-3


def test_the_chunked_head_on_tensor_cores_is_as_exact_as_float32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 256).bfloat16().cuda(), torch.randn(5000, 256).bfloat16().cuda() * 0.1
    targets = torch.randint(5000, (300,), device="cuda")
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)[torch.arange(300), targets]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert (heads.token_logps(hidden, weight, targets, 1.0)[0] - exact).abs().max() < 1e-4
    finally:
        torch.set_float32_matmul_precision(before)


def test_continuous_batching_gives_the_same_greedy_answers():
    model = causal().cuda()
    ours = decoder.KVDecoder(model, TOKENIZER)(prompts(6), 24, temperature=0.0)
    theirs = ContinuousBatching(model, TOKENIZER, 1024)(prompts(6), 24, temperature=0.0)
    assert [(s.ids, s.stop) for s in ours] == [(s.ids, s.stop) for s in theirs]


def test_a_trainer_runs_on_continuous_batching_and_still_recomputes_activations():
    process = made(torch.bfloat16, True, ContinuousBatching)
    rows = [process.step() for _ in range(2)]
    assert len(rows) == 2 and process.policy.actor.training


def test_vllm_answers_with_the_weights_of_the_moment_and_a_trainer_runs_on_it(tmp_path):
    pytest.importorskip("vllm")
    wide = Pretrain(
        hidden_size=256, layers=2, heads=4, key_value_heads=2, intermediate_size=512, max_positions=256
    )  # heads of 64 features, which its attention kernels want
    new_model(wide, 0).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    base = type(new_model(wide, 0)).from_pretrained(tmp_path, dtype=torch.bfloat16)
    torch.manual_seed(0)
    actor = loading.add_lora(base.cuda(), Lora(rank=4, alpha=8), alike=True).eval()
    sampler = VLLMSampler(actor, TOKENIZER, 1024, memory=0.1)
    try:
        assert agree(actor, sampler, prompts(6)).holds
        with torch.no_grad():
            for name, parameter in actor.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        assert agree(actor, sampler, prompts(6)).holds, "adapters that have moved"
        policy = actor_critic.ActorCritic(actor, actor_critic.Critic(wide.hidden_size).cuda())
        config = Coarse(
            law=Law(name="fixed", limit=24), iterations=2, prompts=8, critic="shared", critic_head="zero", engine="vllm"
        )
        rows = list(
            CoarseTrainer(policy, PrefixReward(), sampler, prompts(), limits.Fixed(24), config, seed=0, pad_id=PAD)
        )
        assert len(rows) == 2 and all(row["sampler_mismatch"] < 0.2 for row in rows)
    finally:
        engine.cache_clear()
        gc.collect()


# Not run on a GPU yet, all below


def test_pretraining_multiplies_in_bfloat16_and_keeps_float32_weights():
    rows: list[dict] = []
    model = pretrain.pretrain(load_settings("smoke", overrides={"pretrain.tokens": 40_000}), rows.append)
    assert model.device.type == "cuda" and {p.dtype for p in model.parameters()} == {torch.float32}
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"]
    seen = []
    model.lm_head.register_forward_hook(lambda module, states, logits: seen.append(logits.dtype))
    config = SHAPE.model_copy(update={"tokens": 500})
    pretrain.train(model, stories.documents(500, 0), config, 0)
    assert set(seen) == {torch.bfloat16} and torch.get_float32_matmul_precision() == "highest"


def test_the_library_trains_reward_and_instruction_models_on_the_gpu(tmp_path):
    settings = load_settings("smoke", overrides={"pretrain.tokens": 8000})
    loading.save_model(causal().cpu(), TOKENIZER, tmp_path / "base")
    model, examples = instruct.train(tmp_path / "base", TOKENIZER, settings)
    assert examples > 10 and model.device.type == "cuda"
    pairs = [([*p.ids, 40 + n % 9, EOS], [*p.ids, 50 + n % 9]) for n, p in enumerate(prompts(24))]
    scorer = rewards.RewardModel(rewards.train(tmp_path / "base", pairs, TOKENIZER, settings, 0), PAD)
    assert scorer.model.device.type == "cuda"
    normalised = scorer.normalised_on(decoder.KVDecoder(model, TOKENIZER)(prompts(8), 16))
    assert torch.isfinite(normalised(decoder.KVDecoder(model, TOKENIZER)(prompts(4), 16))).all()


def test_sampler_and_trainer_agree_in_float32_at_the_demos_shape():
    model = pretrain.new_model(load_settings("gpu_demo").pretrain, 0).cuda().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(6)  # logits as far apart as a trained model's
    model = loading.fuse_norms(model)
    head = heads.Head(model)
    found = agree(
        model, decoder.KVDecoder(model, TOKENIZER), prompts(8),
        lambda answers: head.score(model, collate(answers, PAD, "cuda", sampled=True)),
    )  # fmt: skip
    assert found.holds, found


@pytest.mark.parametrize("c", [0.0, 0.5, 1.0])
def test_proxy_tuning_keeps_its_coefficient(c):
    """Where this passes, `stages/variants.py` need not leave proxy-tuning out on CUDA."""
    trio = [causal(seed) for seed in (5, 6, 7)]
    here = ProxyDecoder(*trio, TOKENIZER, c)(prompts(6), [4, 9, 30, 5, 30, 16], temperature=0.0)
    there = ProxyDecoder(*(m.cuda() for m in trio), TOKENIZER, c)(prompts(6), [4, 9, 30, 5, 30, 16], temperature=0.0)
    assert [s.ids for s in there] == [s.ids for s in here]
    assert all(torch.allclose(a.logps, b.logps, atol=1e-3) for a, b in zip(there, here, strict=True))
