"""What every sampler is, and what each refuses before it samples."""

from collections.abc import Sequence
from typing import Protocol

from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import C2FError
from c2f_utils.positions import beyond


class Sampler(Protocol):
    """Anything that answers prompts under per-prompt limits."""

    def __call__(
        self, prompts: Sequence[Prompt], limits: Sequence[int], *, temperature: float, seed: int
    ) -> list[Sample]: ...


def refuse_overlong(config, prompts: Sequence[Prompt], limits: Sequence[int]) -> None:
    """Raise C2FError for an empty prompt and for one that with its limit needs more positions than the model has."""
    for prompt, limit in zip(prompts, limits, strict=True):
        if not prompt.ids:
            raise C2FError(f"empty prompt {prompt.text[:60]!r}: expected at least one token; drop it from the data")
        if said := beyond(len(prompt.ids), limit, config):
            raise C2FError(f"{said}; lower the law's maximum, evaluation.max_tokens or data.max_prompt_tokens")


def eos_ids(tokenizer, config) -> frozenset[int]:
    """Ids that end an answer, of tokenizer and model together; raises C2FError when there is none."""
    found = {
        tokenizer.eos_token_id,
        *(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]),
    }
    if not (found := found - {None}):
        raise C2FError(
            "the tokenizer has no EOS token; expected one in tokenizer_config.json (eos_token), or answers could "
            "never end"
        )
    return frozenset(found)
