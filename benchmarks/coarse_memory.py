"""Does memory stay flat while the limit grows? Peak resident memory of whole training iterations against l(t).

    python benchmarks/coarse_memory.py                  # vocabulary 32,000, l0 = 32 up to 8 l0, 64 prompts: minutes
    python benchmarks/coarse_memory.py --vocabulary 8192 --prompts 16 --budget 256 --iterations 1      # a small try

A randomly initialised Mistral with a separate critic and a reward model trains under a fixed limit; every limit runs
in a fresh process. `growth` is the peak resident size during the iterations minus the resident size after loading,
read from /proc (Linux). `full_logits` is what the logits of all rollout tokens of one iteration would take in
float32. EOS is never sampled, so every answer has the full limit. Writes benchmarks/results/coarse_memory.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PROMPT = 16  # tokens
KEPT = ("vocabulary", "width", "prompts", "iterations", "budget", "cache", "start")  # settings that results name


def resident(key: str) -> float:
    """`VmRSS` or `VmHWM` of this process, MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS


class Tokenizer:
    """As much of one as the decoder asks for."""

    eos_token_id = 2

    def decode(self, ids, **options) -> str:
        return ""


def measure(options: argparse.Namespace) -> dict:
    """Train `iterations` under one limit in this process; sizes in MiB."""
    import copy

    import torch
    import trl.kernels  # noqa: F401  imported late by the trainer: code, not data
    from transformers import AutoModelForSequenceClassification, MistralConfig, MistralForCausalLM

    from c2f_utils import limits
    from c2f_utils.coarse import actor_critic
    from c2f_utils.coarse.trainer import CoarseTrainer
    from c2f_utils.domain import samples
    from c2f_utils.models import rewards
    from c2f_utils.rollout.decoder import KVDecoder
    from c2f_utils.settings.config import Coarse
    from c2f_utils.settings.laws import Law

    torch.manual_seed(0)
    shape = MistralConfig(
        vocab_size=options.vocabulary, hidden_size=options.width, intermediate_size=options.width * 5 // 2,
        num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, sliding_window=None,
    )  # fmt: skip
    actor = MistralForCausalLM(shape).eval()
    with torch.no_grad():
        actor.lm_head.weight[Tokenizer.eos_token_id] = 0.0
        actor.lm_head.weight.mul_(0.1)
    scored = AutoModelForSequenceClassification.from_config(
        MistralConfig(**shape.to_diff_dict() | {"num_labels": 1})
    ).eval()
    reward = rewards.RewardModel(scored, 0, tokens_per_batch=options.budget)
    policy = actor_critic.ActorCritic(actor, actor_critic.Critic(options.width, copy.deepcopy(scored.model)))
    decoder = KVDecoder(actor, Tokenizer(), options.cache)
    decoder.eos = frozenset({-1})  # no answer ends early
    prompts = [
        samples.Prompt(tuple(int(t) for t in torch.randint(3, options.vocabulary, (PROMPT,))), "")
        for _ in range(options.prompts)
    ]
    config = Coarse(
        law=Law(name="fixed", limit=options.limit), iterations=options.iterations, prompts=options.prompts, epochs=1,
        minibatches=2, tokens_per_micro_batch=options.budget, tokens_in_cache=options.cache,
    )  # fmt: skip
    after_loading = resident("VmRSS")
    reset_peak()
    trainer = CoarseTrainer(policy, reward, decoder, prompts, limits.Fixed(options.limit), config, seed=0, pad_id=0)
    rows = list(trainer)
    peak = resident("VmHWM")
    tokens = rows[-1]["rollout_tokens"] // len(rows)
    return {
        "limit": options.limit, "rollout_tokens": tokens,
        "full_logits": round(tokens * options.vocabulary * 4 / 2**20, 1),
        "after_loading": round(after_loading, 1), "peak": round(peak, 1), "growth": round(peak - after_loading, 1),
        "seconds_per_iteration": round(sum(r["seconds"] for r in rows) / len(rows), 2),
    }  # fmt: skip


def run(options: argparse.Namespace) -> list[dict]:
    """One fresh process per limit."""
    rows = []
    for factor in options.factors:
        command = [sys.executable, __file__, "--limit", str(options.start * factor)]
        for name in ("vocabulary", "width", "prompts", "iterations", "budget", "cache"):
            command += [f"--{name}", str(getattr(options, name))]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(done.stderr)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=64, help="hidden size")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--budget", type=int, default=1024, help="padded tokens of a micro-batch")
    parser.add_argument("--cache", type=int, default=3072, help="key/value positions while decoding")
    parser.add_argument("--start", type=int, default=32, help="l0, tokens")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2, 4, 8], help="limits as multiples of l0")
    parser.add_argument("--limit", type=int, help="measure this one limit in this process")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "coarse_memory.json")
    options = parser.parse_args()
    if options.limit:
        print(json.dumps(measure(options)))
        return
    from c2f_utils import files
    from c2f_utils.runs import provenance

    rows = run(options)
    result = {
        "what": "peak resident memory of coarse RLHF against the limit; sizes in MiB",
        "settings": {name: getattr(options, name) for name in KEPT},
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "versions": provenance.versions(), "rows": rows, "ratio": round(rows[-1]["growth"] / rows[0]["growth"], 3),
    }  # fmt: skip
    files.write_json(options.out, result)
    print(f"growth at 8 l0 / growth at l0 = {result['ratio']}; written to {options.out.name}")


if __name__ == "__main__":
    main()
