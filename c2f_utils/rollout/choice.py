"""Which sampler serves a model: ours where it computes what the model computes, else the library's own forward."""

from collections.abc import Sequence
from functools import cache

from torch import nn

from c2f_utils.positions import positions_of
from c2f_utils.rollout.anatomy import unwrapped
from c2f_utils.rollout.continuous import ContinuousBatching
from c2f_utils.rollout.decoder import KVDecoder, unlike_llama
from c2f_utils.rollout.library import LibrarySampler
from c2f_utils.rollout.sampler import BatchedSampler
from c2f_utils.rollout.vllm import VLLMSampler


def choose(
    model: nn.Module,
    tokenizer,
    tokens_in_cache: int = 65_536,
    stop_strings: Sequence[str] = (),
    engine: str = "kv",
    longest: int = 0,
    memory: float = 0.3,
) -> BatchedSampler | ContinuousBatching | VLLMSampler:
    """The sampler that `coarse.engine` asks for; for 'kv' the library's, and a printed sentence, where ours does not
    hold.

    `longest` are the tokens of the longest prompt and its limit together: ours knows no sliding window below them;
    `memory` is the share of the GPU that vLLM may hold.
    """
    arguments = (model, tokenizer, tokens_in_cache, tuple(stop_strings))
    if engine == "vllm":
        return VLLMSampler(*arguments, memory)
    if engine != "kv":
        return {"continuous": ContinuousBatching, "library": LibrarySampler}[engine](*arguments)
    causal = unwrapped(model)
    why = unlike_llama(model)
    window = getattr(causal.config, "sliding_window", None)
    if not why and window and longest > window and positions_of(causal.config) >= longest:
        why = f"answers may reach beyond its sliding window of {window} tokens"
    if not why:
        return KVDecoder(*arguments)
    _say(f"{type(causal).__name__} is sampled through the library's own forward, not our decoder ({why}).")
    return LibrarySampler(*arguments)


@cache
def _say(sentence: str) -> None:
    """Print once in a process: every stage and law asks again."""
    print(sentence, flush=True)
