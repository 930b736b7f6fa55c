"""Which model classes are sampled and trained rightly, and what the library's forward costs in speed.

    python benchmarks/layouts.py --out benchmarks/results/layouts.json

Tiny random models of many classes, with the features of the real ones (query and key norms, layers without positions
or with a window, soft caps, scales, biases, experts, tied heads), every weight moved from its initial value. A row
holds the sampler that `choose` takes, greedy answers equal to those of `generate` on 20 prompts, the largest
log-probability errors of sampler and trainer against the plain forward (nats, float32), or the refusal. Then tokens/s
of both samplers and of `generate` on a model of the embedded base's size.
"""

import argparse
import statistics
from pathlib import Path
from time import perf_counter

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from c2f_utils.coarse.heads import Head
from c2f_utils.domain import stories
from c2f_utils.domain.problems import EOS, PAD
from c2f_utils.domain.samples import Prompt
from c2f_utils.errors import C2FError
from c2f_utils.files import write_json
from c2f_utils.models.packing import collate
from c2f_utils.models.pretrain import new_model
from c2f_utils.rollout.check import measure
from c2f_utils.rollout.choice import choose
from c2f_utils.rollout.decoder import KVDecoder
from c2f_utils.rollout.library import LibrarySampler
from c2f_utils.settings.load import load_settings

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 12}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
TWO_ROTARIES = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    }
}
HEADS = {"head_dim": 8}
LAYOUTS: dict[str, dict] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": HEADS,
    "ministral3": HEADS
    | {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "qwen2": {},
    "qwen3": HEADS,
    "qwen3_moe": HEADS | EXPERTS | {"norm_topk_prob": True},
    "gemma": HEADS,
    "gemma2": HEADS
    | MIXED
    | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": HEADS | MIXED | TWO_ROTARIES | {"query_pre_attn_scalar": 8},
    "olmo2": {},
    "olmo3": MIXED | TWO_ROTARIES,
    "granite": {
        "embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2,
    },
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": 12},
    "stablelm": {
        "use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.5,
    },
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": MIXED | {"logit_scale": 0.25},
    "gpt2": {},
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": HEADS | EXPERTS | {
        "layer_types": ["linear_attention", "full_attention"] * 2, "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "llama4_text": HEADS | EXPERTS | {
        "no_rope_layers": [1, 1, 1, 0], "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        "attention_chunk_size": 16, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48, "floor_scale": 16,
    },
    "gpt_oss": HEADS | MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": YARN},
    "glm4": HEADS | {"attention_bias": True, "partial_rotary_factor": 0.5},
    "ernie4_5": HEADS | {"use_bias": True},
    "hunyuan_v1_dense": HEADS,
    "exaone4": MIXED,
    "phi": {"partial_rotary_factor": 0.5},
    "starcoder2": {"sliding_window": 12},
    "bloom": {},
    "mpt": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "olmoe": EXPERTS,
    "seed_oss": HEADS,
    "helium": HEADS,
    "nemotron": {},
    "minimax_m2": HEADS | EXPERTS,
    "nanochat": {},
    "arcee": {},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": [1, 3]},
    "deepseek_v3": EXPERTS | {
        "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8,
        "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "mamba": {},
    "falcon_mamba": {},
    "jamba": EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "qwen3_5_text": HEADS | {
        "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "gemma4_text": HEADS | MIXED | {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "apertus": {},
    "cwm": {},
    "lfm3": {},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 12},
    "bart": {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "d_model": 32},
    "bert": {"is_decoder": False},
}  # fmt: skip
PROMPTS, TOKENS = 20, 12


class Numbers:
    """A tokenizer without text: ids are their own words."""

    eos_token_id, pad_token_id = 1, 0

    def decode(self, ids, **_) -> str:
        return " ".join(map(str, ids))


def model_of(kind: str, seed: int = 0) -> torch.nn.Module:
    """A tiny random model, float32, whose norms, biases and scales are not those of a fresh one."""
    config = AutoConfig.for_model(kind, **SHAPE | LAYOUTS[kind])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = parameter.ndim > 1
            parameter.add_(torch.randn_like(parameter), alpha=0.15 if wide else 0.2)
            if "embed" in name or "wte" in name:
                parameter.mul_(2)
    return model


def prompts(count: int = PROMPTS, seed: int = 0) -> list[Prompt]:
    """Random prompts of 3 to 40 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [3 + (11 * i) % 38 for i in range(count)]
    return [Prompt(tuple(torch.randint(3, 96, (n,), generator=generator).tolist()), "") for n in lengths]


def row_of(kind: str) -> dict:
    """What `choose` takes for a class and how exact it is; or the refusal."""
    model = model_of(kind)
    name = type(model).__name__
    try:
        head = Head(model)
        sampler = choose(model, Numbers())
        greedy = sampler(prompts(), TOKENS, temperature=0.0)
        found = measure(model, sampler, prompts()[::4], lambda answers: head.score(model, collate(answers, 0)), 16)
        if not found.holds:
            raise C2FError(str(found))
    except C2FError as error:
        return {"class": name, "refused": str(error)}
    equal = sum(a.ids == b for a, b in zip(greedy, generated(model, prompts(), TOKENS), strict=True))
    return {
        "class": name,
        "sampler": type(sampler).__name__,
        "own_head": not head.plain,
        "greedy_equal": f"{equal}/{len(greedy)}",
        "sampler_error": found.sampler_error,
        "trainer_error": found.trainer_error,
    }


def generated(model: torch.nn.Module, asked: list[Prompt], tokens: int, eos: int = 1) -> list[list[int]]:
    """Greedy answers of the library's `generate`, batched with left padding, up to EOS."""
    start = max(len(p.ids) for p in asked)
    ids = torch.tensor([[0] * (start - len(p.ids)) + list(p.ids) for p in asked])
    mask = torch.tensor([[0] * (start - len(p.ids)) + [1] * len(p.ids) for p in asked])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=eos
    )
    rows = out[:, start:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def speed(repeats: int) -> dict:
    """Tokens/s, medians over `repeats`, of 64 embedded problems with 96 tokens each, interleaved in one process."""
    settings = load_settings("tiny")
    model, tokenizer = new_model(settings.pretrain, 0).eval(), stories.make_tokenizer()
    asked = [Prompt(p.prompt_ids, "") for p in stories.problems("train", 64, 0)]
    never = torch.tensor([EOS])
    with torch.no_grad():
        model.lm_head.weight[never] = 0.0  # hardly ever ends: all three make about the same tokens
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p.ids[::-1]) for p in asked], batch_first=True).flip(1)

    def by_generate() -> int:
        out = model.generate(
            ids, attention_mask=(ids != 0).long(), max_new_tokens=96, do_sample=True, top_k=0, pad_token_id=PAD
        )
        return int((out[:, ids.shape[1] :] != PAD).sum())

    ways = {
        "KVDecoder": lambda: sum(s.tokens for s in KVDecoder(model, tokenizer)(asked, 96)),
        "LibrarySampler": lambda: sum(s.tokens for s in LibrarySampler(model, tokenizer)(asked, 96)),
        "generate": by_generate,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            began = perf_counter()
            tokens = way()
            if turn:
                rates[name].append(tokens / (perf_counter() - began))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_second": {name: round(statistics.median(found)) for name, found in rates.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    table = {kind: row_of(kind) for kind in LAYOUTS}
    write_json(options.out, {"layouts": table, "speed": speed(options.repeats)})
