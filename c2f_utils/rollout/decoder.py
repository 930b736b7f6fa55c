"""`KVDecoder`: our own batched key/value-cache decoder for plain Llama layouts.

At 100k parameters it is 2-3 times faster than `model.generate`. It computes what a plain Llama layer computes and
nothing else, so it takes only classes known to be such layers, and of those only objects that look like one
(`unlike_llama`); every other model goes to `library.py`. On a GPU a wave is `decoder_gpu.py`'s.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from c2f_utils.errors import C2FError
from c2f_utils.rollout import decoder_gpu
from c2f_utils.rollout.anatomy import unwrapped
from c2f_utils.rollout.decoder_gpu import rotate
from c2f_utils.rollout.sampler import BatchedSampler

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
# Rotary frequencies that are the same at every length.
ROTARY = ("default", "linear", "llama3", "yarn")
_PARTS = {
    "": {"embed_tokens", "layers", "norm", "rotary_emb"},
    "layers.0": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "layers.0.self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "layers.0.mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}


def unlike_llama(model: nn.Module) -> str:
    """Why a causal model is not one that `KVDecoder` computes rightly; empty where it is one."""
    causal = unwrapped(model)
    kind, config = type(causal), causal.config
    if kind.__name__ not in CLASSES or not kind.__module__.startswith("transformers."):
        return f"ours is for {', '.join(CLASSES)}"
    for name, parts in _PARTS.items():
        if other := {n for n, _ in causal.model.get_submodule(name).named_children()} ^ parts:
            return f"its layers have other parts ({', '.join(sorted(other))})"
    if (rotary := (config.rope_parameters or {}).get("rope_type", "default")) not in ROTARY:
        return f"its rotary embedding is {rotary!r}"
    if len(kinds := set(getattr(config, "layer_types", None) or ["full_attention"])) > 1:
        return f"its layers differ ({', '.join(sorted(kinds))})"
    return ""


class KVDecoder(BatchedSampler):
    """Batched decoding of a plain Llama-layout `*ForCausalLM` (a PEFT wrapper around one is fine).

    Raises C2FError for another layout and for prompts that leave no room below the model's positions or its sliding
    window.
    """

    def __init__(self, model: nn.Module, *arguments, **named):
        if why := unlike_llama(model):
            raise C2FError(f"{type(unwrapped(model)).__name__} is not of the plain Llama layout: {why}")
        super().__init__(model, *arguments, **named)

    @property
    def positions(self) -> int:
        return min(super().positions, getattr(self.config, "sliding_window", None) or super().positions)

    def open(self, pads: Tensor, length: int, on_gpu: bool) -> "_Wave | decoder_gpu.Wave":
        kinds = (decoder_gpu.Wave, decoder_gpu.GraphLayer) if on_gpu else (_Wave, _Layer)
        return kinds[0](self.causal, [kinds[1](layer, self.config) for layer in self.causal.model.layers], pads, length)


class _Wave:
    def __init__(self, causal: nn.Module, layers: list["_Layer"], pads: Tensor, length: int):
        self.causal, self.trunk, self.layers, self.pads = causal, causal.model, layers, pads
        weight = self.trunk.embed_tokens.weight
        for layer in layers:
            layer.allocate(len(pads), length, weight)
        self.columns = torch.arange(length, device=pads.device)
        self.visible = self.columns[None] >= pads[:, None]  # [B, S+T]: a row never sees its own padding
        self.cos, self.sin = self.trunk.rotary_emb(weight[:1, :1], self.columns[None])  # [1, S+T, D]

    def prefill(self, tokens: Tensor) -> Tensor:
        start, device = tokens.shape[1], tokens.device
        # Left padding makes the first query rows of short prompts see nothing; they may look at themselves, nobody
        # reads them.
        causal = self.visible[:, None, :start] & torch.ones(start, start, dtype=torch.bool, device=device).tril()
        mask = causal | torch.eye(start, dtype=torch.bool, device=device)
        return self._forward(tokens, (self.columns[:start] - self.pads[:, None]).clamp_min(0), mask, 0)

    def __call__(self, token: Tensor, column: int) -> Tensor:
        visible = self.visible[:, None, : column + 1]
        return self._forward(token[:, None], (column - self.pads)[:, None], visible, column)

    def keep(self, rows: Tensor) -> None:
        self.pads, self.visible = self.pads[rows], self.visible[rows]
        for layer in self.layers:
            layer.keep(rows)

    def _forward(self, tokens: Tensor, positions: Tensor, visible: Tensor, column: int) -> Tensor:
        """Logits of the last position, [B, V]; keys and values of `tokens` [B, S] go into the caches from `column`
        on."""
        hidden = self.trunk.embed_tokens(tokens)
        rotation = self.cos[0][positions][:, None], self.sin[0][positions][:, None]  # [B, 1, S, D]
        mask = torch.zeros(visible.shape, dtype=hidden.dtype, device=hidden.device).masked_fill_(
            ~visible, float("-inf")
        )[:, None]
        for layer in self.layers:
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
