"""Generation and scoring of finished models under fixed limits and three decodings.

Inputs: a model, prompts, a reward model. Outputs: the metrics every results file uses. Checker metrics are null on
hub data, where nobody knows the true answer. A score is always read with its length: redundancy also at fixed prefixes.
"""

from collections.abc import Sequence

from torch import Tensor

from c2f_utils import redundancy
from c2f_utils.domain.problems import check
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.models.rewards import RewardFunction
from c2f_utils.rollout.choice import choose

TEMPERATURES = {"sampled_t1": 1.0, "sampled_t07": 0.7, "greedy": 0.0, "sampled_t01": 0.1}
CHECKER_METRICS = ("accuracy_last", "accuracy_first", "correct_steps", "utility")


def measure(samples: Sequence[Sample], reward: RewardFunction | None = None) -> dict[str, float | int | None]:
    """The metrics of one model under one decoding, rounded to 6 digits; `n` is the number of answers.

    accuracy_* and eos_rate are shares, correct_steps a mean count, mean_tokens a mean length (EOS included), rep4 and
    duplicate_sentences mean shares per answer, utility the checker's score, reward the normalised reward. eos_rate
    counts stop strings.
    """
    count = len(samples)
    row: dict[str, float | int | None] = dict.fromkeys(CHECKER_METRICS)
    if samples[0].prompt.problem:
        verdicts = [check(s.prompt.problem, s.answer) for s in samples]
        row["accuracy_last"] = sum(v.last_right for v in verdicts) / count
        row["accuracy_first"] = sum(v.first_right for v in verdicts) / count
        row["correct_steps"] = sum(v.correct_steps for v in verdicts) / count
        row["utility"] = sum(v.utility for v in verdicts) / count
        row["rep4"] = sum(v.rep4 for v in verdicts) / count
        row["duplicate_sentences"] = sum(v.duplicate_sentences for v in verdicts) / count
    else:
        row["rep4"] = sum(redundancy.rep_n(s.ids, 4) for s in samples) / count
        row["duplicate_sentences"] = (
            sum(redundancy.duplicate_sentence_share(redundancy.sentences(s.text)) for s in samples) / count
        )
    row["mean_tokens"] = sum(len(s.answer) for s in samples) / count
    row["eos_rate"] = sum(not s.cut for s in samples) / count
    row["reward"] = float(reward(samples).mean()) if reward else None
    return {k: None if v is None else round(v, 6) for k, v in row.items()} | {"n": count}


def first_right(samples: Sequence[Sample]) -> str:
    """Whether the first answer to each problem is right, in their order: "1" or "0" each, for paired intervals."""
    return "".join(str(int(check(s.prompt.problem, s.answer).first_right)) for s in samples)


def by_kind(samples: Sequence[Sample], rewards: Tensor | None = None) -> dict[str, dict]:
    """The metrics of `measure` for every kind of problem, given each sample's reward; {} where there is one kind."""
    kinds: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        kinds.setdefault(sample.prompt.problem.kind if sample.prompt.problem else "", []).append(index)
    if len(kinds) < 2:
        return {}

    def mine(places: list[int]) -> dict:
        return measure([samples[i] for i in places], None if rewards is None else lambda _: rewards[places])

    return {kind: mine(places) for kind, places in sorted(kinds.items())}


def answers(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    decoding: str,
    max_tokens: int,
    seed: int,
    stop_strings: Sequence[str] = (),
    tokens_in_cache: int = 65_536,
) -> list[Sample]:
    """One answer per prompt; the same seed gives the same answers, decodings do not share random numbers."""
    longest = max((len(p.ids) for p in prompts), default=0) + max_tokens
    decoder = choose(model, tokenizer, tokens_in_cache, stop_strings, longest=longest)
    offset = list(TEMPERATURES).index(decoding)
    return decoder(prompts, max_tokens, temperature=TEMPERATURES[decoding], seed=seed * 1000 + offset)


def prefix_rewards(
    samples: Sequence[Sample], reward: RewardFunction | None, prefixes: Sequence[int]
) -> dict[str, float] | None:
    """Mean reward of the same answers cut after fixed numbers of tokens, so that laws are compared at equal length.

    An answer that ended before keeps its reward; None when the reward cannot be asked for prefixes.
    """
    if not hasattr(reward, "prefix_scores"):
        return None
    scores = reward.prefix_scores(samples)
    return {str(k): round(sum(float(row[min(k, len(row)) - 1]) for row in scores) / len(scores), 6) for k in prefixes}


def rows(samples: Sequence[Sample], model: str, decoding: str, reward: RewardFunction | None = None) -> list[dict]:
    """samples.jsonl rows, one per answer; unknown fields are null."""
    scores = reward(samples).tolist() if reward and samples else [None] * len(samples)
    table = []
    for sample, score in zip(samples, scores, strict=True):
        verdict = check(sample.prompt.problem, sample.answer) if sample.prompt.problem else None
        text = sample.prompt.problem.vocabulary.decode(sample.answer) if verdict else sample.text
        table.append(
            {
                "model": model,
                "decoding": decoding,
                "prompt": sample.prompt.text,
                "text": text,
                "tokens": len(sample.answer),
                "stop": sample.stop,
                "reward": None if score is None else round(score, 4),
                "utility": verdict and round(verdict.utility, 4),
                "correct_steps": verdict and verdict.correct_steps,
                "first_answer": verdict and verdict.first_answer,
                "last_answer": verdict and verdict.last_answer,
                "gold": verdict and verdict.gold,
            }
        )
    return table


def per_answer(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Per-answer values for paired comparisons: accuracy_last, accuracy_first, utility, tokens, rep4 (checker ones
    only if known)."""
    values = {"tokens": [float(len(s.answer)) for s in samples]}
    if samples[0].prompt.problem:
        verdicts = [check(s.prompt.problem, s.answer) for s in samples]
        values |= {
            "accuracy_last": [float(v.last_right) for v in verdicts],
            "accuracy_first": [float(v.first_right) for v in verdicts],
            "utility": [v.utility for v in verdicts],
            "rep4": [v.rep4 for v in verdicts],
        }
    else:
        values["rep4"] = [redundancy.rep_n(s.ids, 4) for s in samples]
    return values
