"""What a tensor's name says: its layer, its module, its family and its depth in the network.

Depth follows the data: embeddings 0, layer k of L (k+1)/(L+1), final norm and head 1. A name that fits none of these
has no depth, and the plan refuses it unless a rule sets its coefficient: guessing would put an unknown tensor
silently under the wrong coefficient.
"""

import re
from collections.abc import Iterable

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_FIRST = re.compile(
    r"(?:^|\.)(?:embed_tokens|embed_positions|embed_in|wte|wpe|tok_embeddings|word_embeddings|embeddings)(?:\.|$)"
)
_LAST = re.compile(r"(?:^|\.)(?:norm|ln_f|final_layer_norm|final_layernorm|lm_head|embed_out|score)\.(?:weight|bias)$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|score)\.")
_NORM = re.compile(r"norm|(?:^|\.)ln_\w+\.")
_BUFFER = re.compile(
    r"(?:rotary_emb\.inv_freq|rotary_emb\.cos_cached|rotary_emb\.sin_cached|\.masked_bias|attn\.bias)$"
)


def layer_of(name: str) -> int | None:
    """Give the 0-based layer, or None for embeddings, final norm and head."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def layer_count(names: Iterable[str]) -> int:
    """Give L, the number of layers that the names show (0 without any)."""
    return max((layer_of(name) for name in names if layer_of(name) is not None), default=-1) + 1


def module_of(name: str) -> str:
    """Give the last module of the name: `q_proj`, `input_layernorm`, `embed_tokens`, `lm_head`, ..."""
    parts = [part for part in name.split(".") if part not in ("weight", "bias") and not part.isdigit()]
    return parts[-1] if parts else name


def family_of(name: str) -> str:
    """Give the module family: embedding, attention, mlp, norm, head or other."""
    if _HEAD.search(name):
        return "head"
    if _FIRST.search(name):
        return "embedding"
    if _NORM.search(name):
        return "norm"
    if re.search(r"attn|attention|\.[qkvo]_proj\.", name):
        return "attention"
    if re.search(r"mlp|feed_forward|ffn|gate_proj|up_proj|down_proj|\.fc[12]\.", name):
        return "mlp"
    return "other"


def depth_of(name: str, layers: int) -> float | None:
    """Give the depth in [0, 1], or None when the name tells none (design: embeddings 0, layer k (k+1)/(L+1), norm and
    head 1).
    """
    layer = layer_of(name)
    if layer is not None:
        return (layer + 1) / (layers + 1)
    if _FIRST.search(name):
        return 0.0
    return 1.0 if _LAST.search(name) else None


def is_buffer(name: str) -> bool:
    """Say whether the name is a constant that old versions stored beside the weights (rotary tables, attention
    masks).
    """
    return bool(_BUFFER.search(name))
