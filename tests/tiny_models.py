"""Small random models and a ready trainer for tests; nothing here has learnt anything."""

import copy

import torch

from c2f_utils import limits
from c2f_utils.coarse import actor_critic
from c2f_utils.coarse.trainer import CoarseTrainer
from c2f_utils.domain import stories
from c2f_utils.domain.problems import EOS, PAD
from c2f_utils.domain.samples import Prompt, Sample, make_prompts
from c2f_utils.models import loading
from c2f_utils.models.pretrain import new_model
from c2f_utils.rollout.decoder import KVDecoder
from c2f_utils.settings.config import Coarse, Lora, Pretrain
from c2f_utils.settings.laws import Law, make_law

SHAPE = Pretrain(hidden_size=32, layers=2, heads=4, key_value_heads=2, intermediate_size=48, max_positions=128)
TOKENIZER = stories.make_tokenizer()


def causal(seed: int = 0, scale: float = 4.0) -> torch.nn.Module:
    """A random causal model whose logits are spread enough for ratios and KL to mean something."""
    model = new_model(SHAPE, seed).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
        model.lm_head.weight[EOS] *= 2
    return model


def prompts(count: int = 12, seed: int = 0) -> list[Prompt]:
    return make_prompts(stories.problems("train", count, seed))


def samples(model, count: int = 6, limits=20, seed: int = 0) -> list[Sample]:
    return KVDecoder(model, TOKENIZER)(prompts(count), limits, seed=seed)


def distinct_tokens(batch) -> torch.Tensor:
    """A cheap reward: share of distinct tokens."""
    return torch.tensor([len(set(s.ids)) / 20 for s in batch])


class PrefixReward:
    """The same reward with prefix scores, so that every law has its signal."""

    def prefix_scores(self, batch):
        return [torch.tensor([len(set(s.ids[: k + 1])) / 20 for k in range(s.tokens)]) for s in batch]

    def __call__(self, batch):
        return torch.stack([row[-1] for row in self.prefix_scores(batch)])


LAWS = {
    "fixed": Law(name="fixed", limit=16),
    "clock": Law(name="clock", shape="linear", start=8, maximum=24, duration=4),
    "logistic": Law(name="logistic", start=8, maximum=24, step=4),
    "tail": Law(name="tail", start=8, maximum=24, growth=0.2),
    "useful": Law(name="useful", start=8, maximum=24, growth=0.2),
    "gated": Law(name="gated", start=8, maximum=24, growth=0.2),
    "probe": Law(name="probe", start=8, maximum=24, growth=0.2),
}


def trainer(
    law: str | limits.Law = "logistic",
    folder=None,
    lora: bool = False,
    reward=None,
    seed: int = 0,
    those=None,
    **changes,
) -> CoarseTrainer:
    """A trainer on a random model; `changes` go into `Coarse`, `those` are the processes that share the work."""
    settings = {
        "iterations": 4,
        "prompts": 8,
        "tokens_per_micro_batch": 400,
        "checkpoint_every": 1,
        "critic_head": "zero",
    } | changes
    actor = causal()
    if lora:
        torch.manual_seed(5)
        actor = loading.add_lora(actor, Lora(rank=4, alpha=8))
    shared = settings.get("critic") == "shared"
    critic = actor_critic.Critic(SHAPE.hidden_size, None if shared else copy.deepcopy(causal(1).model))
    policy = actor_critic.ActorCritic(actor, critic)
    decoder = KVDecoder(actor, TOKENIZER)
    rule = make_law(LAWS[law]) if isinstance(law, str) else law
    return CoarseTrainer(
        policy,
        reward or PrefixReward(),
        decoder,
        prompts(),
        rule,
        Coarse(law=LAWS["fixed"], **settings),
        seed=seed,
        pad_id=PAD,
        folder=folder,
        ranks=those,
    )


def weights(process: CoarseTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in process.policy.trainable().items()}
