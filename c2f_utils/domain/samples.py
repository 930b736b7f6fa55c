"""What is asked and what is answered: prompts and answers as token ids, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from c2f_utils.domain.stories import Problem

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
    """One answer: token ids without padding (EOS included when produced), its limit, and why it stopped."""

    prompt: Prompt
    ids: list[int]
    stop: Stop
    limit: int
    logps: Tensor | None = field(default=None, repr=False)  # [len(ids)] float32, of the policy that sampled it
    text: str = ""

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def positions(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.prompt.ids) + len(self.ids)

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
    from c2f_utils.domain.stories import encode

    forced = encode(prefix.split())
    return [Prompt((*p.prompt_ids, *forced), " ".join([*p.words, *prefix.split()]), p, tuple(forced)) for p in problems]
