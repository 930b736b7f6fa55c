"""What does it change that an answer ended by a stop string is scored with EOS in the header's place?

    c2f run 01 02 03 05 06 07 --profile small_gpu --overrides examples/own_model.yaml --run-id own
    python benchmarks/own_model.py own --out benchmarks/results/own_model.json

Takes a finished run of the example in `examples/own_model.md`. Trains the coarse actor of 03 once more with the header
left in what is scored, from the same base with the same seed, and compares: who ends answers by itself on the test
prompts, what a second reward model says (trained on the pairs of validation and test dialogues alone), and the
perplexity of the chosen answers to the test dialogues.
"""

import argparse
import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from time import process_time

import torch

from c2f_utils.coarse.heads import Head
from c2f_utils.domain import forms
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.files import read_mapping, root, write_json
from c2f_utils.measure import answers
from c2f_utils.models import loading, rewards
from c2f_utils.models.packing import collate, pack
from c2f_utils.runs.run import Run
from c2f_utils.settings.laws import make_law
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import coarse_rlhf, data
from c2f_utils.stages.inputs import Inputs


def as_sampled(samples: list[Sample]) -> list[Sample]:
    """The answers with the stop string left in what is scored, as it was done before."""
    return [replace(s, ids=s.sampled) for s in samples]


def endings(samples: list[Sample], reward: rewards.RewardModel, other: rewards.RewardModel) -> dict:
    """How answers end, and what both reward models say of them."""
    ways = Counter(s.stop for s in samples)
    row = answers.measure(samples, reward)
    return {
        "ends_itself": row["eos_rate"], "by_eos": ways["eos"], "by_stop_string": ways["string"], "cut": ways["limit"],
        "mean_tokens": row["mean_tokens"], "rep4": row["rep4"], "reward": row["reward"],
        "reward_of_second_model": round(float(other(samples).mean()), 4),
    }  # fmt: skip


def header_and_eos(samples: list[Sample], reward: rewards.RewardModel, eos: int) -> dict:
    """Scores of the answers that a stop string ended: as they are, with EOS put there by hand, with the header."""
    stopped = [s for s in samples if s.stop == "string"]
    plain = [replace(s, ids=[*s.ids[:-1], eos], stop="eos") for s in stopped]
    now, by_eos, header = reward(stopped), reward(plain), reward(as_sampled(stopped))
    return {
        "answers": len(stopped), "score": round(float(now.mean()), 4), "score_with_eos": round(float(by_eos.mean()), 4),
        "largest_difference": float((now - by_eos).abs().max()), "score_with_header": round(float(header.mean()), 4),
    }  # fmt: skip


@torch.no_grad()
def perplexity(model, chosen: list[tuple[str, str]], form: str, tokenizer) -> float:
    """exp of the mean nats per token of answers to dialogues, EOS included."""
    samples = []
    for prompt, answer in chosen:
        ids = forms.answer_ids(answer, prompt, form, tokenizer)
        samples.append(
            Sample(
                Prompt(tuple(forms.prompt_ids(prompt, form, tokenizer)), prompt),
                [*ids, tokenizer.eos_token_id],
                "eos",
                0,
            )
        )
    nats, tokens = 0.0, 0
    head = Head(model)
    for group in pack([s.positions for s in samples], 8192):
        batch = collate([samples[i] for i in group], tokenizer.pad_token_id)
        nats -= float(head.score(model, batch).sum())
        tokens += len(batch.targets)
    return round(float(torch.tensor(nats / tokens).exp()), 3)


def second_reward_model(inputs: Inputs, samples: list[Sample]) -> rewards.RewardModel:
    """Trained on pairs of validation and test dialogues, which neither the first nor any policy was trained on."""
    settings, words = inputs.settings, inputs.tokenizer
    pairs = []
    for text in data.preference_texts(settings)[0]:
        if data.hub_split(text.prompt) != "train":
            prompt = forms.prompt_ids(text.prompt, "raw", words)
            both = (forms.answer_ids(a, text.prompt, "raw", words) for a in (text.chosen, text.rejected))
            pairs.append(tuple([*prompt, *ids, words.eos_token_id] for ids in both))
    pairs = [pair for pair in pairs if max(map(len, pair)) <= settings.reward.max_tokens]
    random.Random(1).shuffle(pairs)
    model = rewards.train(inputs.base_source, pairs, words, settings, order=1)
    return rewards.RewardModel(model, words.pad_token_id).normalised_on(samples)


def trained_on_headers(inputs: Inputs) -> torch.nn.Module:
    """The coarse actor of 03 with the header left in what is scored; its checkpoints lie beside the run's stages."""
    folder = inputs.run.dir / "header_scored"
    process = coarse_rlhf.trainer(inputs, make_law(inputs.settings.coarse.law), folder, evaluated=False)
    clean = process.sampler
    process.sampler = lambda *given, **options: as_sampled(clean(*given, **options))
    for row in process:
        print(f"header left in: iteration {row['iteration']}, {1 - row['truncated_share']:.2f} end", flush=True)
    return process.policy.actor.eval()


def measured(run_id: str, overrides: Path) -> dict:
    run = Run(load_settings("small_gpu", 0, run_id, read_mapping(overrides)))
    run.here = run.stage("07_evaluation")
    inputs = Inputs(run)
    reward, test, eos = inputs.reward, inputs.prompts("test"), inputs.tokenizer.eos_token_id
    base = inputs.base()
    drawn = inputs.answers(base, test)
    second = second_reward_model(inputs, drawn)
    texts = [t for t in data.preference_texts(run.settings)[0] if data.hub_split(t.prompt) == "test"]
    chosen = [(t.prompt, t.chosen) for t in texts if len(inputs.tokenizer(t.prompt + t.chosen)["input_ids"]) < 500]
    fine = loading.load_causal(run.parent("06_residue_merging").model(), run.settings.models)
    models = {
        "base": (base, "raw"), "coarse, header scored": (trained_on_headers(inputs), "raw"),
        "coarse": (inputs.coarse(), "raw"), "instruct, transcript": (inputs.instruct(), "raw"),
        "instruct, chat template": (inputs.instruct(), "template"), "fine, transcript": (fine, "raw"),
        "fine, chat template": (fine, "template"),
    }  # fmt: skip
    rows = {}
    for name, (model, form) in models.items():
        words = inputs.tokenizer if form == "raw" else inputs.instruct_tokenizer
        rows[name] = endings(inputs.answers(model, test, form=form), reward, second)
        rows[name]["perplexity_of_chosen"] = perplexity(model, chosen, form, words)
        print(name, rows[name], flush=True)
    ranked = run.parent("02_reward_model").results()
    coarse = run.settings.coarse
    return {
        "size": {
            "weights": sum(p.numel() for p in base.parameters()), "vocabulary": len(inputs.tokenizer),
            "reward_pairs": ranked["n_pairs"], "iterations": coarse.iterations, "prompts": coarse.prompts,
            "limit": [coarse.law.start, coarse.law.maximum], "test_prompts": len(test), "chosen_answers": len(chosen),
        },
        "stop_string_answers_of_base": header_and_eos(drawn, reward, eos),
        "reward_accuracy": {
            "all": ranked["pair_accuracy"], "pairs": ranked["held_out_pairs"],
            **{key: ranked["length_bias_models"][-1][key] for key in ("accuracy_longer", "accuracy_shorter")},
        },
        "models": rows,
        "coefficient": run.parent("06_residue_merging").results()["chosen"]["coefficient"],
        "cpu_seconds": round(process_time()), "load_average": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="id of the finished run")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--overrides", type=Path, default=root() / "examples" / "own_model.yaml", help="of the run")
    given = parser.parse_args()
    write_json(given.out, measured(given.run, given.overrides))


if __name__ == "__main__":
    main()
