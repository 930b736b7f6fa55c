"""Generation: prompts in, unpadded samples with log-probabilities and an explicit reason to stop out.

`KVDecoder` is our own batched key/value-cache decoder for Llama-layout models (Mistral, Llama, TinyLlama). It exists
because the log-probabilities must be those of the sampled policy itself, every answer has its own limit, and
finished rows must not cost anything; at 100k parameters it is also 2-3 times faster than `model.generate`. It
samples from the plain softmax (no top-k, no top-p, no penalties): anything else would make the KL estimate
meaningless. Weights are read at every call, so an update is never stale. On a GPU the loop is `decoder_gpu.py`'s.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from c2f_utils.domain.samples import Prompt, Sample, Stop, finish, longest_stop
from c2f_utils.errors import C2FError
from c2f_utils.rollout import decoder_gpu
from c2f_utils.rollout.decoder_gpu import rotate
from c2f_utils.rollout.sampler import eos_ids, refuse_overlong


class KVDecoder:
    """Batched decoding of a Llama-layout `*ForCausalLM` (a PEFT wrapper around one is fine).

    Raises C2FError for another layout and for prompts that leave no room below the model's positions.
    """

    def __init__(self, model: nn.Module, tokenizer, tokens_in_cache: int = 65_536, stop_strings: Sequence[str] = ()):
        self.model = model
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.trunk = getattr(self.causal, "model", None)
        if not hasattr(self.trunk, "layers") or not hasattr(self.trunk.layers[0].mlp, "gate_proj"):
            raise C2FError(
                f"{type(self.causal).__name__} is not of the Llama layout; only Mistral and Llama models are "
                "decoded here"
            )
        self.config = self.causal.config
        self.tokenizer = tokenizer
        self.eos = eos_ids(tokenizer, self.causal)
        self.tokens_in_cache = tokens_in_cache
        self.stop_strings = tuple(stop_strings)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Prompt], limits: Sequence[int] | int, *, temperature: float = 1.0, seed: int = 0
    ) -> list[Sample]:
        """Answer every prompt; `limits` in tokens, temperature 0 is greedy, the same seed gives the same answers."""
        limits = [limits] * len(prompts) if isinstance(limits, int) else list(limits)
        refuse_overlong(self.config, prompts, limits)
        generator = torch.Generator(device=self._device).manual_seed(seed)
        layers = self._stack()
        samples: list[Sample] = []
        decode = self._decode_on_gpu if self._device.type == "cuda" else self._decode
        for wave in self._waves(prompts, limits):
            samples += decode(layers, [prompts[i] for i in wave], [limits[i] for i in wave], temperature, generator)
        return samples

    def _stack(self) -> list["_Layer"] | list[decoder_gpu.GraphLayer]:
        kind = decoder_gpu.GraphLayer if self._device.type == "cuda" else _Layer
        return [kind(layer, self.config) for layer in self.trunk.layers]

    @property
    def _device(self) -> torch.device:
        return self.causal.lm_head.weight.device

    def _waves(self, prompts: Sequence[Prompt], limits: Sequence[int]) -> list[list[int]]:
        """Consecutive prompts whose padded cache stays within the budget; a single longer one goes alone."""
        waves: list[list[int]] = [[]]
        width = 0
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            width = max(width, len(prompt.ids) + limit)
            if waves[-1] and width * (len(waves[-1]) + 1) > self.tokens_in_cache:
                waves.append([])
                width = len(prompt.ids) + limit
            waves[-1].append(index)
        return waves if waves[0] else []

    def _decode(
        self, layers: list["_Layer"], prompts: list[Prompt], limits: list[int], temperature: float, generator
    ) -> list[Sample]:
        device = self._device
        rows, start = len(prompts), max(len(p.ids) for p in prompts)
        pads = torch.tensor([start - len(p.ids) for p in prompts], device=device)
        tokens = torch.tensor(
            [[0] * (start - len(p.ids)) + list(p.ids) for p in prompts], device=device
        )  # left-padded [B, S]
        length = start + max(limits)
        for layer in layers:
            layer.allocate(rows, length, self.trunk.embed_tokens.weight)
        columns = torch.arange(length, device=device)
        visible = columns[None] >= pads[:, None]  # [B, S+T]: a row never sees its own padding
        cos, sin = self.trunk.rotary_emb(self.trunk.embed_tokens.weight[:1, :1], columns[None])  # [1, S+T, D]
        # Left padding makes the first query rows of short prompts see nothing; they may look at themselves, nobody
        # reads them.
        causal = visible[:, None, :start] & torch.ones(start, start, dtype=torch.bool, device=device).tril()
        mask = causal | torch.eye(start, dtype=torch.bool, device=device)
        logits = self._forward(layers, tokens, (columns[:start] - pads[:, None]).clamp_min(0), mask, 0, cos, sin)

        limit = torch.tensor(limits, device=device)
        alive = torch.arange(rows, device=device)  # original row of each decoded row
        eos = torch.tensor(sorted(self.eos), device=device)
        chosen = torch.zeros(rows, max(limits), dtype=torch.long, device=device)
        logps = torch.zeros(rows, max(limits), dtype=torch.float32, device=device)
        lengths = limit.clone()
        stops: list[Stop] = ["limit"] * rows
        for step in range(max(limits)):
            token, logp = _sample(logits, temperature, generator)
            chosen[alive, step], logps[alive, step] = token, logp
            ended = torch.isin(token, eos)
            stringed = self._ends_with_stop_string(chosen, alive, step) & ~ended
            finished = ended | stringed | (step + 1 >= limit[alive])
            if finished.any():
                lengths[alive[finished]] = step + 1
                for row in alive[ended].tolist():
                    stops[row] = "eos"
                for row in alive[stringed].tolist():
                    stops[row] = "string"
                keep = ~finished
                if not keep.any():
                    break
                # Always drop finished rows from the bookkeeping; the cache is compacted with them, one copy of what
                # is alive.
                alive, token, pads, visible = alive[keep], token[keep], pads[keep], visible[keep]
                for layer in layers:
                    layer.keep(keep)
            column = start + step
            logits = self._forward(
                layers, token[:, None], (column - pads)[:, None], visible[:, None, : column + 1], column, cos, sin
            )
        return [
            self._sample_of(prompts[i], chosen[i, : lengths[i]], logps[i, : lengths[i]], stops[i], limits[i])
            for i in range(rows)
        ]

    def _decode_on_gpu(
        self, layers: list[decoder_gpu.GraphLayer], prompts: list[Prompt], limits: list[int], temperature, generator
    ) -> list[Sample]:
        endings = decoder_gpu.Endings(limits, self.eos, self.stop_strings, self.tokenizer)
        ids, logps = decoder_gpu.decode(
            self.causal, layers, [p.ids for p in prompts], endings, lambda x: _sample(x, temperature, generator)
        )
        return [
            self._sample_of(p, ids[i, :n], logps[i, :n].clone(), stop, limit)
            for i, (p, n, stop, limit) in enumerate(zip(prompts, endings.lengths, endings.stops, limits, strict=True))
        ]

    def _sample_of(self, prompt: Prompt, ids: Tensor, logps: Tensor, stop: Stop, limit: int) -> Sample:
        return finish(prompt, ids.tolist(), stop, limit, logps.cpu(), self.tokenizer, self.eos, self.stop_strings)

    def _ends_with_stop_string(self, chosen: Tensor, alive: Tensor, step: int) -> Tensor:
        if not self.stop_strings:
            return torch.zeros(len(alive), dtype=torch.bool, device=chosen.device)
        tail = longest_stop(self.stop_strings)
        texts = self.tokenizer.batch_decode(chosen[alive, max(0, step + 1 - tail) : step + 1].tolist())
        return torch.tensor([any(s in text for s in self.stop_strings) for text in texts], device=chosen.device)

    def _forward(
        self, layers, tokens: Tensor, positions: Tensor, visible: Tensor, column: int, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Logits of the last position, [B, V]; keys and values of `tokens` [B, S] go into the caches from `column`
        on."""
        hidden = self.trunk.embed_tokens(tokens)
        rotation = cos[0][positions][:, None], sin[0][positions][:, None]  # [B, 1, S, D]
        mask = torch.zeros(visible.shape, dtype=hidden.dtype, device=hidden.device).masked_fill_(
            ~visible, float("-inf")
        )[:, None]
        for layer in layers:
            hidden = layer(hidden, rotation, mask, column)
        return self.causal.lm_head(self.trunk.norm(hidden[:, -1])).float()


class _Layer:
    """One decoder layer with its cache; projections are fused when they are plain linear maps (no adapters)."""

    def __init__(self, layer: nn.Module, config):
        self.layer, self.attention, self.mlp = layer, layer.self_attn, layer.mlp
        self.queries, self.keys_values = config.num_attention_heads, config.num_key_value_heads
        self.head = self.attention.head_dim
        self.scale = self.attention.scaling
        a, m = self.attention, self.mlp
        plain = all(
            type(p) is nn.Linear and p.bias is None for p in (a.q_proj, a.k_proj, a.v_proj, m.gate_proj, m.up_proj)
        )
        self.qkv = torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]) if plain else None
        self.gate_up = torch.cat([m.gate_proj.weight, m.up_proj.weight]) if plain else None

    def allocate(self, rows: int, length: int, like: Tensor) -> None:
        shape = (rows, self.keys_values, length, self.head)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)

    def keep(self, rows: Tensor) -> None:
        self.k, self.v = self.k[rows], self.v[rows]

    def __call__(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor, column: int) -> Tensor:
        rows, steps, _ = hidden.shape
        normed = self.layer.input_layernorm(hidden)
        if self.qkv is not None:
            qkv = F.linear(normed, self.qkv)
        else:
            a = self.attention
            qkv = torch.cat([a.q_proj(normed), a.k_proj(normed), a.v_proj(normed)], -1)
        q, k, v = (
            qkv.view(rows, steps, -1, self.head)
            .transpose(1, 2)
            .split((self.queries, self.keys_values, self.keys_values), 1)
        )
        self.k[:, :, column : column + steps] = rotate(k, rotation)
        self.v[:, :, column : column + steps] = v
        keys, values = self.k[:, :, : column + steps], self.v[:, :, : column + steps]
        # Group the query heads that share a key/value head: [B, KV, G*S, D] needs no copy of the cache.
        grouped = rotate(q, rotation).reshape(rows, self.keys_values, -1, self.head)
        groups = self.queries // self.keys_values
        scores = torch.matmul(grouped, keys.transpose(2, 3)) * self.scale  # [B, KV, G*S, C]
        scores = scores.view(rows, self.keys_values, groups, steps, -1) + mask[:, :, None]
        weights = scores.float().softmax(-1).to(values.dtype).view(rows, self.keys_values, groups * steps, -1)
        mixed = torch.matmul(weights, values).view(rows, self.queries, steps, self.head).transpose(1, 2)
        hidden = hidden + self.attention.o_proj(mixed.reshape(rows, steps, -1))
        normed = self.layer.post_attention_layernorm(hidden)
        if self.gate_up is not None:
            gate, up = F.linear(normed, self.gate_up).chunk(2, -1)
            return hidden + self.mlp.down_proj(self.mlp.act_fn(gate) * up)
        return hidden + self.mlp(normed)


def _sample(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Next tokens [B] and their log-probabilities under the tempered policy; temperature 0 takes the most likely
    token."""
    if temperature == 0:
        logps = logits.log_softmax(-1)
        token = logps.argmax(-1)
    else:
        logps = (logits / temperature).log_softmax(-1)
        # Exponential race: argmax(p / E) with E ~ Exp(1) is a draw from p.
        race = torch.empty_like(logps).exponential_(generator=generator)
        token = (logps - race.log()).argmax(-1)
    return token, logps.gather(-1, token[:, None])[:, 0]
