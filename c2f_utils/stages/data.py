"""Prompts and preference pairs as token ids: from the embedded domain, or from preference files in the HH-RLHF
format."""

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from c2f_utils.domain import forms, preferences
from c2f_utils.domain.problems import Problem, Split, check, labelled_utility, synthetic_answer
from c2f_utils.domain.samples import Prompt, content, make_prompts
from c2f_utils.errors import C2FError
from c2f_utils.files import sha256
from c2f_utils.models.generated import generator
from c2f_utils.models.rewards import Pair
from c2f_utils.rollout.choice import choose
from c2f_utils.settings.config import PAIR_ANSWER_TOKENS, Reward, Settings

JUDGE_SEED = 2_000_000  # beside the run's: the pairs of a held-out reward model


def checksum(settings: Settings) -> dict[str, str]:
    """SHA-256 of the local data files a run reads, by path, for its provenance."""
    data = settings.data
    if settings.embedded or not data.preferences:
        return {}
    files = preferences.files(data.preferences, data.preference_split, data.preference_subsets)
    return {str(file): sha256(file) for file in files}


def preference_texts(settings: Settings) -> tuple[list[preferences.Preference], int]:
    """The pairs that the settings name, as texts, and the number of rows left out."""
    data = settings.data
    return preferences.read(data.preferences, data.preference_split, data.preference_subsets)


def prompts(settings: Settings, split: Split, count: int, tokenizer=None, seed: int | None = None) -> list[Prompt]:
    """`count` prompts of one split, disjoint from the other splits; on hub data fewer when the data runs out.

    On the embedded domain every seed has problems of its own, in every split. Raises C2FError when no prompt is short
    enough.
    """
    if settings.embedded:
        seed = settings.seed if seed is None else seed
        return make_prompts(generator(settings.data).problems(split, count, seed))
    return hub_prompts(settings, split, count, tokenizer)[0]


def hub_prompts(settings: Settings, split: Split, count: int, tokenizer) -> tuple[list[Prompt], int]:
    """Up to `count` prompts of one split of the user's pairs, always the same ones, and how many were left out on the
    way because they are longer than `data.max_prompt_tokens`; raises C2FError when none is short enough."""
    data, too_long = settings.data, 0
    texts = list(dict.fromkeys(p.prompt for p in preference_texts(settings)[0]))
    random.Random("prompts").shuffle(texts)
    mine = [text for text in texts if hub_split(text) == split]
    fitting: list[Prompt] = []
    for text in mine:
        prompt = Prompt(tuple(forms.prompt_ids(text, settings.models.base_form, tokenizer)), text)
        if len(prompt.ids) > data.max_prompt_tokens:
            too_long += 1
            continue
        fitting.append(prompt)
        if len(fitting) == count:
            break
    if not fitting:
        raise C2FError(
            f"none of the {len(mine)} {split} prompts of {data.preferences} has at most "
            f"data.max_prompt_tokens = {data.max_prompt_tokens} tokens; raise it or add pairs"
        )
    return fitting, too_long


def prompt_counts(settings: Settings, tokenizer) -> dict[str, dict[str, int]]:
    """Of the user's prompts, by split: how many the settings ask for, how many there are, and how many were left out
    because they are too long."""
    found = {}
    for split in ("train", "validation", "test"):
        wanted = getattr(settings.data, f"{split}_prompts")
        fitting, too_long = hub_prompts(settings, split, wanted, tokenizer)
        found[split] = {"asked": wanted, "there": len(fitting), "too_long": too_long}
    return found


def hub_split(prompt: str) -> Split:
    """The split of a dialogue, by its first turn: the same dialogue cut at several turns is never in two splits."""
    return {0: "validation", 1: "test"}.get(zlib.crc32(_opening(prompt).encode()) % 8, "train")


def _opening(prompt: str) -> str:
    return prompt.split(preferences.ASSISTANT)[0]


@dataclass(frozen=True)
class HubPair:
    """Two answers to one dialogue as full token sequences, the preferred one first, and their prompt's length."""

    prompt: str
    tokens: Pair
    prompt_tokens: int


def hub_pairs(settings: Settings, tokenizer) -> tuple[list[HubPair], list[HubPair], int]:
    """Training and held-out pairs of token sequences in the base's form, and how many were too long.

    An answer is what a sampler makes of one (`samples.finish`): up to a stop string, then EOS. Training pairs are on
    training dialogues, held-out pairs on validation dialogues. Raises C2FError without either.
    """
    reward, form = settings.reward, settings.models.base_form
    stops = forms.stop_strings(form, settings.data.stop_strings)
    texts, _ = preference_texts(settings)
    random.Random("pairs").shuffle(texts)
    wanted = {"train": reward.pairs, "validation": reward.held_out_pairs, "test": 0}
    pairs: dict[str, list[HubPair]] = {split: [] for split in wanted}
    too_long = 0
    for text in texts:
        split = hub_split(text.prompt)
        if len(pairs[split]) >= wanted[split]:
            continue
        prompt = forms.prompt_ids(text.prompt, form, tokenizer)
        answers = (content(answer, stops) for answer in (text.chosen, text.rejected))
        pair = tuple(
            [*prompt, *forms.answer_ids(answer, text.prompt, form, tokenizer), tokenizer.eos_token_id]
            for answer in answers
        )
        if max(map(len, pair)) > reward.max_tokens:
            too_long += 1
        else:
            pairs[split].append(HubPair(text.prompt, pair, len(prompt)))
    training, held_out = pairs["train"], pairs["validation"]
    if not training or not held_out:
        raise C2FError(
            f"{len(training)} training and {len(held_out)} held-out pairs of {settings.data.preferences} have at "
            f"most reward.max_tokens = {reward.max_tokens} tokens ({too_long} are longer); expected at least one of "
            "each: raise reward.max_tokens or add pairs"
        )
    return training, held_out, too_long


@dataclass(frozen=True)
class EmbeddedPair:
    """Two answers to one problem with their true utilities; `first` is the labelled winner."""

    problem: Problem
    first: list[int]
    second: list[int]
    utilities: tuple[float, float]

    @property
    def tokens(self) -> Pair:
        prompt = self.problem.prompt_ids
        return prompt + self.first, prompt + self.second


def embedded_pairs(
    settings: Settings, base, tokenizer, count: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> list[EmbeddedPair]:
    """Labelled pairs on training problems: synthetic answers of mixed quality and samples of the base model, some of
    them cut.

    The label compares utility plus a small length bonus under Gaussian noise; see `Reward` for the sizes. `progress`
    is called with the base's answers there are and all of them.
    """
    reward, rng = settings.reward, random.Random(f"pairs-{seed}")
    questions = generator(settings.data).problems("train", count, rng.getrandbits(32))
    sampled = round(count * reward.base_share)
    asked, seed = make_prompts([q for q in questions[:sampled] for _ in (0, 1)]), rng.getrandbits(32)
    base_answers = choose(base, tokenizer)(asked, PAIR_ANSWER_TOKENS, seed=seed, progress=progress) if asked else []
    pairs = []
    for index, problem in enumerate(questions):
        if index < sampled:
            answers = [_maybe_cut(s.ids, rng, reward.cut_share) for s in base_answers[2 * index : 2 * index + 2]]
        else:
            answers = [synthetic_answer(problem, rng, reward.cut_share) for _ in (0, 1)]
        pairs.append(labelled(problem, answers, reward, rng))
    rng.shuffle(pairs)
    return pairs


def fresh_pairs(
    settings: Settings, base, tokenizer, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Pair], str]:
    """Pairs for a judge, which no other model was trained on, and where they are from, in words.

    `judge.pairs` of them at most. On the embedded domain new ones, on problems that 02 has no pairs of. On hub data
    what 02 left over of the training pairs, without the dialogues that it was trained on; where that is less than half
    of what is asked for, its held-out pairs, on which it was measured but not trained.
    """
    wanted, reward = settings.judge.pairs, settings.reward
    if settings.embedded:
        known = set(_questions(settings, reward.pairs + reward.held_out_pairs, settings.seed))
        made = embedded_pairs(settings, base, tokenizer, wanted, settings.seed + JUDGE_SEED, progress)
        return [pair.tokens for pair in made if pair.problem not in known], "new pairs"
    more = settings.model_copy(update={"reward": reward.model_copy(update={"pairs": reward.pairs + wanted})})
    training, held_out, _ = hub_pairs(more, tokenizer)
    trained = {_opening(pair.prompt) for pair in training[: reward.pairs]}
    left = [pair.tokens for pair in training[reward.pairs :] if _opening(pair.prompt) not in trained]
    if 2 * len(left) >= wanted:
        return left, "training pairs that notebook 02 left over"
    return [pair.tokens for pair in held_out[:wanted]], "held-out pairs of notebook 02, for want of others"


def _questions(settings: Settings, count: int, seed: int) -> list[Problem]:
    """The problems of `embedded_pairs`, whose generator draws their seed first."""
    return generator(settings.data).problems("train", count, random.Random(f"pairs-{seed}").getrandbits(32))


def labelled(problem: Problem, answers: list[list[int]], reward: Reward, rng: random.Random) -> EmbeddedPair:
    """Two answers as a pair, the winner of their noisy labels first."""
    verdicts = [check(problem, a) for a in answers]
    labels = [labelled_utility(v, rng, reward.label_noise, reward.length_bonus) for v in verdicts]
    order = (0, 1) if labels[0] >= labels[1] else (1, 0)
    return EmbeddedPair(problem, *(answers[i] for i in order), tuple(verdicts[i].utility for i in order))


def _maybe_cut(ids: Sequence[int], rng: random.Random, share: float) -> list[int]:
    return list(ids[: rng.randint(4, max(5, len(ids)))]) if rng.random() < share else list(ids)
