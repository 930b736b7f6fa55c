"""`KVDecoder`'s wave on a GPU: one step of all prompts as a CUDA graph.

A step of a 7B model is some 2,000 small kernels. Started one by one from Python they take several times what reading
the weights takes, so a step is captured once and replayed. What differs from the wave in `decoder.py`, which serves
the CPU, and why:

- adapters of projections that read the same states are one pair of matrix products, beside one product with the base
  weights, all in the model's type (a bfloat16 policy recomputes its log-probabilities anyway);
- query heads that share a key/value head are queries of one attention call, which reads the cache once.

Without a GPU the same code runs uncaptured; tests compare it with the other wave.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BUCKET = 256  # attended positions grow in steps of this many: one capture each
ALIGN = 8  # positions; masks whose rows are aligned need no copy inside attention


class Projections:
    """Linear maps of the same input as one: weights stacked, plain LoRA adapters as one low-rank pair.

    `modules` of any other kind (quantised, DoRA, merged or disabled adapters) are called one after the other.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules, self.down, self.up = modules, None, None
        bases = [getattr(m, "base_layer", m) for m in modules]
        pairs = [_adapter(m) for m in modules]
        self.fused = all(type(b) is nn.Linear and b.bias is None for b in bases) and None not in pairs
        if not self.fused:
            return
        weights = [b.weight for b in bases]
        self.weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        if any(pairs):
            filled = [p or _nothing(w) for p, w in zip(pairs, weights, strict=True)]
            self.down = torch.cat([a for a, _ in filled]).to(self.weight.dtype)  # [sum r, in]
            self.up = torch.block_diag(*(b for _, b in filled)).to(self.weight.dtype).T.contiguous()  # [sum r, out]

    def __call__(self, x: Tensor) -> Tensor:
        if not self.fused:
            return torch.cat([module(x) for module in self.modules], -1)
        y = F.linear(x, self.weight)
        if self.down is not None:
            y.view(-1, y.shape[-1]).addmm_(F.linear(x, self.down).view(-1, self.up.shape[0]), self.up)
        return y


def _adapter(module: nn.Module) -> tuple[Tensor, ...] | None:
    """(A [r, in], scaled B [out, r]) of an active plain LoRA adapter, () without adapter, None for anything else."""
    if not hasattr(module, "base_layer"):
        return ()
    names = getattr(module, "active_adapters", [])
    if len(names) != 1 or module.merged or module.disable_adapters or module.lora_variant:
        return None
    if names[0] not in module.lora_A:
        return ()
    return module.lora_A[names[0]].weight, module.lora_B[names[0]].weight * module.scaling[names[0]]


def _nothing(weight: Tensor) -> tuple[Tensor, Tensor]:
    return weight.new_zeros(0, weight.shape[1]), weight.new_zeros(weight.shape[0], 0)


class GraphLayer:
    """One decoder layer and its cache [B, KV, L, D], written at a position that lives on the device."""

    def __init__(self, layer: nn.Module, config):
        a, m = layer.self_attn, layer.mlp
        self.layer, self.act, self.head, self.scale = layer, m.act_fn, a.head_dim, a.scaling
        self.queries, self.keys_values = config.num_attention_heads, config.num_key_value_heads
        self.qkv, self.out = Projections([a.q_proj, a.k_proj, a.v_proj]), Projections([a.o_proj])
        self.gate_up, self.down = Projections([m.gate_proj, m.up_proj]), Projections([m.down_proj])

    def allocate(self, rows: int, length: int, like: Tensor) -> None:
        shape = (rows, self.keys_values, length, self.head)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)

    def keep(self, rows: Tensor) -> None:
        self.k, self.v = self.k[rows], self.v[rows]

    def __call__(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor, positions: Tensor) -> Tensor:
        """`mask` [B, 1, 1 or S, C] is added to the scores; keys and values go to cache `positions` [S]."""
        rows, steps, _ = hidden.shape
        width, groups = mask.shape[-1], self.queries // self.keys_values
        qkv = self.qkv(_norm(self.layer.input_layernorm, hidden)).view(rows, steps, -1, self.head).transpose(1, 2)
        q, k, v = qkv.split((self.queries, self.keys_values, self.keys_values), 1)
        self.k.index_copy_(2, positions, rotate(k, rotation))
        self.v.index_copy_(2, positions, v)
        # [B, KV, G*S, D]: the query heads of a group are further queries, and the cache is read once for all of them.
        grouped = rotate(q, rotation).reshape(rows, self.keys_values, groups * steps, self.head)
        if steps > 1:
            mask = mask.repeat(1, 1, groups, 1)
        mixed = F.scaled_dot_product_attention(
            grouped,
            self.k[:, :, :width],
            self.v[:, :, :width],
            attn_mask=mask.expand(rows, self.keys_values, groups * steps, width),
            scale=self.scale,
        )
        mixed = mixed.reshape(rows, self.queries, steps, self.head).transpose(1, 2).reshape(rows, steps, -1)
        hidden = hidden + self.out(mixed)
        gate, up = self.gate_up(_norm(self.layer.post_attention_layernorm, hidden)).chunk(2, -1)
        return hidden + self.down(self.act(gate) * up)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    eps = norm.eps if isinstance(norm, nn.RMSNorm) else norm.variance_epsilon
    return F.rms_norm(x, x.shape[-1:], norm.weight, eps)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding, half-split layout as in Llama."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Wave:
    """The cache of prompts that are decoded together, and the forward pass on it."""

    def __init__(self, causal: nn.Module, layers: list[GraphLayer], pads: Tensor, length: int):
        self.causal, self.trunk, self.layers, self.pads = causal, causal.model, layers, pads
        self.length = -(-length // ALIGN) * ALIGN
        weight = self.trunk.embed_tokens.weight
        for layer in layers:
            layer.allocate(len(pads), self.length, weight)
        self.columns = torch.arange(self.length, device=weight.device)
        cos, sin = self.trunk.rotary_emb(weight[:1, :1], self.columns[None])
        self.cos, self.sin = cos[0], sin[0]  # [L, D]
        self.column = torch.zeros(1, dtype=torch.long, device=weight.device)
        self.token = torch.zeros(len(pads), 1, dtype=torch.long, device=weight.device)
        self.graph, self.width, self.logits = None, 0, None

    def prefill(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after left-padded prompts [B, S]."""
        steps = tokens.shape[1]
        columns = self.columns[:steps]
        # Left padding makes the first query rows of short prompts see nothing; they may look at themselves, nobody
        # reads them.
        causal = (columns[None] >= self.pads[:, None])[:, None] & (columns[None] <= columns[:, None])
        seen = causal | torch.eye(steps, dtype=torch.bool, device=tokens.device)
        return self._forward(tokens, (columns - self.pads[:, None]).clamp_min(0), seen, columns)

    def __call__(self, token: Tensor, column: int) -> Tensor:
        """Logits [B, V] after one more token [B], which stands in cache position `column`."""
        self.token.copy_(token[:, None])
        self.column.fill_(column)
        width = min(self.length, -(-(column + 1) // BUCKET) * BUCKET)
        if self.token.device.type != "cuda":
            return self._step(width)
        if self.graph is None or width != self.width:
            self._capture(width)
        self.graph.replay()
        return self.logits

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        for layer in self.layers:
            layer.keep(rows)
        self.pads, self.token, self.graph = self.pads[rows], self.token[rows], None

    def _step(self, width: int) -> Tensor:
        columns = self.columns[:width]
        seen = (columns >= self.pads[:, None]) & (columns <= self.column)
        return self._forward(self.token, (self.column - self.pads)[:, None], seen[:, None], self.column)

    def _capture(self, width: int) -> None:
        if self.graph is None:
            stream = torch.cuda.Stream()  # libraries set themselves up outside a capture
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step(width)
            torch.cuda.current_stream().wait_stream(stream)
        self.graph, self.width = torch.cuda.CUDAGraph(), width
        with torch.cuda.graph(self.graph):
            self.logits = self._step(width)

    def _forward(self, tokens: Tensor, positions: Tensor, seen: Tensor, columns: Tensor) -> Tensor:
        hidden = self.trunk.embed_tokens(tokens)
        rotation = self.cos[positions][:, None], self.sin[positions][:, None]  # [B, 1, S, D]
        mask = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device).masked_fill_(~seen, float("-inf"))
        for layer in self.layers:
            hidden = layer(hidden, rotation, mask[:, None], columns)
        return self.causal.lm_head(_norm(self.trunk.norm, hidden[:, -1])).float()
