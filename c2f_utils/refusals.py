"""What a trainer refuses before its first step: every impossibility at once, each with its value and the way out.

Settings and files are checked earlier and without torch; this room sees the loaded models, the prompts as token ids
and the law.
"""

from collections.abc import Sequence

from torch import nn

from c2f_utils.config import Coarse
from c2f_utils.errors import C2FError, problems
from c2f_utils.limits import Law
from c2f_utils.ranks import Ranks
from c2f_utils.rollout import Prompt


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
    model = policy.actor.config
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
    positions = positions_of(model)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    if (needed := len(prompts[longest].ids) + law.largest) > positions:
        found.append(
            f"the law's largest limit {law.largest} plus the longest prompt (number {longest}, "
            f"{len(prompts[longest].ids)} tokens) is {needed}, "
            f"beyond the model's {positions} positions; lower the law's maximum or data.max_prompt_tokens"
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
            f"{config.prompts} in "
            f"{config.minibatches} minibatches leave fewer than {ranks.world} for the last: choose a multiple of both"
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
        size = getattr(getattr(other, "config", None), "vocab_size", model.vocab_size)
        if size != model.vocab_size:
            found.append(
                f"the {what} has a vocabulary of {size} tokens, the actor one of {model.vocab_size}: they read "
                "the same token ids, so "
                "they must share a tokenizer; train the reward model from the same base (notebook 02) or name "
                "one that was"
            )
    if found:
        raise problems("training cannot start:", found)


def positions_of(model_config) -> int:
    """How many positions a model may use at once: its position limit or its sliding window, whichever is smaller."""
    positions = model_config.max_position_embeddings
    return min(positions, getattr(model_config, "sliding_window", None) or positions)


def refuse_other_tokenizer(source: str, tokenizer) -> None:
    """Raise C2FError unless the reward model in `source` was trained with the actor's tokenizer.

    Two vocabularies of equal size would pass every shape check and score nonsense. A model saved without its
    tokenizer passes: nothing is known about it.
    """
    from transformers import AutoTokenizer

    try:
        other = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    token = next(t for t, _ in sorted((ours | theirs).items()) if ours.get(t) != theirs.get(t))
    raise C2FError(
        f"models.reward = {source!r} has another tokenizer than the base model: token {token!r} is "
        f"{theirs.get(token)} there and "
        f"{ours.get(token)} here ({len(theirs)} and {len(ours)} tokens in all); name a reward model trained from "
        "the same base, or "
        "leave models.reward null to train one in notebook 02"
    )


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")
