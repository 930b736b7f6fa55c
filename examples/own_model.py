"""Make a small base model and an instruction model from HH-RLHF text, for the example in `own_model.md`.

    python examples/own_model.py data/harmless_base.jsonl.gz

A byte-level BPE, a Mistral of 1.4 million weights trained on the transcripts of the training dialogues, and an
instruction model: that very base, trained further on the chosen answers in a chat template of its own. Validation and
test dialogues, as the notebooks split them, are seen by neither. Five to ten minutes on one core; what comes out writes
English of a sort, knows nothing, and is as offensive as its data.
"""

import argparse
import itertools
import random
from pathlib import Path

import torch

from c2f_utils.domain import forms, preferences
from c2f_utils.models import pretrain
from c2f_utils.models.loading import save_model
from c2f_utils.settings.config import Pretrain
from c2f_utils.stages.data import hub_split

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]  # the first three as `pretrain` expects them
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(texts: list[str], size: int):
    """A byte-level BPE of `size` tokens; those of the chat template are in it from the start, so that base and
    instruction model share one vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def new_model(vocabulary: int, config: Pretrain, seed: int):
    """A randomly initialised Mistral."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    return MistralForCausalLM(MistralConfig(
        vocab_size=vocabulary, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.key_value_heads,
        max_position_embeddings=config.max_positions, sliding_window=None, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ))  # fmt: skip


def repeated(documents: list[list[int]], tokens: int, longest: int, seed: int):
    """Documents in new orders until `tokens` are given out; longer ones are cut after `longest` tokens."""
    rng = random.Random(seed)
    given = 0
    while given < tokens:
        for document in rng.sample(documents, len(documents)):
            yield document[:longest]
            given += min(longest, len(document))
            if given >= tokens:
                return


def make(pairs: Path, out: Path, config: Pretrain, vocabulary: int, instruct_tokens: int, seed: int = 0) -> None:
    """Write `out`/base and `out`/instruct."""
    rows = [row for row in preferences.read(str(pairs))[0] if hub_split(row.prompt) == "train"]
    texts = list(
        dict.fromkeys(itertools.chain.from_iterable((r.prompt + r.chosen, r.prompt + r.rejected) for r in rows))
    )
    tokenizer = make_tokenizer(texts, vocabulary)
    documents = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    print(f"{len(rows)} training pairs, {sum(map(len, documents)):,} tokens of transcripts")
    model = new_model(len(tokenizer), config, seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights")
    pretrain.train(model, repeated(documents, config.tokens, config.max_positions, seed), config, seed, _say(config))
    save_model(model, tokenizer, out / "base")

    tokenizer.chat_template = TEMPLATE
    chats = [tokenizer.apply_chat_template(forms.messages(r.prompt + r.chosen), tokenize=False) for r in rows]
    examples = [tokenizer(chat)["input_ids"] for chat in chats]
    slower = {key: getattr(config, key) / 4 for key in ("learning_rate_matrices", "learning_rate_other")}
    tuned = config.model_copy(update={"tokens": instruct_tokens, **slower})
    pretrain.train(model, repeated(examples, instruct_tokens, config.max_positions, seed), tuned, seed, _say(tuned))
    save_model(model, tokenizer, out / "instruct")


def _say(config: Pretrain):
    def log(row: dict) -> None:
        if row["step"] % 5 == 0 or row["tokens"] >= config.tokens:
            print(f"{row['tokens']:>9,} of {config.tokens:,} tokens: {row['loss']:.3f} nats per token", flush=True)

    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", type=Path, help="HH-RLHF pairs, .jsonl or .jsonl.gz")
    parser.add_argument("--out", type=Path, default=Path("data/own_model"), help="folder for base/ and instruct/")
    parser.add_argument("--tokens", type=int, default=1_200_000, help="training tokens of the base")
    parser.add_argument("--hidden", type=int, default=128, help="width of the model")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=2048, help="tokens of the BPE")
    given = parser.parse_args()
    config = Pretrain(
        hidden_size=given.hidden, layers=given.layers, intermediate_size=11 * given.hidden // 4, max_positions=512,
        tokens=given.tokens, learning_rate_matrices=4e-3, learning_rate_other=3e-3,
    )  # fmt: skip
    make(given.pairs, given.out, config, given.vocabulary, given.tokens // 5)
    print(f"{given.out}/base and {given.out}/instruct are there; next: the command in examples/own_model.md")


if __name__ == "__main__":
    main()
