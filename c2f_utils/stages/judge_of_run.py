"""The judge that the settings name, ready to be asked, and what it will cost."""

import hashlib
import json
from collections.abc import Sequence

from c2f_utils import weights
from c2f_utils.domain import forms
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import C2FError
from c2f_utils.measure import dialogues, judge_prompts
from c2f_utils.measure.judge_api import Budget, Ledger, OpenAICompatibleJudge, Server, client, cost
from c2f_utils.measure.judge_models import LocalModelJudge, RewardModelJudge
from c2f_utils.measure.judges import HeuristicJudge, Judge, Question
from c2f_utils.models import loading, rewards
from c2f_utils.notebook.progress import Progress
from c2f_utils.runs.run import Run
from c2f_utils.settings.preflight import check_folder
from c2f_utils.stages import data
from c2f_utils.stages.inputs import CHECKPOINTS, Inputs

BYTES_PER_TOKEN = 3  # of questions and rubrics, for an estimate


def templates(run: Run) -> dict[str, judge_prompts.Template]:
    """The prompts of a judge that reads text; C2FError for a damaged file."""
    path = run.settings.judge.templates
    return judge_prompts.read(path) if path else judge_prompts.defaults()


def judged_text(inputs: Inputs, question: Question, answers: Sequence[str]) -> str:
    """A dialogue that waits for its next answer: a transcript, or the words of the embedded domain."""
    turns = question.turns[: len(answers) + 1]
    if not inputs.settings.embedded:
        return dialogues.transcript(turns, answers)
    return " ".join(text for pair in zip(turns, [*answers, ""], strict=True) for text in pair if text)


def make(run: Run, inputs: Inputs) -> tuple[Judge, dict | None]:
    """The judge, and what its reward model was trained on (None for others)."""
    judge = run.settings.judge
    if judge.name == "heuristic":
        return HeuristicJudge(), None
    if judge.name == "openai":
        ledger = Ledger(run.here.path("dialogue", "ledger.jsonl"), _budget(run))
        return OpenAICompatibleJudge(server(run), templates(run), ledger), None
    if judge.name == "local":
        model, tokenizer = loading.load_causal(judge.model, run.settings.models), loading.load_tokenizer(judge.model)
        return LocalModelJudge(model, tokenizer, templates(run), weights.identity(judge.model) or judge.model), None
    return held_out(run, inputs)


def server(run: Run) -> Server:
    judge = run.settings.judge
    return Server(
        judge.base_url, judge.model, judge.reply_tokens, judge.temperature, judge.length_field, judge.timeout,
        judge.attempts, judge.concurrency, judge.price_input, judge.price_output,
    )  # fmt: skip


def held_out(run: Run, inputs: Inputs) -> tuple[RewardModelJudge, dict]:
    """A reward model trained as that of 02 is, on other pairs, from another initial head; what is known of it.

    It is not kept: what it said is. `identity` are its pairs and settings, which decide it.
    """
    settings, here, tokenizer = run.settings, run.here, inputs.tokenizer
    progress = Progress("answers for a held-out reward model", "answer")
    pairs, where = data.fresh_pairs(settings, inputs.base() if settings.embedded else None, tokenizer, progress)
    other = settings.model_copy(update={"seed": settings.seed + data.JUDGE_SEED})
    trained = rewards.train(
        inputs.base_source, pairs, tokenizer, other, order=other.seed,
        folder=here.path(CHECKPOINTS, "judge"), stop=here.stop_requested, progress=Progress("held-out reward model"),
    )  # fmt: skip
    model = rewards.RewardModel(trained, tokenizer.pad_token_id)
    what = [pairs, settings.reward.model_dump(mode="json"), other.seed, weights.identity(inputs.base_source)]
    identity = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]

    def sample(question: Question, answers: Sequence[str]) -> Sample:
        text, form = judged_text(inputs, question, answers[:-1]), settings.models.base_form
        ids = forms.prompt_ids(text, form, tokenizer)
        said = answers[-1] if settings.embedded else f" {answers[-1].strip()}"
        answer = [*forms.answer_ids(said, text, form, tokenizer), tokenizer.eos_token_id]
        return Sample(Prompt(tuple(ids), text), answer, "eos", len(answer))

    return RewardModelJudge(model, sample, identity), {"pairs": len(pairs), "from": where}


def refuse(run: Run, what: str, questions: Sequence[Question], verdicts: int, before: int = 0) -> None:
    """Raise C2FError for a judge that cannot work or whose budget is too small for so many verdicts after those asked
    for `before`; print what it will do."""
    judge = run.settings.judge
    words = f"{what}: {len(questions)} questions, {sum(len(q.turns) for q in questions)} turns; "
    words += f"judge {judge.name}: {verdicts} verdicts at most"
    if judge.name == "local":
        check_folder(judge.model, "judge.model")
    if judge.name in ("local", "openai"):
        rubric = max(len((t.system + t.user).encode()) for t in templates(run).values())
    if judge.name == "openai":
        client()
        if verdicts + before > judge.calls:
            raise C2FError(
                f"judge.calls = {judge.calls}, and {verdicts + before} verdicts are asked for; raise it, or lower "
                "judge.questions or safety.prompts, or name fewer models in judge.against"
            )
        asked = max(len("".join(q.turns + q.reference).encode()) for q in questions)
        answers = 4 * (judge.max_tokens or run.settings.evaluation.max_tokens)  # of two models to two turns
        read = verdicts * (answers + (asked + rubric) // BYTES_PER_TOKEN)
        words = f"{words}: {cost(server(run), verdicts, read, _budget(run))}"
    print(words)


def _budget(run: Run) -> Budget:
    return Budget(run.settings.judge.calls, run.settings.judge.tokens)
