"""A third sampler behind the protocol of `sampler.py`, for GPUs: vLLM, an optional extra (`pip install -e '.[vllm]'`).

Written against vLLM's documented interface and tested with a fake of it; it has not run on a GPU yet. The engine lives
in this process, beside the training, and holds weights of its own, in its own layout: before every call it is given
those of the policy, adapters merged tensor by tensor on the way, and forgets the prefixes that it has cached. It
starts from random weights, so the self-check before training also says whether all of them arrive.

vLLM's kernels compute another policy than the trainer's forward, by rounding: the trainer recomputes the
log-probabilities and weights the difference (`coarse.importance_cap`). One engine serves every sampler of a process,
for each would hold its own share of the GPU.
"""

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import C2FError
from c2f_utils.positions import positions_of
from c2f_utils.rollout.anatomy import output_weight, unwrapped
from c2f_utils.rollout.sampler import cuda_devices, each_limit, eos_ids, sample_of
from c2f_utils.weights import first_line


class VLLMSampler:
    """Sampling through vLLM (a PEFT wrapper is fine); same arguments as `KVDecoder`, and the engine's share of the GPU.

    `tokens_in_cache` bounds a prompt and its answer; how many are decoded at a time follows from `memory`. Raises
    C2FError without the package, and for a model that was loaded from nowhere: the engine reads its layout there.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        tokens_in_cache: int = 65_536,
        stop_strings: Sequence[str] = (),
        memory: float = 0.3,
    ):
        _package()
        self.causal = unwrapped(model)
        if not self.causal.name_or_path:
            raise C2FError(
                f"this {type(self.causal).__name__} was loaded from no folder or hub id, where vLLM would read its "
                "layout; save and load it, or set coarse.engine to 'kv'"
            )
        self.tokenizer, self.eos = tokenizer, eos_ids(tokenizer, self.causal)
        self.stop_strings, self.memory = tuple(stop_strings), memory
        self.positions = min(positions_of(self.causal.config), tokens_in_cache)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Prompt], limits: Sequence[int] | int, *, temperature: float = 1.0, seed: int = 0
    ) -> list[Sample]:
        """Answer every prompt; `limits` in tokens, temperature 0 is greedy. Raises C2FError when the engine fails."""
        limits = each_limit(limits, prompts, self.positions)
        if not prompts:
            return []
        asked = [{"prompt_token_ids": list(p.ids)} for p in prompts]
        with _random_numbers_kept(cuda_devices(self.causal)):
            served = engine(
                self.causal.name_or_path,
                getattr(self.causal, "revision", None),
                str(output_weight(self.causal).dtype).removeprefix("torch."),
                self.positions,
                self.memory,
            )
            served.apply_model(lambda inside: inside.load_weights(merged_weights(self.causal)))
            if served.reset_prefix_cache() is False:
                raise C2FError("vLLM kept cached prefixes of older weights; set coarse.engine to 'kv'")
            outputs = served.generate(asked, self._wanted(limits, temperature, seed), use_tqdm=False)
        return [self._sample_of(p, n, o.outputs[0]) for p, n, o in zip(prompts, limits, outputs, strict=True)]

    def _wanted(self, limits: list[int], temperature: float, seed: int) -> list:
        """What is asked of every request: the plain policy (no top-k, no top-p), and a seed of its own."""
        seeds = random.Random(seed)
        common = {
            "temperature": temperature, "top_p": 1.0, "top_k": 0, "logprobs": 0, "stop_token_ids": sorted(self.eos),
            # Special tokens are text, as `stopped_at` reads them: a stop string may be one.
            "stop": list(self.stop_strings), "detokenize": bool(self.stop_strings), "skip_special_tokens": False,
        }  # fmt: skip
        return [_package().SamplingParams(max_tokens=n, seed=seeds.getrandbits(31), **common) for n in limits]

    def _sample_of(self, prompt: Prompt, limit: int, output) -> Sample:
        ids = list(output.token_ids)
        if not ids:
            raise C2FError(f"vLLM gave no token ({output.finish_reason}); set coarse.engine to 'kv'")
        logps = torch.tensor([place[token].logprob for place, token in zip(output.logprobs, ids, strict=True)])
        return sample_of(prompt, limit, ids, logps, self.tokenizer, self.eos, self.stop_strings)


@lru_cache(maxsize=1)
def engine(source: str, revision: str | None, dtype: str, positions: int, memory: float):
    """This process's engine for models with the layout of `source`; raises C2FError where vLLM cannot serve it."""
    try:
        return _package().LLM(
            model=source, revision=revision, tokenizer_revision=revision, trust_remote_code=False, dtype=dtype,
            max_model_len=positions, gpu_memory_utilization=memory,
            load_format="dummy",  # the policy's weights come before every call
            logprobs_mode="processed_logprobs",  # of the policy after its temperature
        )  # fmt: skip
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise C2FError(
            f"vLLM cannot serve {source} in {dtype} with {positions} positions: {first_line(error)}; see "
            f"coarse.engine_memory ({memory:g}) and coarse.tokens_in_cache, or set coarse.engine to 'kv'"
        ) from error


def merged_weights(causal: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model by the names of its base, W + scale B A where adapters are active.

    One merged tensor exists at a time, and the model's own stay as they are.
    """
    for name, weight in causal.named_parameters():
        owner, tuned, rest = name.partition(".base_layer.")
        if ".lora_" in name:
            continue
        if tuned and rest == "weight":
            layer = causal.get_submodule(owner)
            for adapter in [] if layer.merged or layer.disable_adapters else layer.active_adapters:
                weight = (weight.float() + layer.get_delta_weight(adapter).float()).to(weight.dtype)
        yield f"{owner}.{rest}" if tuned else name, weight.detach()


def _package():
    """The module `vllm`; its engine in this process, or the policy's weights could not be handed over."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when an engine starts
    try:
        import vllm
    except ImportError as error:
        raise C2FError(
            f"coarse.engine = 'vllm' needs the package vllm, which cannot be imported ({first_line(error)}); python -m "
            "pip install -e '.[vllm]', or set coarse.engine to 'kv'"
        ) from None
    return vllm


@contextmanager
def _random_numbers_kept(devices: list[int]) -> Iterator[None]:
    # In this process an engine that starts seeds Python's, numpy's and torch's generators.
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
