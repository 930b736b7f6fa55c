"""What does coarse RLHF of a 7B model cost on one GPU? Seconds, tokens/s and peak memory of the five verbs.

    python benchmarks/coarse_gpu.py                   # a GPU with 140 GB: 8 minutes or so
    python benchmarks/coarse_gpu.py --small           # seconds, also on a CPU: the same path at toy size

A randomly initialised Mistral-7B in bfloat16 with LoRA as in the profile `mistral_7b`, a critic that shares its trunk
(zero head), a random reward model of the same shape, and a fixed limit; EOS is never sampled, so every answer has the
full limit. Besides the table: the share of the card's bfloat16 matrix rate (8192^3, measured in the same run) that
`improve` reaches, with and without recomputed activations; how near decoding is to reading weights and cache once per
step; peak memory at an eighth of the limit; transformers' continuous batching on the same work; and, on a GPU, one
iteration with compiled layers.

FLOPs of `improve` per epoch (multiplications and additions; a = 2 if activations are recomputed, else 1 forward pass):

    trunk      2 n T (a + 1)                n weights of the linear maps, T tokens; frozen, so no weight gradients
    adapters   2 r T (a + 2)                r weights of the adapters
    attention  2 h layers sum(t^2) (a + 2)  h hidden size, t tokens of a sequence; causal half only
    head       2 h V A (1 + 2)              A answer tokens; its logits are computed again in the backward pass

Writes benchmarks/results/coarse_gpu_<card>.json, again after every section.
"""

import argparse
import gc
import json
import re
import statistics
import sys
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
VERBS = ("collect", "judge", "credit", "improve", "advance")
SHAPE = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32_768, "sliding_window": None,
}  # fmt: skip
TOY = SHAPE | {
    "vocab_size": 5000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
# 16,640 tokens: the 32 answers of a minibatch are two micro-batches of 16.
FULL_SIZE = {"prompts": 128, "prompt": 16, "limit": 1024, "budget": 16_640, "cache": 2**18, "side": 8192}
TOY_SIZE = {"prompts": 8, "prompt": 6, "limit": 16, "budget": 64, "cache": 4096, "side": 128}


class Tokenizer:
    """As much of one as the samplers ask for."""

    eos_token_id = -1  # no answer ends early

    def decode(self, ids, **options) -> str:
        return ""


class Clock:
    """Seconds and peak memory (GiB, null without a GPU) of a block on the device."""

    def __init__(self, device):
        self.device, self.cuda = device, device.type == "cuda"

    def __enter__(self):
        import torch

        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.began = perf_counter()
        return self

    def __exit__(self, *error) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()
        self.seconds = perf_counter() - self.began
        self.peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.cuda else None


def rates(device, side: int) -> dict:
    """The card's two ceilings: bfloat16 matrix product on random data (TFLOP/s) and copy (GB/s read and written)."""
    import torch

    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(side * side * 8, device=device)
    target = torch.empty_like(source)
    found = {}
    for name, work in (("product", lambda: a @ b), ("copy", lambda: target.copy_(source))):
        work(), work()
        seconds = []
        for _ in range(10):
            with Clock(device) as clock:
                work()
            seconds.append(clock.seconds)
        found[name] = statistics.median(seconds)
    return {
        "bfloat16_tflops": round(2 * side**3 / found["product"] / 1e12, 3),
        "copy_gb_per_second": round(2 * source.nbytes / found["copy"] / 1e9, 1),
    }


def build(options: argparse.Namespace, device):
    """(policy, reward, prompts), everything random and made on the device."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, MistralConfig

    from c2f_utils.coarse import actor_critic
    from c2f_utils.domain.samples import Prompt
    from c2f_utils.models import loading, rewards
    from c2f_utils.settings.load import load_settings

    settings = load_settings("mistral_7b")
    loading.device(settings.models)  # products of float32 matrices as in a run
    shape = MistralConfig(**options.shape, num_labels=1, pad_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        actor = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).eval()
        scored = AutoModelForSequenceClassification.from_config(shape, dtype=torch.bfloat16).eval()
        actor, scored = loading.fuse_norms(actor), loading.fuse_norms(scored)
        actor = loading.add_lora(actor, settings.models.lora, alike=device.type == "cuda")
    policy = actor_critic.ActorCritic(actor, actor_critic.Critic(shape.hidden_size).to(device))
    drawn = torch.randint(3, shape.vocab_size, (options.prompts, options.prompt)).tolist()
    prompts = [Prompt(tuple(ids), "") for ids in drawn]
    return policy, rewards.RewardModel(scored, 0, tokens_per_batch=2 * options.budget), prompts


def make_trainer(options: argparse.Namespace, parts, limit: int):
    """A trainer with the profile's settings under a fixed limit, without warm-up, so that every iteration is whole."""
    from c2f_utils import limits
    from c2f_utils.coarse.trainer import CoarseTrainer
    from c2f_utils.rollout.decoder import KVDecoder
    from c2f_utils.settings.laws import Law
    from c2f_utils.settings.load import load_settings

    policy, reward, prompts = parts
    changes = {
        "law": Law(name="fixed", limit=limit), "prompts": options.prompts, "tokens_per_micro_batch": options.budget,
        "tokens_in_cache": options.cache, "critic_warmup": 0, "iterations": options.iterations,
    }  # fmt: skip
    config = load_settings("mistral_7b").coarse.model_copy(update=changes)
    decoder = KVDecoder(policy.actor, Tokenizer(), options.cache)
    return CoarseTrainer(policy, reward, decoder, prompts, limits.Fixed(limit), config, seed=0, pad_id=0)


def iterate(trainer, device) -> dict:
    """One iteration: {verb: {seconds, tokens_per_second, peak_gib}} and its metrics row."""
    found, e, stats = {}, None, None
    for verb in VERBS:
        call = getattr(trainer, verb)
        with Clock(device) as clock:
            if verb == "collect":
                e = call()
            elif verb == "improve":
                stats = call(e)
            elif verb == "advance":
                row = call(e, stats)
            else:
                e = call(e)
        found[verb] = {"seconds": round(clock.seconds, 3), "peak_gib": clock.peak}
    tokens = sum(s.tokens for s in e.samples)
    assert tokens == trainer.law.limit * len(e.samples), "an answer ended early"
    for verb in VERBS:
        found[verb]["tokens_per_second"] = round(tokens / found[verb]["seconds"], 1) if found[verb]["seconds"] else None
    keep = ("kl_per_token", "ratio_error", "sampler_mismatch", "value_loss", "tokens_per_micro_batch")
    return {"verbs": found, "metrics": {name: row[name] for name in keep}}


def summary(rows: list[dict]) -> dict:
    """Per verb: median seconds and rate, largest peak, of the iterations after the first if there are any."""
    table = {}
    for verb in VERBS:
        cells = [row["verbs"][verb] for row in rows[1:] or rows]
        table[verb] = {
            "seconds": round(statistics.median([c["seconds"] for c in cells]), 3),
            "tokens_per_second": cells[0]["tokens_per_second"]
            and round(statistics.median([c["tokens_per_second"] for c in cells]), 1),
            "peak_gib": cells[0]["peak_gib"] and max(c["peak_gib"] for c in cells),
        }
    return table


def weights(options: argparse.Namespace) -> dict[str, int]:
    """Weights of the trunk's linear maps, of the adapters on them, and of the head."""
    from c2f_utils.settings.load import load_settings

    s = options.shape
    h, i, layers = s["hidden_size"], s["intermediate_size"], s["num_hidden_layers"]
    kv = h * s["num_key_value_heads"] // s["num_attention_heads"]
    maps = [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)]
    rank = load_settings("mistral_7b").models.lora.rank
    return {
        "trunk": layers * sum(a * b for a, b in maps), "adapters": layers * rank * sum(a + b for a, b in maps),
        "head": h * s["vocab_size"],
    }  # fmt: skip


def improve_flops(options: argparse.Namespace, limit: int, recomputed: bool) -> float:
    """FLOPs of one epoch over one iteration's answers (formula: top of this file)."""
    count, width, passes = weights(options), options.prompt + limit, 2 if recomputed else 1
    tokens, h, layers = options.prompts * width, options.shape["hidden_size"], options.shape["num_hidden_layers"]
    return (
        2 * count["trunk"] * tokens * (passes + 1)
        + 2 * count["adapters"] * tokens * (passes + 2)
        + 2 * h * layers * options.prompts * width**2 * (passes + 2)
        + 2 * count["head"] * options.prompts * limit * 3
    )


def improved(options: argparse.Namespace, seconds: float, epochs: int, recomputed: bool, card: dict) -> dict:
    """FLOP/s of `improve` beside the card's own; `useful` does not count what recomputing activations adds."""
    done, useful = (epochs * improve_flops(options, options.limit, r) for r in (recomputed, False))
    rate = done / seconds / 1e12
    return {
        "seconds": seconds, "tflop": round(done / 1e12, 3), "tflops": round(rate, 3),
        "share_of_measured": float(f"{rate / card['bfloat16_tflops']:.3g}"),
        "useful_share_of_measured": float(f"{useful / seconds / 1e12 / card['bfloat16_tflops']:.3g}"),
    }  # fmt: skip


def decoded(options: argparse.Namespace, seconds: float, card: dict) -> dict:
    """Decoding beside its floor: weights once and the filled cache once per step, at the card's copy rate."""
    count, s = weights(options), options.shape
    kv = 2 * s["hidden_size"] // s["num_attention_heads"] * s["num_key_value_heads"] * s["num_hidden_layers"]
    cache = 2 * kv * options.prompts * (options.prompt + options.limit / 2)  # mean over the steps, bytes
    floor = (2 * sum(count.values()) + cache) / (card["copy_gb_per_second"] * 1e9)
    step = seconds / options.limit
    return {
        "milliseconds_per_step": round(step * 1e3, 3), "weights_gb": round(2 * sum(count.values()) / 1e9, 3),
        "mean_cache_gb": round(cache / 1e9, 3), "floor_milliseconds": round(floor * 1e3, 3),
        "share_of_floor": round(floor / step, 3),
    }  # fmt: skip


def flat(options: argparse.Namespace, parts, limits: tuple[int, ...], device) -> dict:
    """Peak of `improve` under a budget that every minibatch fills: it should not grow with the limit."""
    filled = argparse.Namespace(**vars(options) | {"budget": options.budget // 4})
    peaks = {}
    for limit in limits:
        gc.collect()
        peaks[str(limit)] = iterate(make_trainer(filled, parts, limit), device)["verbs"]["improve"]["peak_gib"]
    return {"tokens_per_micro_batch": filled.budget} | peaks


def compiled(options: argparse.Namespace, parts, other: int, device) -> dict:
    """An iteration with compiled layers, after one at another limit: a moving limit makes compiled shapes varying."""
    parts[0].compile_layers()
    with Clock(device) as clock:
        for limit in (options.limit, other):
            iterate(make_trainer(options, parts, limit), device)
    row = iterate(make_trainer(options, parts, options.limit), device)
    return {"first_two_iterations_seconds": round(clock.seconds, 1), "table": summary([row]), "metrics": row["metrics"]}


def without_recomputing(options: argparse.Namespace, parts, device) -> dict:
    """`improve` with activations kept, on the answers of one more iteration."""
    policy = parts[0]
    policy.actor.gradient_checkpointing_disable()
    policy.actor.eval()
    trainer = make_trainer(options, parts, options.limit)  # tries the budget anew
    e = trainer.credit(trainer.judge(trainer.collect()))
    with Clock(device) as clock:
        trainer.improve(e)
    policy.recompute_activations()
    return {"seconds": round(clock.seconds, 3), "peak_gib": clock.peak, "tokens_per_micro_batch": trainer.budget.tokens}


def engines(options: argparse.Namespace, parts, limit: int, device) -> dict:
    """Tokens/s of both samplers on the same prompts; an engine that fails is named with its error."""
    from c2f_utils.rollout.continuous import ContinuousBatching
    from c2f_utils.rollout.decoder import KVDecoder

    policy, _, prompts = parts
    policy.eval()
    found: dict[str, object] = {"limit": limit, "prompts": len(prompts)}
    for name, kind in (("kv", KVDecoder), ("continuous", ContinuousBatching)):
        sampler = kind(policy.actor, Tokenizer(), options.cache)
        try:
            sampler(prompts, min(8, limit), seed=1)  # warm-up
            with Clock(device) as clock:
                samples = sampler(prompts, limit, seed=2)
            tokens = sum(s.tokens for s in samples)
            found[name] = {
                "seconds": round(clock.seconds, 3), "tokens": tokens, "peak_gib": clock.peak,
                "tokens_per_second": round(tokens / clock.seconds, 1),
            }  # fmt: skip
        except Exception as error:  # the other sections stand without it
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
    policy.actor.train()
    return found


def run(options: argparse.Namespace, keep) -> dict:
    """All sections in order; `keep(result)` is called after each."""
    import torch

    from c2f_utils.runs import provenance

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {
        "what": "coarse RLHF of a random Mistral with LoRA on one device; GiB by torch.cuda.max_memory_allocated",
        "device": provenance.device_name(), "machine": provenance.machine(), "versions": provenance.versions(),
        "shape": options.shape, "weights": weights(options), "seed": 0,
        "settings": {n: getattr(options, n) for n in ("iterations", *FULL_SIZE)}, "reward_model": "same shape, random",
    }  # fmt: skip

    def section(name: str, value) -> None:
        result[name] = value
        print(json.dumps({name: value}), flush=True)
        keep(result)

    section("card", rates(device, options.side))
    with Clock(device) as clock:
        parts = build(options, device)
        parts[0].recompute_activations()
    section("built", {"seconds": round(clock.seconds, 2), "peak_gib": clock.peak})
    result["adapters"] = str(next(p.dtype for n, p in parts[0].named_parameters() if "lora_" in n))
    with Clock(device) as clock:
        trainer = make_trainer(options, parts, options.limit)
    section("tried_before_training", {"seconds": round(clock.seconds, 2), "peak_gib": clock.peak})
    rows = []
    for _ in range(options.iterations):
        rows.append(iterate(trainer, device))
        section("rows", rows)
    section("table", table := summary(rows))
    epochs = trainer.config.epochs
    section("epochs", epochs)
    section("improve", improved(options, table["improve"]["seconds"], epochs, True, result["card"]))
    section("decode", decoded(options, table["collect"]["seconds"], result["card"]))
    del trainer
    short = max(1, options.limit // 8)
    section("at_an_eighth_of_the_limit", {"limit": short, **iterate(make_trainer(options, parts, short), device)})
    section("improve_peak_gib_by_limit", flat(options, parts, (short, options.limit), device))
    gc.collect()
    kept = without_recomputing(options, parts, device)
    section("activations_kept", kept | improved(options, kept["seconds"], epochs, False, result["card"]))
    gc.collect()
    section("engines", engines(options, parts, options.engine_limit, device))
    gc.collect()
    if device.type == "cuda":
        again = compiled(options, parts, short, device)
        seconds = again["table"]["improve"]["seconds"]
        section("compiled", again | {"improve": improved(options, seconds, epochs, True, result["card"])})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="toy size, for tests")
    parser.add_argument("--iterations", type=int, default=3)
    for name, value in FULL_SIZE.items():
        parser.add_argument(f"--{name}", type=int, help=f"default {value}, with --small {TOY_SIZE[name]}")
    parser.add_argument("--engine-limit", type=int, help="limit of the comparison of samplers; a quarter of --limit")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/coarse_gpu_<card>.json")
    options = parser.parse_args()
    for name, value in (TOY_SIZE if options.small else FULL_SIZE).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.shape = TOY if options.small else SHAPE
    options.engine_limit = options.engine_limit or max(1, options.limit // 4)
    import torch

    from c2f_utils import files

    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    name = "coarse_gpu_" + re.sub(r"[^a-z0-9]+", "_", card.lower()).strip("_") + ".json"
    out = options.out or ROOT / "benchmarks" / "results" / name
    run(options, lambda result: files.write_json(out, result))
    print(f"written to {out.name}")


if __name__ == "__main__":
    main()
