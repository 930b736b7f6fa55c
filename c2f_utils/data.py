"""Prompts and preference pairs as token ids: from the embedded domain, or from preference files in the HH-RLHF
format."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from c2f_utils import preferences, tasks
from c2f_utils.config import PAIR_ANSWER_TOKENS, Settings
from c2f_utils.errors import C2FError
from c2f_utils.files import sha256
from c2f_utils.rewards import Pair
from c2f_utils.rollout import KVDecoder, Prompt, make_prompts


def checksum(settings: Settings) -> dict[str, str]:
    """SHA-256 of the local data files a run reads, by path, for its provenance."""
    source = settings.data.preferences
    return {source: sha256(Path(source))} if source and Path(source).is_file() else {}


def prompts(settings: Settings, split: tasks.Split, count: int, tokenizer=None) -> list[Prompt]:
    """`count` prompts of one split, disjoint from the other splits; on hub data fewer when the data runs out.

    Raises C2FError when no prompt is short enough.
    """
    if settings.embedded:
        # Validation and test problems are the same for every seed, so that seeds are compared on equal questions.
        seed = settings.seed if split == "train" else 0
        return make_prompts(tasks.problems(split, count, seed, settings.data.operations))
    return _hub_prompts(settings, split, count, tokenizer)


def _hub_prompts(settings: Settings, split: tasks.Split, count: int, tokenizer) -> list[Prompt]:
    data = settings.data
    texts = list(dict.fromkeys(p.prompt for p in preferences.read(data.preferences, data.preference_split)[0]))
    random.Random("prompts").shuffle(texts)
    held_out = min(data.validation_prompts + data.test_prompts, len(texts) // 2)
    validation = held_out * data.validation_prompts // (data.validation_prompts + data.test_prompts)
    parts = {"validation": texts[:validation], "test": texts[validation:held_out], "train": texts[held_out:]}
    encoded = (Prompt(tuple(tokenizer(text)["input_ids"]), text) for text in parts[split])
    fitting = [p for p in encoded if len(p.ids) <= data.max_prompt_tokens][:count]
    if not fitting:
        raise C2FError(
            f"none of the {len(parts[split])} {split} prompts of {data.preferences} has at most "
            f"data.max_prompt_tokens = {data.max_prompt_tokens} "
            "tokens; raise it or add pairs"
        )
    return fitting


def hub_pairs(settings: Settings, tokenizer) -> tuple[list[Pair], list[Pair], int]:
    """Training and held-out pairs of token sequences (EOS after each complete answer), and how many were too long.

    Raises C2FError when fewer than four pairs are short enough.
    """
    reward = settings.reward
    texts, _ = preferences.read(settings.data.preferences, settings.data.preference_split)
    random.Random("pairs").shuffle(texts)
    pairs: list[Pair] = []
    too_long = 0
    for text in texts:
        pair = tuple(
            [*tokenizer(text.prompt + answer)["input_ids"], tokenizer.eos_token_id]
            for answer in (text.chosen, text.rejected)
        )
        if max(map(len, pair)) > reward.max_tokens:
            too_long += 1
        else:
            pairs.append(pair)
        if len(pairs) == reward.pairs + reward.held_out_pairs:
            break
    held_out = min(reward.held_out_pairs, len(pairs) // 4)
    if not held_out:
        raise C2FError(
            f"{len(pairs)} pairs of {settings.data.preferences} have at most reward.max_tokens = "
            f"{reward.max_tokens} tokens ({too_long} are longer); "
            "expected at least 4, one of them held out: raise reward.max_tokens or add pairs"
        )
    return pairs[held_out:], pairs[:held_out], too_long


@dataclass(frozen=True)
class EmbeddedPair:
    """Two answers to one problem with their true utilities; `first` is the labelled winner."""

    problem: tasks.Problem
    first: list[int]
    second: list[int]
    utilities: tuple[float, float]

    @property
    def tokens(self) -> Pair:
        prompt = self.problem.prompt_ids
        return prompt + self.first, prompt + self.second


def embedded_pairs(settings: Settings, base, tokenizer, count: int, seed: int) -> list[EmbeddedPair]:
    """Labelled pairs on training problems: synthetic answers of mixed quality and samples of the base model, some of
    them cut.

    The label compares utility plus a small length bonus under Gaussian noise; see `Reward` for the sizes.
    """
    reward = settings.reward
    rng = random.Random(f"pairs-{seed}")
    questions = tasks.problems("train", count, rng.getrandbits(32), settings.data.operations)
    sampled = round(count * reward.base_share)
    decoder = KVDecoder(base, tokenizer)
    base_answers = decoder(
        make_prompts([q for q in questions[:sampled] for _ in (0, 1)]), PAIR_ANSWER_TOKENS, seed=rng.getrandbits(32)
    )
    pairs = []
    for index, problem in enumerate(questions):
        if index < sampled:
            answers = [_maybe_cut(s.ids, rng, reward.cut_share) for s in base_answers[2 * index : 2 * index + 2]]
        else:
            answers = [tasks.synthetic_answer(problem, rng, reward.cut_share) for _ in (0, 1)]
        verdicts = [tasks.check(problem, a) for a in answers]
        labels = [tasks.labelled_utility(v, rng, reward.label_noise, reward.length_bonus) for v in verdicts]
        order = (0, 1) if labels[0] >= labels[1] else (1, 0)
        pairs.append(EmbeddedPair(problem, *(answers[i] for i in order), tuple(verdicts[i].utility for i in order)))
    rng.shuffle(pairs)
    return pairs


def _maybe_cut(ids: Sequence[int], rng: random.Random, share: float) -> list[int]:
    return list(ids[: rng.randint(4, max(5, len(ids)))]) if rng.random() < share else list(ids)
