"""Parts of 07 on a user's own files: how likely does each layer make listed words, and what does every model do with
requests that it should refuse?"""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from c2f_utils import stats, weights
from c2f_utils.domain import forms, user_text
from c2f_utils.domain.forms import Form
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.files import sha256
from c2f_utils.measure import dialogues, layer_lens, refused_requests, sampling
from c2f_utils.measure.judges import Question, Verdicts
from c2f_utils.models import rewards
from c2f_utils.models.loading import refuse_other_tokenizer
from c2f_utils.notebook.progress import Progress
from c2f_utils.runs.run import Run
from c2f_utils.stages import judge_of_run
from c2f_utils.stages.inputs import Inputs, stopped_here
from c2f_utils.stages.pieces import Pieces

READS_TEXT = ("local", "openai")  # judges that can say what an answer does


class Wordlist:
    """Probability of the words of `safety.wordlist` after the test prompts, by layer, for every model as it is
    prompted."""

    key = "wordlist"

    def __init__(self, run: Run, inputs: Inputs):
        source = run.settings.safety.wordlist
        run.here.add_input(f"data:{source}", sha256(source))
        self.inputs, self.settings, self.pieces = inputs, run.settings, Pieces(run.here)
        words = [word for part in user_text.read(source, "safety.wordlist") for word in part.split()]
        self.ids = layer_lens.word_ids(words, inputs.tokenizer)
        self.prompts = inputs.prompts("test")[: run.settings.safety.prompts]
        self.found: dict[str, list[dict]] = {}

    def add(self, name: str, model: nn.Module, form: Form) -> None:
        self.found[name] = self.pieces([self.key, name], lambda: self._measured(model, form))

    def _measured(self, model: nn.Module, form: Form) -> list[dict]:
        tokenizer, asked = self.inputs.asked(self.prompts, form)
        budget = self.settings.coarse.tokens_per_micro_batch
        likely = layer_lens.probability_by_layer(model, asked, self.ids, tokenizer.pad_token_id, budget)
        return [sampling.mean(row, self.settings.seed)._asdict() for row in likely]

    def results(self) -> dict:
        """`tokens` of the list, and of every model the mean probability after each layer with its interval."""
        return {"tokens": len(self.ids), "models": self.found}


class Requests:
    """Refusals and harmful continuations of `safety.requests`, and what a second reward model gives the answers.

    Refusals are counted by words for every judge, and judged where the judge of the settings reads text.
    """

    key = "requests"

    def __init__(self, run: Run, inputs: Inputs):
        self.run, self.inputs, self.settings, self.pieces = run, inputs, run.settings, Pieces(run.here)
        safety = run.settings.safety
        self.requests = read_requests(safety.requests, run.settings.judge.categories)[: safety.prompts]
        run.here.add_input(f"data:{safety.requests}", sha256(safety.requests))
        self.scorer = safety.reward and weights.pinned(safety.reward, None, "safety.reward")
        if self.scorer:
            refuse_other_tokenizer(self.scorer, inputs.tokenizer)
            run.here.add_input("safety.reward", weights.identity(self.scorer))
        models = 4 + 1 + len(run.settings.merge.controls) + 2  # the last two are the other form's
        self.verdicts = len(self.requests) * (models + 2) if self._judged else 0
        if self.verdicts:
            judge_of_run.refuse(run, "requests", self.requests, self.verdicts)
        self.said: dict[str, list[Sample]] = {}

    @property
    def _judged(self) -> bool:
        return self.settings.judge.name in READS_TEXT

    def add(self, name: str, model: nn.Module, form: Form) -> None:
        """Have one model answer all requests, under the first decoding of the evaluation."""
        tokenizer, base_form = self.inputs.tokenizer, self.settings.models.base_form
        texts = [judge_of_run.judged_text(self.inputs, question, []) for question in self.requests]
        asked = [Prompt(tuple(forms.prompt_ids(text, base_form, tokenizer)), text) for text in texts]

        def said() -> list:
            found = self.inputs.answers(model, asked, self.settings.evaluation.decodings[0], form=form)
            return [[sample.ids, sample.stop, sample.limit, sample.text] for sample in found]

        kept = self.pieces([self.key, name], said)
        self.said[name] = [
            Sample(prompt, ids, stop, limit, text=text)
            for prompt, (ids, stop, limit, text) in zip(asked, kept, strict=True)
        ]

    def results(self) -> dict:
        """Of every model the shares by words and by the judge, the mean reward of `safety.reward` and its paired
        difference from instruct's, with intervals over requests; and the judge with its check."""
        here, safety = self.run.here, self.settings.safety
        found = {name: {"words": refused_requests.by_words([s.text for s in said])} for name, said in self.said.items()}
        judge = self._judge(found) if self._judged else None
        if self.scorer:
            with here.timer("requests: reward"):
                self._reward(found)
        return {
            "from": f"{Path(safety.requests).name} ({sha256(safety.requests)[:12]})", "n": len(self.requests),
            "judge": judge, "reward": Path(safety.reward).name if safety.reward else None, "models": found,
        }  # fmt: skip

    def _judge(self, found: dict[str, dict]) -> dict:
        here = self.run.here
        verdicts = Verdicts(here.path(self.key, "verdicts.jsonl"))
        with here.timer("requests: verdicts"), stopped_here(here):
            judge, _ = judge_of_run.make(self.run, self.inputs)
            progress = Progress("judge of requests", "verdict")
            watch = {"progress": progress.step, "stop": here.stop_requested}
            with progress.counting(len(self.requests) * (len(self.said) + 1)):
                for name, said in self.said.items():
                    texts = [sample.text for sample in said]
                    found[name]["judged"] = refused_requests.by_judge(self.requests, texts, judge, verdicts, **watch)
                checked = refused_requests.check(self.requests, judge, verdicts, **watch)
        return {"name": judge.name, "id": judge.id, "check": checked}

    def _reward(self, found: dict[str, dict]) -> None:
        """Rewards are in the second model's own units; nothing was measured to normalise them on."""
        model = rewards.load_reward_model(self.scorer, self.settings, self.inputs.tokenizer.pad_token_id)
        each = {name: model(said).tolist() for name, said in self.said.items()}
        for name, values in each.items():
            compared = stats.paired_bootstrap(values, each["instruct"], seed=self.settings.seed)
            found[name] |= {
                "reward": sampling.mean(values, self.settings.seed)._asdict(),
                "reward_minus_instruct": compared._asdict(),
            }


def read_requests(source: str, categories: Sequence[str] = ()) -> list[Question]:
    """Requests of a FastChat or AlpacaEval file (.json, .jsonl; first turns only), or of a text file with an empty line
    between them; raises C2FError naming file and line."""
    if Path(source).suffix in (".json", ".jsonl"):
        found = dialogues.read_questions(source, categories)
        return [Question(question.id, question.category, question.turns[:1]) for question in found]
    texts = user_text.read(source, "safety.requests")
    return [Question(number, dialogues.UNCATEGORISED, (text,)) for number, text in enumerate(texts, start=1)]
