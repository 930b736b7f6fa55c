"""A stand-in for Mistral-7B and HH-RLHF that needs no network: random weights in the real formats, at toy size.

`build()` makes a two-layer Mistral with a byte-level BPE tokenizer that has no PAD (as Mistral's has none), an
instruction model derived from it, preference pairs in the HH-RLHF format, and `tests/offline_mistral.yaml`, the
overrides that put all of it in the place of the profile's hub ids: `python tests/offline_mistral.py && c2f run all
--profile mistral_7b --overrides tests/offline_mistral.yaml`.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
OVERRIDES = HERE / "offline_mistral.yaml"
PAIRS = 120
SUBJECTS = (
    "my garden",
    "a long train journey",
    "the old bicycle",
    "rye bread",
    "a chess opening",
    "the neighbour's cat",
    "wet shoes",
)
WISHES = (
    "Tell me about {}.",
    "What should I know about {}?",
    "How do I look after {}?",
    "Is there anything odd about {}?",
)
HELPFUL = (
    " Of course. Most people begin slowly and learn by doing.",
    " Gladly! Start with one small thing, then look again.",
)
POOR = (" No.", " I do not know and I do not know and I do not know.", " Why do you ask?")


def pairs(count: int = PAIRS, seed: int = 0) -> list[dict[str, str]]:
    """Rows {"chosen", "rejected"} as HH-RLHF has them: one or two turns, sharing all but the last answer."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        dialogue = f"\n\nHuman: {rng.choice(WISHES).format(rng.choice(SUBJECTS))} ({number})\n\nAssistant:"
        if rng.random() < 0.4:
            dialogue += f"{rng.choice(HELPFUL)}\n\nHuman: And then?\n\nAssistant:"
        rows.append({"chosen": dialogue + rng.choice(HELPFUL), "rejected": dialogue + rng.choice(POOR)})
    return rows


def tokenizer(texts: list[str], size: int = 400):
    """A byte-level BPE tokenizer trained on `texts`; it has BOS, EOS and UNK, no PAD."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def model(vocabulary: int, seed: int = 0, **changes):
    """A randomly initialised Mistral whose answers vary and sometimes end; `changes` go into its configuration."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    shape |= {"max_position_embeddings": 256, "sliding_window": None, "tie_word_embeddings": False}
    made = MistralForCausalLM(
        MistralConfig(vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, pad_token_id=None, **shape | changes)
    )
    with torch.no_grad():
        made.lm_head.weight.mul_(8)
        made.lm_head.weight[2].mul_(6)  # otherwise one token in 400 would be EOS
    return made


def build(folder: Path = HERE / ".offline_mistral", overrides: Path = OVERRIDES, dtype: str = "bfloat16") -> Path:
    """Make models, pairs and the overrides file; returns the latter's path."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    rows = pairs()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "text.txt").write_text("\n\n".join(WISHES) + "\n\n" + "A long one. " * 200, encoding="utf-8")
    (folder / "words.txt").write_text("I do\nnot know\n", encoding="utf-8")
    words = tokenizer([row["chosen"] for row in rows] + [row["rejected"] for row in rows])
    base = model(len(words)).to(getattr(torch, dtype))
    for name in ("base", "instruct"):
        if name == "instruct":  # a fine-tuned sibling: the same weights, moved a little
            torch.manual_seed(1)
            with torch.no_grad():
                for weight in base.parameters():
                    weight.add_(0.02 * weight.abs().mean() * torch.randn_like(weight))
        shutil.rmtree(folder / name, ignore_errors=True)  # of an earlier build, in other files
        # The sibling comes in shards, as large models do.
        base.save_pretrained(folder / name, max_shard_size="40KB" if name == "instruct" else "1GB")
        words.save_pretrained(folder / name)
    overrides.write_text(yaml.safe_dump(settings(folder, dtype), sort_keys=False), encoding="utf-8")
    return overrides


def settings(folder: Path, dtype: str) -> dict:
    """The overrides of profile mistral_7b: these models and pairs, and sizes of seconds."""
    law = {"name": "logistic", "start": 8, "maximum": 16, "step": 4}
    text, words = (str(path) if (path := folder / name).exists() else None for name in ("text.txt", "words.txt"))
    return {
        "models": {
            "base": str(folder / "base"), "instruct": str(folder / "instruct"), "dtype": dtype, "device": "cpu",
            "lora": {"rank": 4, "alpha": 8},
        },
        "data": {
            "preferences": str(folder / "pairs.jsonl"), "max_prompt_tokens": 96,
            "validation_prompts": 8, "test_prompts": 8,
        },
        "reward": {"pairs": 48, "held_out_pairs": 16, "pairs_per_step": 8, "max_tokens": 160},
        "coarse": {
            "law": law, "iterations": 2, "prompts": 8, "minibatches": 2, "critic_warmup": 1,
            "tokens_per_micro_batch": 1024,
            "tokens_in_cache": 2048, "evaluate_every": 1, "evaluation_prompts": 6,
            "evaluation_tokens": 16, "checkpoint_every": 1,
            "probes": 2, "actor_learning_rate": 1e-3,
        },
        "schedules": {"laws": {
            "fixed_short": {"name": "fixed", "limit": 8}, "fixed_long": {"name": "fixed", "limit": 16},
            "clock_linear": {"name": "clock", "shape": "linear", "start": 8, "maximum": 16, "duration": 2},
        }},
        "merge": {"coefficients": [0.5, 1.0]},
        "evaluation": {"max_tokens": 16, "prefixes": [8, 16], "samples_kept": 4},
        "retention": {"documents": 6, "answers": 6, "text": text},
        "safety": {"wordlist": words, "prompts": 6},
    }  # fmt: skip


if __name__ == "__main__":
    print(build(*map(Path, sys.argv[1:2])))
