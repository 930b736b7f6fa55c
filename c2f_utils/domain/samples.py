"""What is asked and what is answered: prompts and answers as token ids, without padding.

The one place that says what an answer is: what was sampled, up to a stop string, and then EOS (`finish`). A reward
model is trained on answers that end in EOS; the next turn's header in that place would be scored as part of the answer,
and a policy would learn never to end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from c2f_utils.domain.problems import Problem

Stop = Literal["eos", "limit", "string"]


@dataclass(frozen=True)
class Prompt:
    """A question as token ids and text; `problem` is set on the embedded domain, where answers can be checked.

    `forced` are the last ids of the prompt when they are the beginning of an answer that the model did not choose
    itself.
    """

    ids: tuple[int, ...]
    text: str
    problem: Problem | None = None
    forced: tuple[int, ...] = ()


@dataclass
class Sample:
    """One answer as it is read and scored, its limit, why it stopped, and the tokens that the policy chose for it.

    `ids` (no padding) is the content and then EOS, whichever way the policy ended it; an answer that the limit cut has
    no EOS. Rewards, judges and measures read `ids`, `tokens` and `text`, which say the same. `sampled` is what the
    policy chose, a stop string's tokens included: it is trained on these and on no other. The two differ in answers
    that a stop string ended; a reward of prefixes goes by `ids`.
    """

    prompt: Prompt
    ids: list[int]
    stop: Stop
    limit: int
    logps: Tensor | None = field(default=None, repr=False)  # [len(sampled)] float32, of the policy that sampled it
    text: str = ""
    sampled: list[int] = field(default=None, repr=False)

    def __post_init__(self):
        if self.sampled is None:
            self.sampled = self.ids

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def positions(self) -> int:
        """Tokens of the prompt and of what was sampled together."""
        return len(self.prompt.ids) + len(self.sampled)

    @property
    def answer(self) -> list[int]:
        """The whole answer as a reader sees it: a forced beginning and what was generated."""
        return [*self.prompt.forced, *self.ids]

    @property
    def cut(self) -> bool:
        """Whether the limit, not the policy, ended the answer."""
        return self.stop == "limit"


def make_prompts(problems: Sequence[Problem], prefix: str = "") -> list[Prompt]:
    """Prompts of embedded problems; a `prefix` forces the beginning of the answer and counts as prompt."""
    return [_prompt(problem, prefix.split()) for problem in problems]


def analysed_prompts(problems: Sequence[Problem]) -> list[Prompt]:
    """Prompts that force an analysis of each problem's own kind."""
    return [_prompt(problem, problem.opening.split()) for problem in problems]


def _prompt(problem: Problem, beginning: list[str]) -> Prompt:
    forced = tuple(problem.vocabulary.encode(beginning))
    return Prompt((*problem.prompt_ids, *forced), " ".join([*problem.words, *beginning]), problem, forced)


def content(text: str, stop_strings: Sequence[str]) -> str:
    """A text up to the first of the stop strings in it."""
    return text[: min((place for s in stop_strings if (place := text.find(s)) >= 0), default=len(text))]


def longest_stop(stop_strings: Sequence[str]) -> int:
    """Tokens among which a stop string that the last of them completes is found whole.

    A token holds at least a byte; the one more is for tokenizers that swallow a space where a text begins.
    """
    return max((len(s.encode()) for s in stop_strings), default=0) + 1


def stopped_at(ids: Sequence[int], tokenizer, stop_strings: Sequence[str], before: int = 0) -> int | None:
    """Index of the first token from `before` on that completes a stop string; None without one."""
    tail = longest_stop(stop_strings)

    def held(part: Sequence[int]) -> bool:
        text = tokenizer.decode(part)
        return any(string in text for string in stop_strings)

    if not stop_strings or len(ids) <= before or not held(ids[max(0, before + 1 - tail) :]):
        return None
    return next((i for i in range(before, len(ids)) if held(ids[max(0, i + 1 - tail) : i + 1])), None)


def finish(
    prompt: Prompt,
    sampled: Sequence[int],
    stop: Stop,
    limit: int,
    logps: Tensor,
    tokenizer,
    eos: frozenset[int],
    stop_strings: Sequence[str] = (),
) -> Sample:
    """The answer that a sampler's tokens are: content up to the stop string, then the tokenizer's EOS.

    `eos` are all ids that end an answer. A token that holds the last of the content and the first of the stop string
    ("." and two line breaks, say) is tokenised again without the latter: dropping it would cost the answer its full
    stop, and the reward model was trained on answers that have theirs. All other tokens stay as they were sampled.
    """
    sampled = list(sampled)
    kept = [i for i in sampled if i not in eos]
    if stop == "string":
        kept = _before_stop_string(kept, tokenizer, stop_strings)
        kept = kept[: limit - 1]  # the end tokenised again may take a token more, and EOS is to have room
    text = tokenizer.decode(kept, skip_special_tokens=True)
    ids = sampled if stop == "limit" else [*kept, tokenizer.eos_token_id]
    return Sample(prompt, ids, stop, limit, logps, text, sampled)


def _before_stop_string(sampled: list[int], tokenizer, stop_strings: Sequence[str]) -> list[int]:
    def read(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    wanted = content(read(sampled), stop_strings)
    whole = next(n for n in range(len(sampled), -1, -1) if wanted.startswith(read(sampled[:n])))
    # Tokenizers that put a space before every text cannot encode the end of a word alone: then from a token earlier.
    for first in range(whole, -1, -1):
        rest = wanted[len(read(sampled[:first])) :]
        ids = [*sampled[:first], *(tokenizer.encode(rest, add_special_tokens=False) if rest else ())]
        if read(ids) == wanted:
            break
    return ids
