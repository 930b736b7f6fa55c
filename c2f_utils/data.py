"""Prompts, preference pairs and instructions: from the embedded domain, or from preference files in the HH-RLHF format.

An HH-RLHF row is {"chosen": transcript, "rejected": transcript}; both share the dialogue up to the last `\n\nAssistant:`, which is the
prompt. Rows that do not are counted and left out; a file without any usable row is refused.
"""

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from c2f_utils import tasks
from c2f_utils.config import Settings
from c2f_utils.errors import C2FError
from c2f_utils.files import sha256
from c2f_utils.rewards import Pair
from c2f_utils.rollout import KVDecoder, Prompt, make_prompts

ASSISTANT = "\n\nAssistant:"


@dataclass(frozen=True)
class Preference:
    """One comparison: the dialogue so far (ending in the assistant's header) and two answers."""

    prompt: str
    chosen: str
    rejected: str


def read_preferences(source: str, split: str = "train") -> list[Preference]:
    """Read HH-RLHF pairs from `.jsonl`, `.jsonl.gz` or a hub data set.

    Raises C2FError naming the file and line for missing fields, and for a source without usable pairs.
    """
    pairs = [p for p in map(_split_pair, _rows(source, split)) if p is not None]
    if not pairs:
        raise C2FError(f"data.preferences = {source!r} holds no usable pair; expected rows with 'chosen' and 'rejected' dialogues that share a prompt")
    return pairs


def _rows(source: str, split: str) -> Iterator[dict]:
    path = Path(source)
    if not path.suffix.endswith(("jsonl", "gz", "json")) and not path.exists():
        yield from _hub_rows(source, split)
        return
    if not path.is_file():
        raise C2FError(f"data.preferences = {source!r} does not exist; expected a .jsonl or .jsonl.gz file in the HH-RLHF format")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise C2FError(f"{path}, line {number}: not valid JSON ({error})") from None
            missing = [k for k in ("chosen", "rejected") if not isinstance(row, dict) or not isinstance(row.get(k), str)]
            if missing:
                raise C2FError(f"{path}, line {number}: text field(s) {', '.join(missing)} missing; expected {{'chosen': ..., 'rejected': ...}}")
            yield row


def _hub_rows(source: str, split: str) -> Iterator[dict]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(source, split=split)
    except Exception as error:  # the library raises many kinds; all mean the same to the user
        raise C2FError(f"data.preferences = {source!r} is no local file and cannot be loaded from the hub: {str(error).splitlines()[0]}") from error
    if not {"chosen", "rejected"} <= set(dataset.column_names):
        raise C2FError(f"data set {source!r} has columns {dataset.column_names}; expected 'chosen' and 'rejected'")
    yield from dataset


def _split_pair(row: dict) -> Preference | None:
    """Cut both transcripts at the last assistant header of `chosen`; None when they do not share the dialogue before it."""
    cut = row["chosen"].rfind(ASSISTANT)
    prompt = row["chosen"][: cut + len(ASSISTANT)]
    if cut < 0 or not row["rejected"].startswith(prompt):
        return None
    chosen, rejected = row["chosen"][len(prompt) :], row["rejected"][len(prompt) :]
    return Preference(prompt, chosen, rejected) if chosen.strip() and rejected.strip() and chosen != rejected else None


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
    texts = list(dict.fromkeys(p.prompt for p in read_preferences(data.preferences, data.preference_split)))
    random.Random("prompts").shuffle(texts)
    held_out = min(data.validation_prompts + data.test_prompts, len(texts) // 2)
    validation = held_out * data.validation_prompts // (data.validation_prompts + data.test_prompts)
    parts = {"validation": texts[:validation], "test": texts[validation:held_out], "train": texts[held_out:]}
    encoded = (Prompt(tuple(tokenizer(text)["input_ids"]), text) for text in parts[split])
    fitting = [p for p in encoded if len(p.ids) <= data.max_prompt_tokens][:count]
    if not fitting:
        raise C2FError(f"no {split} prompt of {data.preferences} has at most {data.max_prompt_tokens} tokens; raise data.max_prompt_tokens")
    return fitting


def hub_pairs(settings: Settings, tokenizer) -> tuple[list[Pair], list[Pair], int]:
    """Training and held-out pairs of token sequences (EOS after each complete answer), and how many were too long."""
    reward = settings.reward
    texts = read_preferences(settings.data.preferences, settings.data.preference_split)
    random.Random("pairs").shuffle(texts)
    pairs: list[Pair] = []
    too_long = 0
    for text in texts:
        pair = tuple([*tokenizer(text.prompt + answer)["input_ids"], tokenizer.eos_token_id] for answer in (text.chosen, text.rejected))
        if max(map(len, pair)) > reward.max_tokens:
            too_long += 1
        else:
            pairs.append(pair)
        if len(pairs) == reward.pairs + reward.held_out_pairs:
            break
    held_out = min(reward.held_out_pairs, len(pairs) // 4)
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
    """Labelled pairs on training problems: synthetic answers of mixed quality and samples of the base model, some of them cut.

    The label compares utility plus a small length bonus under Gaussian noise; see `Reward` for the sizes.
    """
    reward = settings.reward
    rng = random.Random(f"pairs-{seed}")
    questions = tasks.problems("train", count, rng.getrandbits(32), settings.data.operations)
    sampled = round(count * reward.base_share)
    decoder = KVDecoder(base, tokenizer)
    base_answers = decoder(make_prompts([q for q in questions[:sampled] for _ in (0, 1)]), 144, seed=rng.getrandbits(32))
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
