"""Everything of the embedded path gives on another device what it gives on the CPU, and mixes no devices on the way."""

import copy

import pytest
import torch
from other_device import DEVICE, OtherDevice
from tiny_models import SHAPE, TOKENIZER, causal, prompts
from transformers import MistralForSequenceClassification

from c2f_utils import limits
from c2f_utils.coarse import actor_critic
from c2f_utils.coarse.trainer import CoarseTrainer
from c2f_utils.domain import stories
from c2f_utils.models import loading, pretrain, rewards
from c2f_utils.rollout import check
from c2f_utils.rollout.decoder import KVDecoder
from c2f_utils.rollout.proxy import ProxyDecoder
from c2f_utils.settings.config import Coarse, Law, Lora
from c2f_utils.settings.load import load_settings

PLACES = (torch.device("cpu"), DEVICE)


def test_it_refuses_what_a_gpu_refuses_and_passes_what_it_passes():
    with OtherDevice():
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        with pytest.raises(RuntimeError, match="same device, found meta and cpu"):
            there + here
        with pytest.raises(RuntimeError, match="same device"):
            torch.nn.Linear(3, 3)(there)
        there[torch.tensor([0])] = 2 * here.sum()
        assert (there + here.to(DEVICE)).tolist() == [7.0, 2.0, 2.0] and there.device == DEVICE


def test_pretraining_happens_on_the_chosen_device(monkeypatch):
    settings, found = load_settings("smoke", overrides={"pretrain.tokens": 6000}), []
    for place in PLACES:
        monkeypatch.setattr(pretrain, "device", lambda models, place=place: place)
        rows: list[dict] = []
        with OtherDevice():
            model = pretrain.pretrain(settings, rows.append)
            found.append((rows, model.lm_head.weight.detach().cpu()))
        assert model.device == place
    (rows, weight), (others, other) = found
    assert [row["loss"] for row in others] == pytest.approx([row["loss"] for row in rows], abs=1e-4)
    assert torch.allclose(weight, other, atol=1e-3)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["CPU's loop", "GPU's loop"])
@pytest.mark.parametrize("coefficient", [None, 0.0, 0.5], ids=["one model", "proxy, c = 0", "proxy, c = 1/2"])
def test_answers_are_the_same(coefficient, on_gpu):
    found = []
    for place in PLACES:
        with OtherDevice():
            trio = [causal(seed).to(place) for seed in (1, 2, 3)]
            decoder = KVDecoder(trio[0], TOKENIZER)
            if coefficient is not None:
                decoder = ProxyDecoder(*trio, TOKENIZER, coefficient)
            generator = torch.Generator(device=place).manual_seed(3)
            found.append(decoder.answer(prompts(6), [9, 12, 3, 15, 20, 20], 1.0, generator, on_gpu))
    assert [s.ids for s in found[0]] == [s.ids for s in found[1]]
    assert all(torch.allclose(a.logps, b.logps, atol=1e-4) for a, b in zip(*found, strict=True))


def scorer(place: torch.device) -> rewards.RewardModel:
    shape = copy.deepcopy(causal().config)
    shape.num_labels = 1
    torch.manual_seed(0)
    return rewards.RewardModel(MistralForSequenceClassification(shape).eval().to(place), stories.PAD)


@pytest.mark.parametrize(
    ("lora", "cut"), [(False, "average"), (True, "bootstrap")], ids=["separate, all weights", "shared, adapters"]
)
def test_training_is_the_same(lora, cut):
    """Rewards, self-check, the five verbs, what a checkpoint holds and a start from it."""
    config = Coarse(
        law=Law(name="fixed", limit=16), iterations=2, prompts=6, tokens_per_micro_batch=300, cut=cut,
        critic="shared" if lora else "separate", critic_head="zero" if lora else "reward",
    )  # fmt: skip
    found = []
    for place in PLACES:
        with OtherDevice():
            torch.manual_seed(0)
            actor = causal().to(place)
            reward = scorer(place)
            reward = reward.normalised_on(KVDecoder(actor, TOKENIZER)(prompts(6), 16))
            if lora:
                actor = loading.add_lora(actor, Lora(rank=4, alpha=8))
                critic = actor_critic.Critic(SHAPE.hidden_size)
            else:
                critic = actor_critic.Critic.from_reward(reward.model, reward.mean, reward.std)
            policy = actor_critic.ActorCritic(actor, critic.to(place))
            decoder = KVDecoder(actor, TOKENIZER)
            check.agree(actor, decoder, prompts(4))
            process = CoarseTrainer(
                policy, reward, decoder, prompts(), limits.Fixed(16), config, seed=0, pad_id=stories.PAD
            )
            found.append([process.step()])
            parts = process.state_dict()
            weights, moments = ({n: v.cpu() for n, v in parts[kind].items()} for kind in ("weights", "optimiser"))
            process.updates.load(weights, moments, "a checkpoint, which is on the CPU")
            found[-1].append(process.step())
    for here, there in zip(*found, strict=True):
        numbers = [{k: v for k, v in row.items() if isinstance(v, float) and k != "seconds"} for row in (here, there)]
        assert numbers[1] == pytest.approx(numbers[0], abs=1e-3) and there["rollout_tokens"] == here["rollout_tokens"]
