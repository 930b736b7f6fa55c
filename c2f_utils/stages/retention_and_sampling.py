"""Parts of 07: what has a model kept of what it was made from, and what can it find at all when it may try often?

Retention is a matter of weights: every model reads the same tokens, and the rows of 07 that are the same weights asked
in another way (another form, a forced beginning) are left out. Sampling is for the four main models, on the embedded
domain, where a checker knows what is right.
"""

import random
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from torch import nn

from c2f_utils import stats
from c2f_utils.coarse.heads import Head
from c2f_utils.domain import user_text
from c2f_utils.domain.forms import Form
from c2f_utils.domain.problems import EOS, Problem, check, worked
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.files import sha256
from c2f_utils.measure import retention, sampling
from c2f_utils.measure.retention import Scored
from c2f_utils.models import loading
from c2f_utils.models.generated import generator
from c2f_utils.models.packing import collate, pack
from c2f_utils.report.results import MAIN
from c2f_utils.runs import provenance
from c2f_utils.runs.run import Run
from c2f_utils.stages import data
from c2f_utils.stages.inputs import Inputs
from c2f_utils.stages.pieces import Pieces

UNUSED_SEED = 10_000_000  # added to the run's: base documents that no run was trained on
OWN = "own"  # the answers of instruct itself
COMPARED = (("coarse", "base"), ("fine", "instruct"))


class Retention:
    """Perplexity by kind of document, and forward KL from instruct on its own answers, for every model."""

    key = "retention"

    def __init__(self, run: Run, inputs: Inputs):
        self.inputs, self.settings, self.pieces = inputs, run.settings, Pieces(run.here)
        wanted = run.settings.retention
        self.texts = _documents(run, inputs, wanted.documents) if wanted.documents else {}
        instruct = inputs.instruct()  # first of all: every other model is compared with it on what it said
        if wanted.answers:
            asked = inputs.prompts("test")[: wanted.answers]
            self.texts[OWN] = inputs.sampled(instruct, asked, run.settings.models.instruct_form)
        # Another session on other hardware may sample otherwise: what was scored on other answers is no piece of it.
        self.read = provenance.fingerprint([[*text.prompt.ids, *text.ids] for text in self.texts.get(OWN, ())])
        self.reference = self._score(instruct)
        self.found: dict[str, dict[str, Scored]] = {}

    def add(self, name: str, model: nn.Module, form: Form) -> None:
        if name not in (f"instruct_{form}", f"fine_{form}"):
            kept = self.pieces([self.key, name, self.read], lambda: {k: list(v) for k, v in self._score(model).items()})
            self.found[name] = {kind: Scored(*map(np.array, columns)) for kind, columns in kept.items()}

    def results(self) -> dict:
        """`label`, `documents` and `tokens` of each kind; of each model `perplexity` and its `ratio` to instruct's by
        kind, and `forward_kl`, each with its interval."""
        models = {name: self._row(found) for name, found in self.found.items()}
        kinds = {
            kind: {"label": label, "documents": len(found.tokens), "tokens": int(found.tokens.sum())}
            for kind, label in self._labels().items()
            if (found := self.reference.get(kind))
        }
        return {"kinds": kinds, "models": models}

    def _labels(self) -> dict[str, str]:
        chosen = "right worked answers" if self.settings.embedded else "held-out chosen answers"
        return {"corpus": "the base corpus", "chosen": chosen, "text": "your text", OWN: "instruct's own answers"}

    def _row(self, found: dict[str, Scored]) -> dict:
        seed, kinds = self.settings.seed, [kind for kind in found if kind != OWN]
        row = {
            "perplexity": {kind: retention.perplexity(found[kind], seed)._asdict() for kind in kinds},
            "ratio": {
                kind: retention.perplexity_ratio(found[kind], self.reference[kind], seed)._asdict() for kind in kinds
            },
        }
        if OWN in found:
            row["forward_kl"] = retention.forward_kl(found[OWN], self.reference[OWN], seed)._asdict()
        return row

    def _score(self, model: nn.Module) -> dict[str, Scored]:
        head = Head(model)
        return {kind: scored(self.inputs, model, head, texts) for kind, texts in self.texts.items()}


@torch.no_grad()
def scored(inputs: Inputs, model: nn.Module, head: Head, texts: list[Sample]) -> Scored:
    """Log-probabilities under a model of the tokens that were sampled in these texts."""
    pad, device = inputs.tokenizer.pad_token_id, loading.device(inputs.settings.models)
    logps: list = [None] * len(texts)
    for group in pack([text.positions for text in texts], inputs.settings.coarse.tokens_per_micro_batch):
        batch = collate([texts[i] for i in group], pad, device, sampled=True)
        for i, values in zip(group, batch.split(head.score(model, batch).cpu()), strict=True):
            logps[i] = values.tolist()
    return retention.scored(logps)


def _documents(run: Run, inputs: Inputs, count: int) -> dict[str, list[Sample]]:
    """`count` documents of every kind as tokens to score after a context: fresh ones of the base corpus, held-out
    chosen answers, and the user's text (long documents are cut at the evaluation's length)."""
    settings, found = run.settings, {}
    if settings.embedded:
        corpus = generator(settings.data).documents(10**9, settings.seed + UNUSED_SEED)
        found["corpus"] = [as_text(ids, 1) for ids in islice(corpus, count)]
        rng = random.Random(f"chosen-{settings.seed}")
        problems = [prompt.problem for prompt in inputs.prompts("test")[:count]]
        found["chosen"] = [as_text([*p.prompt_ids, *_worked(p, rng)], len(p.prompt_ids)) for p in problems]
        return found
    pairs = data.hub_pairs(settings, inputs.tokenizer)[1][:count]
    found["chosen"] = [as_text(pair.tokens[0], pair.prompt_tokens) for pair in pairs]
    if source := settings.retention.text:
        run.here.add_input(f"data:{source}", sha256(source))
        longest = settings.data.max_prompt_tokens + settings.evaluation.max_tokens
        read = (inputs.tokenizer(text)["input_ids"][:longest] for text in user_text.read(source, "retention.text"))
        found["text"] = [as_text(ids, 1) for ids in islice((ids for ids in read if len(ids) > 1), count)]
    return found


def as_text(ids: Sequence[int], context: int) -> Sample:
    """Tokens of a document to be scored after its first `context` ones."""
    return Sample(Prompt(tuple(ids[:context]), ""), list(ids[context:]), "limit", len(ids))


def _worked(problem: Problem, rng: random.Random) -> list[int]:
    """A right answer, worked out step by step, that ends."""
    return [*problem.vocabulary.encode(worked(problem, rng)), EOS]


class Sampling:
    """pass@k and majority votes of the four main models: does training expand what can be found, or sharpen it?"""

    key = "sampling"

    def __init__(self, run: Run, inputs: Inputs):
        self.inputs, self.settings, self.pieces = inputs, run.settings, Pieces(run.here)
        self.prompts = inputs.prompts("test")[: run.settings.sampling.problems]
        self.samples = run.settings.sampling.samples
        self.choices = sorted({prompt.problem.largest + 1 for prompt in self.prompts})  # results that a guess may name
        self.found: dict[str, dict[str, list]] = {}

    def add(self, name: str, model: nn.Module, form: Form) -> None:
        if name in MAIN:
            self.found[name] = self.pieces([self.key, name], lambda: self._counted(model, form))

    def _counted(self, model: nn.Module, form: Form) -> dict[str, list]:
        answers = self.inputs.answers(model, [p for p in self.prompts for _ in range(self.samples)], form=form)
        verdicts = [check(s.prompt.problem, s.answer) for s in answers]
        each = [verdicts[start : start + self.samples] for start in range(0, len(verdicts), self.samples)]
        return {
            "answer": [sum(v.last_right for v in mine) for mine in each],
            "worked": [sum(v.last_right and v.correct_steps == v.steps for v in mine) for mine in each],
            "votes": [[v.last_answer for v in mine] for mine in each],
            "tokens": [sum(v.tokens for v in mine) / len(mine) for mine in each],
        }

    def results(self) -> dict:
        """Rows by k of every model: pass@k of right answers (`answer`) and of those with every step right (`worked`,
        which no guess is) and the `majority` of k votes, each with its interval, beside what blind `guessing` reaches;
        and paired differences over problems."""
        models = {}
        for name, found in self.found.items():
            tokens = sum(found["tokens"]) / len(found["tokens"])
            rows = [self._row(found, k) for k in sampling.powers_to(self.samples)]
            models[name] = {"mean_tokens": tokens, "rows": rows}
        counts = {"problems": len(self.prompts), "samples": self.samples, "choices": self.choices[-1]}
        return counts | {"models": models, "paired": self._paired()}

    def _row(self, found: dict[str, list], k: int) -> dict:
        golds = [prompt.problem.answer for prompt in self.prompts]
        votes = [sampling.majority_at(v, gold, k) for v, gold in zip(found["votes"], golds, strict=True)]
        values = {what: self._passed(found[what], k) for what in ("answer", "worked")} | {"majority": votes}
        guessing = sum(sampling.guessing(count, k) for count in self.choices) / len(self.choices)  # kinds are even
        measured = {what: sampling.mean(each, self.settings.seed)._asdict() for what, each in values.items()}
        return {"k": k, "guessing": guessing} | measured

    def _passed(self, right: list[int], k: int) -> list[float]:
        return [sampling.pass_at(count, self.samples, k) for count in right]

    def _paired(self) -> list[dict]:
        rows = []
        for a, b in COMPARED:
            for what in ("answer", "worked"):
                for k in sampling.powers_to(self.samples):
                    first, second = (self._passed(self.found[name][what], k) for name in (a, b))
                    found = stats.paired_bootstrap(first, second, seed=self.settings.seed)
                    rows.append({"a": a, "b": b, "measure": what, "k": k, **found._asdict()})
        return rows
