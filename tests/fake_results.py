"""Synthetic results on disk, shaped like a finished run: figures, tables and the report are tested without one."""

import json
from pathlib import Path

import numpy as np

NULL_WITHOUT_CHECKER = ("accuracy_last", "accuracy_first", "correct_steps", "utility")
STAGES = (
    "00_environment_and_data",
    "01_base_model",
    "02_reward_model",
    "03_coarse_rlhf",
    "04_length_schedules",
    "05_instruction_model",
    "06_residue_merging",
    "07_evaluation",
)
# name: label, role, then at T = 1: last, first, steps, tokens, rep4, duplicates, eos, utility, reward
MODELS = {
    "base": ("Base", "base", 0.24, 0.25, 1.12, 114.1, 0.40, 0.41, 0.34, 0.99, -0.02),
    "instruct": ("Instruct", "instruct", 0.40, 0.40, 1.19, 20.6, 0.00, 0.00, 1.00, 1.22, -0.41),
    "coarse": ("Coarse Actor", "coarse", 0.41, 0.58, 3.05, 158.9, 0.41, 0.40, 0.02, 2.67, 1.39),
    "fine": ("Fine Actor", "fine", 0.79, 0.80, 3.20, 54.1, 0.04, 0.04, 0.97, 3.63, 0.64),
    "interpolation": ("Instruct + base, no RL", "control", 0.38, 0.38, 1.27, 34.1, 0.06, 0.06, 0.93, 1.26, -0.33),
    "random_residue": ("Instruct + random residue", "control", 0.36, 0.36, 1.15, 24.0, 0.01, 0.01, 0.99, 1.10, -0.45),
    "instruct_forced": ("Instruct, analysis forced", "control", 0.70, 0.71, 3.00, 50.0, 0.02, 0.02, 1.00, 3.20, 0.45),
    "base_forced": ("Base, analysis forced", "control", 0.47, 0.60, 2.90, 130.0, 0.38, 0.36, 0.20, 2.60, 0.90),
    "ppo_instruct": ("PPO on instruct", "control", 0.76, 0.77, 3.39, 60.9, 0.05, 0.04, 0.94, 3.67, 0.82),
    "fixed_long_residue": ("Residue of fixed-long", "control", 0.79, 0.80, 3.18, 62.0, 0.05, 0.04, 0.95, 3.55, 0.66),
}


def metrics(last, first, steps, tokens, rep4, duplicates, eos, utility, reward, n=256, checker=True) -> dict:
    row = {
        "accuracy_last": last,
        "accuracy_first": first,
        "correct_steps": steps,
        "mean_tokens": tokens,
        "rep4": rep4,
        "duplicate_sentences": duplicates,
        "eos_rate": eos,
        "utility": utility,
        "reward": reward,
        "n": n,
    }
    return row if checker else {key: None if key in NULL_WITHOUT_CHECKER else value for key, value in row.items()}


def fake_run(tmp_path: Path, run_id: str = "demo", seed: int = 0, checker: bool = True, skip: tuple = ()) -> Path:
    """Write a whole run below `tmp_path` and return its directory; `checker=False` gives the nulls of hub data."""
    run, rng = Path(tmp_path) / run_id, np.random.default_rng(seed)
    makers = {
        "01_base_model": base,
        "02_reward_model": reward,
        "03_coarse_rlhf": coarse,
        "04_length_schedules": schedules,
        "05_instruction_model": instruct,
        "06_residue_merging": merging,
        "07_evaluation": evaluation,
    }
    for number, stage in enumerate(STAGES):
        if stage in skip:
            continue
        here = run / stage
        here.mkdir(parents=True)
        settings = {"profile": "tiny", "seed": seed, "coarse": {"iterations": 17}}
        dump(here / "config.json", {"stage": stage, "settings": settings, "threads": 1})
        dump(here / "status.json", status(number))
        dump(here / "provenance.json", provenance(stage, seed))
        dump(here / "timings.json", {"compute": 12.5 + number, "figures": 1.25})
        dump(here / "results.json", makers[stage](here, rng, checker) if stage in makers else {"prompts": 512})
    return run


def provenance(stage: str, seed: int) -> dict:
    session = {
        "started": "2025-01-02T03:00:00.000+00:00",
        "threads": 1,
        "device": "cpu",
        "code": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "machine": {"python": "3.11.9", "platform": "Linux-6.1-x86_64", "cores": 2},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "matplotlib": "3.11.2"},
    }
    return {"stage": stage, "seed": seed, "settings": "a" * 16, "inputs": {}, "parents": {}, "sessions": [session]}


def status(number: int) -> dict:
    return {
        "status": "done",
        "started": f"2025-01-02T03:0{number}:00.000+00:00",
        "finished": f"2025-01-02T03:0{number}:{20 + number}.000+00:00",
        "heartbeat": f"2025-01-02T03:0{number}:{20 + number}.000+00:00",
        "peak_mb": 900 + 10 * number,
        "alarms": [],
    }


def dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")


def base(here: Path, rng, checker: bool) -> dict:
    steps = np.arange(0, 1440, 10)
    loss = (
        0.75 + 3.6 * np.exp(-steps / 150) - 0.35 / (1 + np.exp(-(steps - 700) / 60)) + rng.normal(0, 0.04, len(steps))
    )
    rows = [
        {"step": int(s), "tokens": int(s * 1944), "loss": float(value), "lr": 6e-3 * min(1, (s + 10) / 40)}
        for s, value in zip(steps, loss, strict=True)
    ]
    validation = {"forced_accuracy": 0.95, "forced_direct_accuracy": 0.15}
    if not checker:
        rows, validation = [], {"forced_accuracy": None, "forced_direct_accuracy": None}
    return {
        "loss": rows,
        "validation": validation,
        "behaviour": metrics(*MODELS["base"][2:], checker=checker),
        "parameters": 96_576,
    }


def reward(here: Path, rng, checker: bool) -> dict:
    edges = np.linspace(0, 4, 9)
    calibration = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        predicted, n = 1 / (1 + np.exp(-(low + high) / 2)), int(200 / (1 + low))
        observed = float(np.clip(predicted - 0.03 + rng.normal(0, 0.02), 0, 1))
        calibration.append(
            {"margin_low": low, "margin_high": high, "predicted": predicted, "observed": observed, "n": n}
        )
    tokens = rng.integers(5, 161, 400)
    utility = np.clip(rng.normal(1, 1.3, 400) + tokens / 100, -1, 5)
    scores = 0.55 * (utility - 1.5) + 0.004 * (tokens - 80) + rng.normal(0, 0.5, 400)
    points = [
        {"tokens": int(t), "reward": float(r), "utility": float(u) if checker else None}
        for t, r, u in zip(tokens, scores, utility, strict=True)
    ]
    prefixes = [
        {"tokens": int(t), "reward_mean": float(1.4 * (1 - np.exp(-t / 45)) - 0.6), "reward_se": 0.05}
        for t in range(8, 161, 8)
    ]
    return {
        "pair_accuracy": 0.74,
        "n_pairs": 4000,
        "held_out_pairs": 800,
        "loss": [{"step": s, "loss": float(0.69 * np.exp(-s / 400) + 0.3)} for s in range(0, 300, 10)],
        "calibration": calibration,
        "length_bias": {
            "pearson": 0.52,
            "spearman": 0.5,
            "slope_per_100_tokens": 0.9,
            "partial_given_utility": 0.21 if checker else None,
        },
        "length_bias_models": [bias_row(f"member {k}", 0.01 * k, checker) for k in (1, 2, 3)]
        + [bias_row("average of 3", 0.015, checker)],
        "points": points,
        "prefix_reward": prefixes,
        "mean": 0.1,
        "std": 1.3,
        "utility_correlation": 0.78 if checker else None,
    }


def bias_row(model: str, shift: float, checker: bool) -> dict:
    values = {"pearson": 0.4, "spearman": 0.38, "slope_per_10_tokens": 0.09, "slope_given_utility": 0.03}
    values |= {"longer_preferred": 0.66, "longer_labelled": 0.62, "excess": 0.04, "accuracy_longer": 0.9}
    row = {"model": model, "pairs": 500, "better_by": "utility" if checker else "label"}
    for name, value in (values | {"accuracy_shorter": 0.85}).items():
        row[name] = {"value": value + shift, "low": value + shift - 0.03, "high": value + shift + 0.03}
    return row if checker else row | {"slope_given_utility": None}


def coarse(here: Path, rng, checker: bool) -> dict:
    rows, tokens, limit = [], 0, 24
    for it in range(17):
        step = 8 / (1 + np.exp(-(1.0 + rng.normal(0, 0.4))))
        length = limit * (0.97 if it > 2 else 0.86)
        tokens += int(64 * length)
        fresh = np.clip(it / 14, 0, 1)
        rows.append(
            {
                "iteration": it,
                "limit": round(limit),
                "next_limit": round(limit + step),
                "reason": "truncated 0.93, explained variance 0.41",
                "rollout_tokens": tokens,
                "reward": float(-0.9 + 2.2 * fresh + rng.normal(0, 0.08)),
                "reward_sd": 0.8,
                "kl_per_token": float(0.01 + 0.11 * fresh),
                "mean_tokens": float(length),
                "p95_tokens": float(limit),
                "truncated_share": float(0.7 + 0.28 * fresh),
                "entropy": float(1.0 - 0.45 * fresh + rng.normal(0, 0.02)),
                "policy_loss": float(rng.normal(0, 0.02)),
                "value_loss": float(0.6 * np.exp(-it / 8) + 0.1),
                "explained_variance": float(0.3 + 0.4 * fresh),
                "clip_fraction": 0.1,
                "ratio_error": 1e-6,
                "rep4": float(0.1 + 0.32 * fresh),
                "seconds": 1.0,
            }
        )
        limit = min(144, limit + step)
    with open(here / "metrics.jsonl", "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
    curve = curve_of([row["limit"] for row in rows], [row["rollout_tokens"] for row in rows], 2.9, rng, checker)
    probes = [
        {
            "iteration": it,
            "prompt": "how many ?",
            "text": f"answer : {it} .",
            "reward": 0.1,
            "tokens": 4,
            "stop": "limit",
        }
        for it in (0, 8, 16)
    ]
    return {
        "law": "logistic",
        "rollout_tokens": tokens,
        "iterations": 17,
        "final": metrics(*MODELS["coarse"][2:], n=128, checker=checker),
        "curve": curve,
        "limits": [row["limit"] for row in rows],
        "probes": probes,
    }


def curve_of(limits, tokens, top, rng, checker) -> list[dict]:
    rows = []
    for it in sorted({*range(0, len(limits), 2), len(limits) - 1}):
        done = np.clip(it / (len(limits) - 3), 0, 1)
        utility = 1.0 + (top - 1.0) * done + rng.normal(0, 0.08)
        last, first = 0.24 + 0.2 * done + rng.normal(0, 0.015), 0.25 + 0.35 * done + rng.normal(0, 0.015)
        rows.append(
            {"iteration": it, "rollout_tokens": int(tokens[it]), "limit": limits[it]}
            | metrics(
                last, first, 1 + 2 * done, 114 + 45 * done, 0.4, 0.4, 0.34 - 0.32 * done, utility, utility / 2 - 0.3
            )
            if checker
            else {"iteration": it, "rollout_tokens": int(tokens[it]), "limit": limits[it]}
            | metrics(0, 0, 0, 114 + 45 * done, 0.4, 0.4, 0.3, 0, utility / 2 - 0.3, checker=False)
        )
    return rows


def schedules(here: Path, rng, checker: bool, seeds: tuple = ("0", "1", "2")) -> dict:
    grow = np.minimum(144, 24 + 7.1 * np.arange(17))
    laws = {
        "fixed_short": ("fixed 48", "fixed", [48] * 17, 2.2),
        "fixed_long": ("fixed 144", "fixed", [144] * 17, 2.95),
        "clock_linear": ("linear clock", "clock", np.round(grow).tolist(), 2.92),
        "logistic": ("logistic", "logistic", np.round(grow * 0.98 + 1).tolist(), 2.99),
    }
    out = {}
    for name, (label, kind, limits, top) in laws.items():
        runs = {}
        for seed in seeds:
            tokens = np.cumsum([64 * limit * rng.uniform(0.95, 0.99) for limit in limits]).tolist()
            curve = curve_of(limits, tokens, top + rng.normal(0, 0.1), rng, checker)
            final = {
                key: value for key, value in curve[-1].items() if key not in ("iteration", "rollout_tokens", "limit")
            }
            runs[seed] = {"rollout_tokens": int(tokens[-1]), "final": final, "curve": curve, "limits": limits}
        out[name] = {"label": label, "law": {"name": kind}, "seeds": runs}
    return {"laws": out}


def instruct(here: Path, rng, checker: bool) -> dict:
    return {
        "loss": [{"step": s, "loss": float(2.2 * np.exp(-s / 40) + 0.4)} for s in range(0, 200, 5)],
        "behaviour": metrics(*MODELS["instruct"][2:], n=128, checker=checker),
        "examples": 8000,
    }


def merging(here: Path, rng, checker: bool) -> dict:
    table = {
        0.0: (0.40, 0.40, 1.2, 21, 0.00, 0.00, 1.0, 1.22, -0.41),
        0.3: (0.70, 0.70, 2.7, 39, 0.00, 0.01, 0.99, 2.9, 0.30),
        0.4: (0.79, 0.79, 3.0, 46, 0.02, 0.02, 0.98, 3.3, 0.51),
        0.5: (0.84, 0.84, 3.2, 52, 0.03, 0.03, 0.98, 3.5, 0.69),
        0.6: (0.84, 0.85, 3.3, 56, 0.04, 0.04, 0.97, 3.6, 0.79),
        0.7: (0.88, 0.89, 3.4, 56, 0.04, 0.04, 0.97, 3.8, 0.82),
        0.8: (0.83, 0.86, 3.4, 59, 0.06, 0.06, 0.96, 3.6, 0.81),
        1.0: (0.75, 0.82, 3.3, 81, 0.13, 0.12, 0.85, 3.3, 0.97),
    }

    def scored(row: dict) -> dict:
        quality = row["utility"] if row["utility"] is not None else row["reward"]
        return row | {"score": round(quality - 0.01 * row["mean_tokens"], 4)}

    def named(key: str, found: dict) -> list[dict]:
        return [{key: name} | scored(metrics(*values, n=128, checker=checker)) for name, values in found.items()]

    layers = {
        "all layers": table[0.7],
        "first half only": (0.55, 0.56, 1.9, 33, 0.01, 0.01, 0.99, 2.1, 0.1),
        "second half only": (0.77, 0.78, 3.07, 49, 0.03, 0.02, 0.98, 3.48, 0.55),
        "rising 0.3 to 0.7": (0.77, 0.79, 3.1, 50, 0.03, 0.02, 0.98, 3.5, 0.56),
        "attention only": (0.52, 0.52, 1.8, 30, 0.01, 0.01, 0.99, 1.9, 0.0),
    }
    operators = {
        "residue": table[0.7],
        "linear": (0.60, 0.61, 2.33, 48, 0.06, 0.06, 0.94, 2.57, 0.25),
        "ties (density 0.3)": (0.72, 0.78, 3.21, 73, 0.12, 0.11, 0.85, 3.5, 0.78),
        "dare": (0.77, 0.79, 3.14, 52, 0.04, 0.03, 0.98, 3.53, 0.6),
        "trim": (0.79, 0.80, 3.18, 53, 0.04, 0.03, 0.97, 3.59, 0.61),
    }
    parents = {role: metrics(*MODELS[role][2:], n=128, checker=checker) for role in ("base", "instruct", "coarse")}
    modules = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    modules += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
    places = [(layer, module) for layer in range(2) for module in modules]
    places += [(None, "embed_tokens"), (None, "norm"), (None, "lm_head")]
    anatomy = [
        {
            "tensor": f"model.layers.{layer}.{module}.weight" if layer is not None else f"{module}.weight",
            "layer": layer,
            "module": module,
            "norm_coarse": float(rng.uniform(0.1, 0.9)),
            "norm_instruct": float(rng.uniform(0.1, 0.6)),
            "cosine": float(rng.normal(0, 0.05)),
            "sparsity": 0.0,
        }
        for layer, module in places
    ]
    return {
        "chosen": {"operator": {"name": "residue"}, "coefficient": 0.7},
        "parents": parents,
        "score": "utility - 0.01 * tokens" if checker else "reward - 0.01 * tokens",
        "sweep": [{"coefficient": key} | row for key, row in zip(table, named("_", table), strict=True)],
        "layers": [row | {"rules": f"rule of {row['name']}"} for row in named("name", layers)],
        "operators": named("operator", operators),
        "anatomy": anatomy,
        "survival": {"attention": 1.0, "mlp": 0.99},
    }


def evaluation(here: Path, rng, checker: bool) -> dict:
    models = {}
    for name, (label, role, *values) in MODELS.items():
        values = [value + rng.normal(0, 0.01) if k < 2 else value for k, value in enumerate(values)]
        cooler = [min(1.0, values[0] + 0.12), min(1.0, values[1] + 0.16), *values[2:]]
        greedy = [min(1.0, values[0] + 0.17), min(1.0, values[1] + 0.2), *values[2:]]
        models[name] = {
            "label": label,
            "role": role,
            "sampled_t1": metrics(*values, checker=checker),
            "sampled_t07": metrics(*cooler, checker=checker),
            "greedy": metrics(*greedy, checker=checker),
        }
    paired = []
    for other in models:
        for metric in ("accuracy_last", "accuracy_first", "reward"):
            a, b = models["fine"]["sampled_t1"][metric], models[other]["sampled_t1"][metric]
            if other == "fine" or a is None:
                continue
            d = a - b
            paired.append(
                {"a": "fine", "b": other, "metric": metric, "decoding": "sampled_t1", "difference": d}
                | {"low": d - 0.06, "high": d + 0.06, "p": 0.5 if abs(d) < 0.06 else 0.0002, "n": 256}
            )
    prefix = {
        name: [
            {
                "prefix": p,
                "rep4": values[6] * share if values[5] > p / 1.6 else None,
                "n": 256 if values[5] > p / 1.6 else 0,
            }
            for p, share in ((32, 0.15), (64, 0.5), (128, 0.9))
        ]
        for name, values in MODELS.items()
    }
    samples = []
    for prompt in ("question : anna has 7 coins . first anna sells 4 . how many coins ?", "a <b> & prompt ?"):
        for name, values in MODELS.items():
            text = "let us think . start with 7 . first sells 4 so 7 - 4 = 3 . answer : 3 . " * (
                3 if values[5] > 100 else 1
            )
            samples.append(
                {
                    "model": name,
                    "decoding": "sampled_t1",
                    "prompt": prompt,
                    "text": text.strip(),
                    "tokens": int(values[5]),
                }
                | {"stop": "limit" if values[7] < 0.5 else "eos", "reward": values[9], "utility": None}
                | {"correct_steps": None, "first_answer": 3, "last_answer": 3, "gold": 3}
            )
    with open(here / "samples.jsonl", "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in samples)
    return {
        "models": models,
        "prefix_redundancy": prefix,
        "decoding_of_prefixes": "sampled_t1",
        "paired": paired,
        "limit": 160,
        "verdicts": [],
    }
