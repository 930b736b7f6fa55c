"""A stand-in for the package vllm: the part of its documented offline interface that the sampler uses, on a CPU.

The answers are those of a transformers model of the engine's own, token by token and unbatched. What is strict in
vLLM is strict here: unknown arguments and names of weights, requests beyond `max_model_len`, stop strings without
detokenisation. What is awkward in it is so here, too: an engine in this process seeds the generators of everybody, a
prefix cache keeps what older weights made of a prompt, stop strings leave the text but not the token ids, and
log-probabilities are raw unless asked for otherwise.
"""

import math
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int = 16
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self):
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are only supported when detokenize is True")
        if self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"impossible sampling parameters: {self}")


@dataclass
class Logprob:
    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str
    stop_reason: int | str | None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class Model(nn.Module):
    """The engine's copy of a model; `load_weights` takes names of the checkpoint and keeps the values."""

    def __init__(self, causal: nn.Module):
        super().__init__()
        self.causal = causal

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        own, loaded = dict(self.causal.named_parameters()), set()
        for name, value in weights:
            if name not in own:
                raise ValueError(f"There is no module or parameter named {name!r}")
            assert own[name].shape == value.shape
            own[name].data.copy_(value)
            loaded.add(name)
        return loaded


class LLM:
    """`deaf` engines take no weights; `noise` is how far their kernels' logits are from the library's."""

    started: list[dict] = []
    noise, deaf = 0.0, False

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        load_format: str = "auto",
        logprobs_mode: str = "raw_logprobs",
        enable_prefix_caching: bool = True,
        seed: int = 0,
    ):
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") != "0":
            raise RuntimeError("the engine is in another process")
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(model)
        if max_model_len > config.max_position_embeddings or not 0 < gpu_memory_utilization <= 1:
            raise ValueError("User-specified max_model_len is greater than the derived max_model_len")
        if load_format == "dummy":
            causal = AutoModelForCausalLM.from_config(config)
        else:
            causal = AutoModelForCausalLM.from_pretrained(model)
        self.model = Model(causal.to(getattr(torch, dtype)).eval())
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.longest, self.mode = max_model_len, logprobs_mode
        self.prefixes: dict[tuple[int, ...], Tensor] = {}
        self.cached = enable_prefix_caching
        LLM.started.append({"model": model, "dtype": dtype, "memory": gpu_memory_utilization, "revision": revision})

    def apply_model(self, func: Callable[[nn.Module], object]) -> list[object]:
        return [] if self.deaf else [func(self.model)]

    def reset_prefix_cache(self) -> bool:
        self.prefixes.clear()
        return True

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[dict], sampling_params: Sequence[SamplingParams], *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        pairs = zip(prompts, sampling_params, strict=True)
        return [RequestOutput(p["prompt_token_ids"], [self._one(p["prompt_token_ids"], s)]) for p, s in pairs]

    def _logits(self, prompt: list[int], ids: list[int]) -> Tensor:
        key = (*prompt, *ids)
        if key not in self.prefixes:
            logits = self.model.causal(torch.tensor([key])).logits[0, -1].float()
            logits = logits + self.noise * torch.sin(torch.arange(len(logits)) * 1.7)
            if not self.cached or ids:
                return logits
            self.prefixes[key] = logits
        return self.prefixes[key]

    def _one(self, prompt: list[int], wanted: SamplingParams) -> CompletionOutput:
        generator = torch.Generator().manual_seed(wanted.seed)
        ids, logprobs, text, reason, stopped = [], [], "", "length", None
        while len(ids) < wanted.max_tokens and len(prompt) + len(ids) < self.longest:
            logits = self._logits(prompt, ids)
            tempered = logits / wanted.temperature if wanted.temperature else logits
            drawn = torch.multinomial(tempered.softmax(-1), 1, generator=generator)
            token = int(drawn if wanted.temperature else tempered.argmax())
            said = (tempered if self.mode == "processed_logprobs" else logits).log_softmax(-1)
            ids.append(token)
            logprobs.append({token: Logprob(float(said[token]), int((said > said[token]).sum()) + 1)})
            if token in (wanted.stop_token_ids or ()) or token == self.tokenizer.eos_token_id:
                reason, stopped = "stop", token
                break
            if wanted.detokenize:
                text = self.tokenizer.decode(ids, skip_special_tokens=wanted.skip_special_tokens)
            if found := [string for string in wanted.stop or () if string in text]:
                reason, stopped, text = "stop", found[0], text[: text.index(found[0])]
                break
        assert all(math.isfinite(place[token].logprob) for place, token in zip(logprobs, ids, strict=True))
        return CompletionOutput(0, text, ids, None if wanted.logprobs is None else logprobs, reason, stopped)
