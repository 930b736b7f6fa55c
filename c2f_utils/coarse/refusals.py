"""What a trainer refuses before its first step: every impossibility at once, each with its value and the way out.

Settings and files are checked earlier and without torch; this room sees the loaded models, the prompts as token ids
and the law.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from c2f_utils.coarse.ranks import Ranks
from c2f_utils.domain.samples import Prompt
from c2f_utils.errors import C2FError, problems, short
from c2f_utils.limits import Law
from c2f_utils.positions import beyond, positions_of
from c2f_utils.rollout.library import LibrarySampler
from c2f_utils.settings.config import Coarse


def refuse(
    policy: nn.Module,
    reward: object,
    sampler: object,
    prompts: Sequence[Prompt],
    law: Law,
    config: Coarse,
    ranks: Ranks,
) -> None:
    """Raise C2FError listing what makes this training impossible; returns None when nothing does."""
    if not prompts:
        raise C2FError("there are no prompts to train on; check data.preferences and data.max_prompt_tokens")
    model = policy.actor.config.get_text_config()
    found = []
    if empty := [i for i, p in enumerate(prompts) if not p.ids]:
        found.append(
            f"prompts {_few(empty)} of {len(prompts)} are empty; expected at least one token each: drop them from "
            "the data"
        )
    if foreign := [i for i, p in enumerate(prompts) if any(not 0 <= t < model.vocab_size for t in p.ids)]:
        found.append(
            f"prompts {_few(foreign)} hold token ids outside the model's vocabulary of {model.vocab_size}; "
            "they were made with another tokenizer: use the base model's"
        )
    positions = getattr(sampler, "positions", positions_of(model))
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    if said := beyond(len(prompts[longest].ids), law.largest, positions):
        found.append(
            f"the law's largest limit and the longest prompt (number {longest}): {said}; lower the law's maximum or "
            "data.max_prompt_tokens"
        )
    if config.prompts < ranks.world:
        found.append(
            f"coarse.prompts = {config.prompts} is less than the {ranks.world} processes; expected at least one "
            "prompt each"
        )
    size = -(-config.prompts // config.minibatches)
    if ranks.sharded and (config.prompts - 1) % size + 1 < ranks.world:
        found.append(
            "with split weights every process needs an answer in every minibatch; coarse.prompts = "
            f"{config.prompts} in {config.minibatches} minibatches leave fewer than {ranks.world} for the last: "
            "choose a multiple of both"
        )
    if ranks.sharded and isinstance(sampler, LibrarySampler):
        found.append(
            f"{type(policy.actor).__name__} is sampled through its own forward, which with split weights waits for "
            "all processes at every token; use the launch configuration ddp (coarse.spread)"
        )
    if config.cut == "average" and not hasattr(reward, "prefix_scores"):
        found.append(
            "coarse.cut = 'average' asks the reward for every prefix of an answer, and this reward has no "
            "`prefix_scores`; choose 'score', or give it that method"
        )
    if not getattr(sampler, "eos", True):
        found.append(
            "the tokenizer has no EOS token, so answers could never end; set eos_token in its tokenizer_config.json"
        )
    for what, other in (("reward model", getattr(reward, "model", None)), ("critic", policy.critic.trunk)):
        size = other.config.get_text_config().vocab_size if hasattr(other, "config") else model.vocab_size
        if size != model.vocab_size:
            found.append(
                f"the {what} has a vocabulary of {size} tokens, the actor one of {model.vocab_size}: they read the "
                "same token ids, so they must share a tokenizer; train the reward model from the same base (notebook "
                "02) or name one that was"
            )
    if found:
        raise problems("training cannot start:", found)


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")


def one_each(rewards: object, count: int) -> Tensor:
    """What a reward gave for `count` answers as [count] float32 on the CPU; C2FError for anything else."""
    try:
        found = torch.as_tensor(rewards, dtype=torch.float32).cpu()
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.shape != (count,):
        given = short(rewards) if found is None else f"numbers of shape {list(found.shape)}"
        raise C2FError(f"the reward gave {given} for {count} answers; expected one reward for each: [{count}] numbers")
    return found
