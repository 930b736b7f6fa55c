"""Judges that are models on this machine: a reward model, and a language model that reads both answers.

Neither samples anything, so that their verdicts are the same every time and none is unreadable; a case that is longer
than the model's positions gets no verdict, and says so.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from c2f_utils.domain.samples import Sample
from c2f_utils.errors import C2FError
from c2f_utils.measure import judge_prompts
from c2f_utils.measure.judges import Case, Opinion, Question
from c2f_utils.models.rewards import RewardModel
from c2f_utils.positions import positions_of
from c2f_utils.rollout.anatomy import unwrapped

BLOCK = 32  # cases of which nothing is kept until all are judged
GRADES = tuple(range(1, 11))


class RewardModelJudge:
    """Prefers the answer with the higher reward: p = sigmoid(r_first - r_second), as in Bradley and Terry 1952.

    The reward model is to be one that no policy was trained against, and its rewards raw (mean 0, deviation 1), for
    which that sigmoid was fitted. `sample` makes a dialogue's last answer into tokens. Answers are scored one by one:
    such a judge is consistent in both orders by construction. A grade is the reward itself.
    """

    name = "reward"

    def __init__(self, model: RewardModel, sample: Callable[[Question, Sequence[str]], Sample], identity: str) -> None:
        self.model, self.sample, self.id = model, sample, f"{self.name}:{identity}"
        self.positions = positions_of(model.model.config)

    def opinions(self, cases: Sequence[Case]) -> Iterator[tuple[Case, Opinion]]:
        for start in range(0, len(cases), BLOCK):
            block = cases[start : start + BLOCK]
            asked = {(case.question, answers[: case.turn]): None for case in block for answers in case.shown}
            samples = {key: self.sample(*key) for key in asked}
            fitting = {key: s for key, s in samples.items() if s.positions <= self.positions}
            rewards = dict(zip(fitting, self.model(list(fitting.values())).tolist(), strict=True)) if fitting else {}
            for case in block:
                keys = [(case.question, answers[: case.turn]) for answers in case.shown]
                if long := [samples[key].positions for key in keys if key not in rewards]:
                    yield case, _too_long(max(long), self.positions)
                    continue
                first, *second = (torch.tensor(rewards[key], dtype=torch.float64) for key in keys)
                yield case, Opinion(float((first - second[0]).sigmoid() if second else first))


class LocalModelJudge:
    """A language model that reads the judge's prompt: the probabilities that it gives to the verdicts' tokens.

    p = P(A) + P(C)/2 among [[A]], [[B]] and [[C]]; a grade is the mean of 1 to 10 under their probabilities. Raises
    C2FError for a tokenizer that cannot tell the verdicts apart.
    """

    name = "local"

    def __init__(self, model: nn.Module, tokenizer, templates: dict[str, judge_prompts.Template], identity: str):
        self.model, self.tokenizer, self.templates = model, tokenizer, templates
        self.id = f"{self.name}:{identity}:{judge_prompts.digest(templates)}"
        self.positions = positions_of(unwrapped(model).config)
        if len({tuple(self._ids(f"[[{label}]]")) for label in "ABC"}) < 3:
            raise C2FError(
                f"the tokenizer of {tokenizer.name_or_path!r} cannot tell [[A]], [[B]] and [[C]] apart; name as "
                "judge.model a language model that knows letters"
            )

    def opinions(self, cases: Sequence[Case]) -> Iterator[tuple[Case, Opinion]]:
        for case in cases:
            labels = GRADES if case.graded else "ABC"
            before = self._before(case)
            texts = [self._ids(f"{before}{label}]]") for label in labels]
            if (longest := max(map(len, texts))) > self.positions:
                yield case, _too_long(longest, self.positions)
                continue
            shares = self._shares(texts).tolist()
            if case.pairwise:
                yield case, Opinion(shares[0] + shares[2] / 2)
            elif case.graded:
                yield case, Opinion(sum(grade * share for grade, share in zip(GRADES, shares, strict=True)))
            else:
                yield case, Opinion(judge_prompts.MEANINGS[labels[shares.index(max(shares))]])

    def _before(self, case: Case) -> str:
        messages = judge_prompts.messages(case, self.templates)
        said = f"{'Grade' if case.graded else 'Verdict'}: [["
        if not self.tokenizer.chat_template:
            return "\n\n".join([*(message["content"] for message in messages), said])
        try:
            text = self._templated(messages)
        except Exception:  # some templates know no system message and raise an error of their own
            text = self._templated([{"role": "user", "content": "\n\n".join(m["content"] for m in messages)}])
        return text + said

    def _templated(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _ids(self, text: str) -> list[int]:
        special = not self.tokenizer.chat_template  # a template puts its own
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    @torch.no_grad()
    def _shares(self, texts: list[list[int]]) -> torch.Tensor:
        """Probabilities [texts] of texts that begin alike, among each other, float64."""
        longest = max(map(len, texts))
        alike = next(i for i in range(longest) if len({tuple(ids[: i + 1]) for ids in texts}) > 1)
        device = next(self.model.parameters()).device
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in texts], device=device)
        # [texts, longest - alike + 1, V]; the padding stands behind and is read by nothing that counts
        logits = self.model(input_ids=padded, logits_to_keep=longest - alike + 1, use_cache=False).logits
        logps = logits[:, :-1].double().log_softmax(-1).gather(-1, padded[:, alike:, None])[..., 0]
        lengths = torch.tensor([len(ids) - alike for ids in texts], device=device)
        counted = torch.arange(longest - alike, device=device) < lengths[:, None]
        return (logps * counted).sum(-1).softmax(-1).cpu()


def _too_long(tokens: int, positions: int) -> Opinion:
    return Opinion(None, f"{tokens} tokens; the judge has {positions} positions")
