"""The trainer against a naive re-computation of PPO (`reference_ppo.py`): two free-running iterations, every option."""

import copy
from itertools import product

import pytest
import tiny_models
import torch
from reference_ppo import Logistic, ReferencePPO
from tiny_models import TOKENIZER, PrefixReward, causal, prompts, trainer

from c2f_utils.domain.problems import EOS
from c2f_utils.rollout.decoder import KVDecoder

TOLERANCE = 1e-5
# Answers cut by the limit, adapters or all weights, a critic of its own or on the actor's trunk: all of them, each with
# other settings beside, so that these meet every mode without a run of their own.
BESIDE = (
    {"temperature": 0.7, "token_price": 0.03, "clip": 0.05},
    {"temperature": 1.6, "kl_target": 0.02, "discount": 0.97, "value_clip": 0.02},
    {"lambda_policy": 0.8, "lambda_critic": 1.0, "gradient_clip": 0.02, "reward_clip": 0.3, "old_logps": "recomputed"},
    {
        "lambda_policy": "adaptive",
        "lambda_alpha": 2.5,
        "reward_scaling": "running",
        "value_clip": 0.0,
        "minibatches": 3,
    },
    {"temperature": 1.3, "critic_warmup": 1, "token_price": 0.02, "reward_scaling": "running"},
)
LENGTHS = ({"overlong": 0.5, "overlong_buffer": 0.4, "clip_high": 0.3}, {"length_budget": 6, "length_price_rate": 0.7})
MODES = list(
    product(("score", "average", "bootstrap", "penalty", "mask", "continue"), ("full", "lora"), ("separate", "shared"))
)
CASES = {
    "-".join(mode): {"cut": mode[0], "lora": mode[1] == "lora", "critic": mode[2]}
    | BESIDE[i % len(BESIDE)]
    | (LENGTHS[i % 2] if mode[0] in ("mask", "continue") else {})
    for i, mode in enumerate(MODES)
}
# A sampler that computes another policy than the trainer; the rest is cut off at the cap, or nothing is weighted.
MISMATCHED = {"old_logps": "recomputed", "cut": "score", "critic": "separate", "clip": 0.05}
CASES |= {
    "mismatch-full": MISMATCHED | {"lora": False, "importance_cap": 1.2, "temperature": 0.8},
    "mismatch-lora": MISMATCHED | {"lora": True, "importance_cap": 1.0},
    "mismatch-unweighted": MISMATCHED | {"lora": False, "importance_cap": 0.0},
}


@torch.no_grad()
def ending(strength: float):
    """The random model, but it often ends an answer: else `mask` would leave all of them out."""
    model = causal()
    states = model.model(torch.tensor([prompts(1)[0].ids])).last_hidden_state.mean((0, 1))
    model.lm_head.weight[EOS] += strength * states / states.norm()
    return model


def started(settings: dict):
    """A trainer whose policy has already left its reference and whose critic already says something."""
    torch.manual_seed(3)
    process = trainer("logistic", reward=PrefixReward(), kl_coefficient=0.3, tokens_per_micro_batch=150, **settings)
    with torch.no_grad():
        for name, weight in process.policy.trainable().items():
            if "lora_B" in name or name == "critic.head.weight":
                weight.normal_(std=0.1)
            elif not settings["lora"] and name.startswith("actor."):
                weight.add_(0.01 * torch.randn_like(weight))
        process.policy.critic.head.bias.fill_(0.2)
        if "importance_cap" in settings:
            other = copy.deepcopy(process.policy.actor)
            for weight in other.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
            process.sampler = KVDecoder(other, TOKENIZER)
    return process


def watched(process) -> tuple[list, list, list]:
    """Which answers each optimiser step is made of, the losses it adds up and the gradient norms it returns."""
    steps, losses, norms, loss, step = [[]], [[]], [], process.loss, process.updates.step

    def told(e, group, step_tokens):
        found, row = loss(e, group, step_tokens)
        steps[-1].extend(group)
        losses[-1].append(row)
        return found, row

    def stepped():
        norms.append([float(norm) for norm in step()])
        steps.append([])
        losses.append([])
        return [torch.tensor(n) for n in norms[-1]]

    process.loss, process.updates.step = told, stepped
    return steps, losses, norms


@pytest.mark.parametrize("case", CASES)
def test_two_iterations_agree_with_a_naive_re_computation(case, monkeypatch):
    base = ending(1.8 * CASES[case].get("temperature", 1.0)) if case.startswith("mask") else causal()
    monkeypatch.setattr(tiny_models, "causal", lambda seed=0: copy.deepcopy(base) if seed == 0 else causal(seed))
    process = started(CASES[case])
    naive = ReferencePPO(process.policy, base, lambda ids: len(set(ids)) / 20, Logistic(8, 24, 4), process.config)
    for _ in range(2):
        e = process.collect()
        samples = list(e.samples)
        steps, losses, norms = watched(process)
        row = process.advance(e, process.improve(process.credit(process.judge(e))))
        del process.loss, process.updates.step
        facts, taken, expected = naive.iterate(samples, steps[:-1])

        wanted = process.config.epochs * process.config.minibatches
        # A step of nothing but cut answers is not taken where these are left out.
        assert len(taken) == len(norms) and (
            len(taken) == wanted or case.startswith("mask") and 0 < len(taken) < wanted
        )
        for i, fact in enumerate(facts):
            n = samples[i].tokens
            if not case.startswith("mismatch"):
                assert samples[i].logps.tolist() == near(fact["logps"]), "the sampler's own log-probabilities"
            for name in ("logps", "weights", "reference", "values", "paid", "advantages", "returns"):
                assert getattr(e, name)[i, :n].tolist() == near(fact[name]), name
        for ours, theirs, both in zip(losses, taken, norms, strict=False):
            for name in ("policy_loss", "value_loss", "entropy", "clip_fraction"):
                assert sum(float(part[name]) for part in ours) == near(theirs[name]), name
            assert both == near(theirs["norms"])
        assert row.keys() - expected.keys() == {"reason", "tokens_per_micro_batch"}
        for name, value in expected.items():
            assert row[name] == near(value), name
        if case.startswith("mismatch"):
            capped = 0 < row["truncated_weights"] < 1
            assert row["sampler_mismatch"] > 0.01 and capped == bool(CASES[case]["importance_cap"])
    ours = process.policy.trainable()
    assert ours.keys() == naive.weights().keys()
    for name, weight in naive.weights().items():
        assert (ours[name] - weight).abs().max() <= TOLERANCE, name


def near(expected):
    return pytest.approx(expected, abs=TOLERANCE, rel=TOLERANCE)
