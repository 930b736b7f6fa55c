"""A second sampler behind the protocol of `decoder.py`: transformers' continuous batching, for models and GPUs that
`KVDecoder` is not for.

Paged cache, requests that join and leave a running batch, a limit of its own for each. Three things it does not do by
itself: it knows end-of-sequence ids only, so stop strings are cut off afterwards (what was generated behind them is
thrown away, which costs tokens); it changes the model's attention while it runs and leaves it in evaluation mode, in
which activations are not recomputed; and a manager kept over a weight update serves cached prefixes of the old
weights. So the mode is put back, every call makes a fresh manager, and prefix sharing is off all
the same. Requests are queued before the engine starts: then what shares a batch, and with it the random numbers, is a
function of the seed.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import C2FError
from c2f_utils.positions import positions_of
from c2f_utils.rollout.anatomy import unwrapped
from c2f_utils.rollout.sampler import cuda_devices, each_limit, eos_ids, sample_of

PAGE = 32  # key/value positions of one cache page
PATIENCE = 600.0  # seconds without any finished answer after which the engine counts as stuck


class ContinuousBatching:
    """Sampling through `transformers`' continuous batching (a PEFT wrapper is fine); same arguments as `KVDecoder`."""

    def __init__(self, model: nn.Module, tokenizer, tokens_in_cache: int = 65_536, stop_strings: Sequence[str] = ()):
        self.causal = unwrapped(model)
        if not hasattr(self.causal, "init_continuous_batching"):
            raise C2FError(f"{type(self.causal).__name__} cannot be batched continuously; set coarse.engine to 'kv'")
        self.tokenizer, self.eos = tokenizer, eos_ids(tokenizer, self.causal)
        self.tokens_in_cache, self.stop_strings = tokens_in_cache, tuple(stop_strings)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Prompt], limits: Sequence[int] | int, *, temperature: float = 1.0, seed: int = 0
    ) -> list[Sample]:
        """Answer every prompt; `limits` in tokens, temperature 0 is greedy. Raises C2FError when the engine fails."""
        limits = each_limit(limits, prompts, positions_of(self.causal.config))
        if not prompts:
            return []
        with torch.random.fork_rng(devices=cuda_devices(self.causal)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = self._generate(prompts, limits, temperature, seed)
        return [self._sample_of(p, n, o) for p, n, o in zip(prompts, limits, outputs, strict=True)]

    def _generate(self, prompts: Sequence[Prompt], limits: list[int], temperature: float, seed: int) -> list:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        eos = sorted(self.eos)
        # The plain policy: no top-k, no top-p, no penalties, or the KL estimate means nothing.
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature
            else {"do_sample": False}
        )
        wanted = GenerationConfig(max_new_tokens=max(limits), eos_token_id=eos, pad_token_id=0, **sampling)
        longest = max(len(p.ids) + n for p, n in zip(prompts, limits, strict=True))
        training = self.causal.training
        engine = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=max(self.tokens_in_cache, longest + PAGE) // PAGE + 1, allow_block_sharing=False,
            max_batch_tokens=min(4096, max(256, self.tokens_in_cache // 16)), return_logprobs=True, seed=seed % 2**31,
        )  # fmt: skip
        manager = self.causal.init_continuous_batching(generation_config=wanted, continuous_batching_config=engine)
        try:
            names = [
                manager.add_request(list(p.ids), request_id=f"answer-{i}", max_new_tokens=n, eos_token_id=eos)
                for i, (p, n) in enumerate(zip(prompts, limits, strict=True))
            ]
            manager.start()
            return _collect(manager, names)
        finally:
            if manager.is_running():
                manager.stop(block=True)
            manager.destroy()
            self.causal.train(training)

    def _sample_of(self, prompt: Prompt, limit: int, output) -> Sample:
        ids, logps = list(output.generated_tokens), torch.tensor(output.logprobs, dtype=torch.float32)
        return sample_of(prompt, limit, ids, logps, self.tokenizer, self.eos, self.stop_strings)


def _collect(manager, names: list[str]) -> list:
    """The outputs of all requests in order; raises C2FError for one that failed or never came."""
    found: dict[str, object] = {}
    waited = 0.0
    while len(found) < len(names) and waited < PATIENCE:
        output = manager.get_result(timeout=1)
        waited = 0.0 if output else waited + 1.0
        if output and output.is_finished():
            found[output.request_id] = output
        elif not output and not manager.is_running():
            break
    failed = [name for name in names if name not in found or found[name].error or not found[name].generated_tokens]
    if failed:
        why = next((found[n].error for n in failed if n in found and found[n].error), "it stopped without a word")
        raise C2FError(
            f"continuous batching lost {len(failed)} of {len(names)} requests: {why}; set coarse.engine to 'kv'"
        )
    return [found[name] for name in names]
