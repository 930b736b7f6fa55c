"""RL and SFT averaged step by step: each step is the mean of two that are taken alone, and a kill changes nothing."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_models import LAWS, TOKENIZER, PrefixReward, causal, prompts

from c2f_utils.coarse import actor_critic
from c2f_utils.coarse.parallel import ParallelUpdates
from c2f_utils.coarse.ranks import Ranks
from c2f_utils.coarse.trainer import CoarseTrainer
from c2f_utils.coarse.updates import Updates
from c2f_utils.domain import stories
from c2f_utils.domain.problems import PAD
from c2f_utils.rollout.decoder import KVDecoder
from c2f_utils.settings.config import Coarse
from c2f_utils.settings.laws import make_law

EXAMPLES = list(stories.instructions(2000, 0.35, 0))


def given(**changes) -> tuple[actor_critic.ActorCritic, Coarse]:
    settings = {"iterations": 3, "prompts": 8, "tokens_per_micro_batch": 300, "checkpoint_every": 1} | changes
    policy = actor_critic.ActorCritic(causal(), actor_critic.Critic(32, copy.deepcopy(causal(1).model)))
    return policy, Coarse(law=LAWS["fixed"], critic_head="zero", **settings)


PARALLEL = partial(ParallelUpdates, examples=EXAMPLES, learning_rate=1e-2, pad_id=PAD, seed=3)


def with_gradients(policy) -> list[torch.nn.Parameter]:
    """Its parameters, each with a gradient that only its shape decides."""
    weights = list(policy.trainable().values())
    for p in weights:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return weights


def test_a_step_is_the_mean_of_one_of_rl_and_one_of_sft_from_the_same_weights():
    (alone, config), (policy, _) = given(), given()
    rl, both = Updates(alone, config, Ranks()), PARALLEL(policy, config, Ranks())
    sft = causal()
    plain = torch.optim.AdamW(sft.parameters(), lr=1e-2, weight_decay=0.0)
    for number in range(2):
        if number:  # every step begins at the mean
            alone.load_state_dict(policy.state_dict())
            sft.load_state_dict(policy.actor.state_dict())
        size = len(both.examples) * (number + 1) // 12 - len(both.examples) * number // 12
        seen = both.examples[len(both.examples) * number // 12 :][:size]
        losses = []
        for example in seen:
            ids, start = [*example.prompt.ids, *example.ids], len(example.prompt.ids)
            logits = sft(torch.tensor([ids])).logits[0, start - 1 : -1]
            losses.append(F.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum"))
        plain.zero_grad()
        (sum(losses) / sum(len(example.ids) for example in seen)).backward()
        torch.nn.utils.clip_grad_norm_(sft.parameters(), config.gradient_clip)
        plain.param_groups[0]["lr"] = 1e-2 * (1 - number / 12)
        plain.step()
        for updates, model in ((rl, alone), (both, policy)):
            with_gradients(model)
            updates.step()
        for (name, mean), a, b in zip(
            policy.actor.named_parameters(), alone.actor.parameters(), sft.parameters(), strict=True
        ):
            assert torch.allclose(mean, (a + b) / 2, atol=2e-5), (number, name)
        for one, other in zip(policy.critic.parameters(), alone.critic.parameters(), strict=True):
            assert torch.equal(one, other), "the critic is RL's alone"


def test_every_example_is_seen_once_over_the_whole_training():
    policy, config = given()
    updates, seen = PARALLEL(policy, config, Ranks()), [0]
    for _ in range(12):
        with_gradients(policy)
        updates.step()
        seen.append(updates.sft_tokens)
    total = sum(len(prompt) + len(answer) for prompt, answer in EXAMPLES)
    steps = [b - a for a, b in zip(seen, seen[1:], strict=False)]
    assert seen[-1] == total and 0.5 * total / 12 < min(steps) and max(steps) < 2 * total / 12


def process(folder) -> CoarseTrainer:
    policy, config = given()
    return CoarseTrainer(
        policy, PrefixReward(), KVDecoder(policy.actor, TOKENIZER), prompts(), make_law(LAWS["logistic"]), config,
        seed=0, pad_id=PAD, folder=folder, updates=PARALLEL,
    )  # fmt: skip


@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_killed_training_continues_as_if_nothing_had_happened(tmp_path, killed_after):
    whole = process(tmp_path / "whole")
    list(whole)
    for row in process(tmp_path / "broken"):
        if row["iteration"] == killed_after:
            break
    again = process(tmp_path / "broken")
    list(again)
    assert again.updates.sft_tokens == whole.updates.sft_tokens > 0
    for (name, a), b in zip(whole.policy.named_parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(a, b), name
