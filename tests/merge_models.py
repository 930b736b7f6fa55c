"""Small Mistral-shaped checkpoints for the merge tests: written straight to safetensors, no model class involved."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

VOCAB, WIDTH, INNER, LAYERS = 40, 16, 24, 2
CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def shapes(layers: int = LAYERS, vocab: int = VOCAB) -> dict[str, tuple[int, ...]]:
    found = {"model.embed_tokens.weight": (vocab, WIDTH)}
    for k in range(layers):
        block = f"model.layers.{k}."
        found |= {f"{block}self_attn.{n}_proj.weight": (WIDTH if n in "qo" else WIDTH // 2, WIDTH) for n in "qkvo"}
        found |= {f"{block}mlp.{n}_proj.weight": (INNER, WIDTH) for n in ("gate", "up")}
        found |= {f"{block}mlp.down_proj.weight": (WIDTH, INNER)}
        found |= {f"{block}{n}_layernorm.weight": (WIDTH,) for n in ("input", "post_attention")}
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (vocab, WIDTH)}


def weights(seed: int, like: dict[str, Tensor] | None = None, spread: float = 0.02, **kwargs: int) -> dict[str, Tensor]:
    """Random float32 weights, or `like` plus random residues of the given spread."""
    generator = torch.Generator().manual_seed(seed)
    if like is None:
        return {name: spread * torch.randn(shape, generator=generator) for name, shape in shapes(**kwargs).items()}
    return {
        name: (t.float() + spread * torch.randn(t.shape, generator=generator)).to(t.dtype) for name, t in like.items()
    }


def save(folder: Path, tensors: dict[str, Tensor], shards: int = 1, **config: object) -> Path:
    """Write a checkpoint; tensors are dealt to shards in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    files = [f"model-{k + 1:05d}-of-{shards:05d}.safetensors" for k in range(shards)]
    weight_map = {name: files[k % shards] for k, name in enumerate(tensors)}
    for file in files:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def trio(folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1, **config: object) -> dict[str, str]:
    """Write base, instruct (residue of half its spread) and coarse (a tenth); returns the recipe's paths."""
    base = weights(0)
    models = {"base": base, "instruct": weights(1, base, 0.01), "coarse": weights(2, base, 0.002)}
    for role, tensors in models.items():
        save(folder / role, {name: tensor.to(dtype) for name, tensor in tensors.items()}, shards, **config)
    return {role: str(folder / role) for role in models}


def load(folder: Path | str) -> dict[str, Tensor]:
    """Read all tensors of a folder with the reference implementation."""
    found: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found.update(load_file(file))
    return found


def raw(folder: Path | str) -> dict[str, bytes]:
    """Each tensor's bytes, so that NaN payloads and signed zeros count."""
    return {
        name: t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
        for name, t in load(folder).items()
    }
