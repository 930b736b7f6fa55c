"""Dialogues of 07: every model answers the same questions, of one turn or two, and a judge compares fine with each.

Inputs: a question file, or test problems (embedded) or prompts of the test split. Outputs, in FastChat's formats, in
the folder `dialogue/` of 07: `question.jsonl`, `model_answer/`, `model_judgment/`; and `verdict_rows.jsonl`, of which
`measure/judges` says what a row holds. A judge that fails a null check (`judge_summary.null_checks`) is named as unfit.
"""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from torch import nn

from c2f_utils.domain import forms
from c2f_utils.domain.forms import Form
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import C2FError
from c2f_utils.files import sha256, write_text
from c2f_utils.measure import bias_panel, dialogues, judge_summary
from c2f_utils.measure.answers import TEMPERATURES
from c2f_utils.measure.judges import Case, Dialogue, Judge, Question, Verdicts, pairs, save_rows, verdict_rows
from c2f_utils.measure.second_look import ASKED_AGAIN, second_look
from c2f_utils.measure.style_control import style_controlled
from c2f_utils.measure.win_rates import win_rates
from c2f_utils.notebook.progress import Progress
from c2f_utils.runs.run import Run
from c2f_utils.settings.config import Settings
from c2f_utils.stages import judge_of_run
from c2f_utils.stages.inputs import Inputs, stopped_here
from c2f_utils.stages.pieces import Pieces

FINE = "fine"
NULL_VERDICTS = 5  # per question: the answer against itself, repeated and constant in both orders
_DECODING = {temperature: name for name, temperature in TEMPERATURES.items()}


def questions_of(settings: Settings, inputs: Inputs) -> tuple[list[Question], str]:
    """The first `judge.questions` questions and where they are from; C2FError for a damaged file."""
    judge = settings.judge
    if judge.prompts:
        found = dialogues.read_questions(judge.prompts, judge.categories)
        found = dialogues.with_references(found, judge.references) if judge.references else found
        return found[: judge.questions], f"{Path(judge.prompts).name} ({sha256(judge.prompts)[:12]})"
    if settings.embedded:
        texts = [prompt.text for prompt in inputs.prompts("test")]
        single = -(-min(judge.questions, 2 * len(texts) // 3) // 2)  # the others have two turns
        turns = [(text,) for text in texts[:single]]
        turns += list(zip(texts[single::2], texts[single + 1 :: 2], strict=False))[: judge.questions // 2]
        return _numbered(turns[: judge.questions]), "test problems"
    said = ([m["content"] for m in forms.messages(p.text) if m["role"] == "user"] for p in inputs.prompts("test"))
    unlike = dict.fromkeys(tuple(turns[:2]) for turns in said if all(turns[:2]))
    return _numbered(islice(unlike, judge.questions)), "what users say in the test prompts, two turns at most"


def _numbered(turns) -> list[Question]:
    names = ("one turn", "two turns")
    return [Question(number, names[len(said) - 1], tuple(said)) for number, said in enumerate(turns, start=1)]


def compared_with(settings: Settings) -> list[str]:
    """The models with which 07 can compare fine; the other form only where there is a chat template."""
    recipe = "one_coefficient" if settings.merge.select == "best_recipe" else "best_recipe"
    other = "raw" if settings.models.instruct_form == "template" else "template"
    forms_of_two = [] if settings.embedded else [f"instruct_{other}", f"{FINE}_{other}"]
    return ["base", "instruct", "coarse", recipe, *settings.merge.controls, *forms_of_two]


class Dialogues:
    """The part of 07 that asks and judges; C2FError before work starts for files or a judge that cannot be used."""

    key = "dialogue"

    def __init__(self, run: Run, inputs: Inputs, before: int = 0):
        """`before` counts the verdicts that another part asks of the same judge."""
        self.run, self.inputs, self.settings, self.pieces = run, inputs, run.settings, Pieces(run.here)
        self.questions, self.source = questions_of(run.settings, inputs)
        if not self.questions:
            raise C2FError("no test prompt is left to ask in dialogues; set judge.prompts or judge.name to 'none'")
        self.said: dict[str, dict[str | int, Dialogue]] = {}
        self.progress = Progress("judge", "verdict")
        judge, others = run.settings.judge, compared_with(run.settings)
        if unknown := [name for name in judge.against if name not in others]:
            raise C2FError(f"judge.against names {', '.join(unknown)}; 07 compares fine with {', '.join(others)}")
        for path in filter(None, (judge.prompts, judge.references, judge.templates)):
            run.here.add_input(f"data:{path}", sha256(path))
        turns, models = sum(len(question.turns) for question in self.questions), len(judge.against or others)
        compared = (2 + ASKED_AGAIN * judge.portia) * turns * models if "pairwise" in judge.grading else 0
        graded = turns * (models + 1) if "single" in judge.grading else 0
        asked = compared + graded + NULL_VERDICTS * len(self.questions)
        judge_of_run.refuse(run, "dialogues", self.questions, asked, before)
        rows = [{"question_id": q.id, "category": q.category, "turns": list(q.turns)} for q in self.questions]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(run.here.path(self.key, "question.jsonl"), text)

    def add(self, name: str, model: nn.Module, form: Form) -> None:
        """Have one model answer, if it is to be judged."""
        against = self.settings.judge.against
        if against and name not in (FINE, *against):
            return
        limit = self.settings.judge.max_tokens or self.settings.evaluation.max_tokens

        def prompt(question: Question, said: Sequence[Sample]) -> Prompt:
            text = judge_of_run.judged_text(self.inputs, question, [sample.text for sample in said])
            return Prompt(tuple(forms.prompt_ids(text, self.settings.models.base_form, self.inputs.tokenizer)), text)

        def answer(prompts: list[Prompt], temperature: float) -> list[Sample]:
            return self.inputs.answers(model, prompts, _DECODING[temperature], limit, form)

        def said() -> list:
            made = dialogues.generate(self.questions, prompt, answer)
            return [[place, dialogue.answers, dialogue.tokens] for place, dialogue in made.items()]

        kept = self.pieces([self.key, name], said)
        self.said[name] = {place: Dialogue(tuple(answers), tuple(tokens)) for place, answers, tokens in kept}
        dialogues.write_answers(self.run.here.path(self.key, "model_answer", f"{name}.jsonl"), name, self.said[name])

    def results(self) -> dict:
        """Win rates of fine, and of each model against it at equal length; what the judge pays for besides quality;
        grades, null checks and lengths."""
        here, settings = self.run.here, self.settings
        with here.timer("dialogue: judge"), stopped_here(here):
            judge, trained = judge_of_run.make(self.run, self.inputs)
        verdicts = Verdicts(here.path(self.key, "verdicts.jsonl"))
        expected = len(verdicts.missing(self._cases(), judge))
        with here.timer("dialogue: verdicts"), stopped_here(here), self.progress.counting(expected):
            checks = judge_summary.null_checks(self._null_pairs(), judge, verdicts, **self._watch())
            against, rows = self._compared(judge, verdicts) if "pairwise" in settings.judge.grading else ({}, [])
            grades = self._graded(judge, verdicts) if "single" in settings.judge.grading else {}
        return {
            "judge": {
                "name": judge.name, "id": judge.id, "checks": checks, "trained": trained,
                "fit": judge.name != "heuristic" and judge_summary.fit_for_headlines(checks),
            },
            "questions": {
                "from": self.source, "n": len(self.questions), "turns": sum(len(q.turns) for q in self.questions),
                "faulty_references": sum(q.reference_faulty for q in self.questions),
            },
            "against": against, "grades": grades,
            "win_rates": win_rates(rows, FINE, seed=settings.seed) if rows else [],
            "style": style_controlled(rows, FINE, seed=settings.seed) if rows else [],
            "panel": bias_panel.panel(rows, seed=settings.seed) if rows else {},
            "answers": {name: _lengths(said) for name, said in self.said.items()},
        }  # fmt: skip

    def _watch(self) -> dict:
        return {"progress": self.progress.step, "stop": self.run.here.stop_requested}

    def _cases(self) -> list[Case]:
        """Everything that the judge will be shown, but for second looks."""
        grading, asked = self.settings.judge.grading, list(self._null_pairs().values())
        others = [other for other in self.said if other != FINE] if "pairwise" in grading else []
        asked += [pairs(self.questions, FINE, other, self.said) for other in others]
        single = [case for said in self.said.values() for case in self._alone(said)] if "single" in grading else []
        return [case for group in asked for pair in group for case in pair.cases()] + single

    def _alone(self, said: dict[str | int, Dialogue]) -> list[Case]:
        """One model's answer to every turn of every question, to be graded."""
        turns = ((question, turn) for question in self.questions for turn in range(1, len(question.turns) + 1))
        return [Case(question, turn, (said[question.id].answers[:turn],)) for question, turn in turns]

    def _null_pairs(self) -> dict:
        settings, count = self.settings, lambda text: len(self.inputs.tokenizer(text)["input_ids"])
        constant = "maybe it is more ." if settings.embedded else "Thank you for your question."
        return judge_summary.null_pairs(self.questions, self.said[FINE], constant, count)

    def _compared(self, judge: Judge, verdicts: Verdicts) -> tuple[dict[str, dict], list[dict]]:
        rows, found = [], {}
        faulty = {question.id for question in self.questions if question.reference_faulty}
        for other in self.said:
            if other == FINE:
                continue
            asked = pairs(self.questions, FINE, other, self.said)
            mine = verdict_rows(asked, judge, verdicts, **self._watch())
            found[other] = judge_summary.summary(mine) | {
                "by_category": judge_summary.by(mine, "category"), "by_turn": judge_summary.by(mine, "turn"),
                "without_faulty_references": judge_summary.summary([r for r in mine if r["question"] not in faulty])
                if faulty else None,
            }  # fmt: skip
            if self.settings.judge.portia:
                _, found[other]["portia"] = second_look(asked, mine, judge, verdicts, **self._watch())
            rows += mine
            place = self.run.here.path(self.key, "model_judgment", f"{judge.name}_pair_{other}.jsonl")
            said = [verdicts.find(case, judge) for pair in asked for case in pair.cases()]
            dialogues.write_pair_judgements(place, asked, said, (judge.id, "pair"))
        save_rows(self.run.here.path(self.key, "verdict_rows.jsonl"), rows)
        return found, rows

    def _graded(self, judge: Judge, verdicts: Verdicts) -> dict[str, dict]:
        found = {}
        for name, said in self.said.items():
            cases = self._alone(said)
            asked = [(case.question, case.turn) for case in cases]
            opinions = verdicts.opinions(cases, judge, **self._watch())
            found[name] = judge_summary.grades(asked, opinions, self.settings.seed)
            place = self.run.here.path(self.key, "model_judgment", f"{judge.name}_single_{name}.jsonl")
            dialogues.write_single_judgements(place, name, asked, opinions, (judge.id, "single"))
        return found


def _lengths(said: dict[str | int, Dialogue]) -> dict:
    tokens = [count for dialogue in said.values() for count in dialogue.tokens]
    empty = sum(not answer.strip() for dialogue in said.values() for answer in dialogue.answers)
    return {"mean_tokens": sum(tokens) / len(tokens), "answers": len(tokens), "empty": empty}
