"""The field's rivals of the merge, as controls of notebook 06: what else makes base, reward and instruction model
short and right.

Budgets are those of the Coarse Actor's training in 03: its iterations, or the tokens that it generated. What a rival
generates, trains on and takes is its own; that it needs the Coarse Actor or the instruction model first comes on top
(`report/tables_rivals.py` adds it up).
"""

from functools import cache, partial

from torch import nn

from c2f_utils import merge
from c2f_utils.coarse.distil import Distillation
from c2f_utils.coarse.parallel import ParallelUpdates
from c2f_utils.coarse.trainer import CoarseTrainer
from c2f_utils.domain import stated
from c2f_utils.domain.samples import Prompt, analysed_prompts
from c2f_utils.errors import Stopped
from c2f_utils.models import instruct, loading
from c2f_utils.notebook.interrupt import stopping
from c2f_utils.notebook.progress import Progress
from c2f_utils.runs.run import Run
from c2f_utils.settings.config import Coarse
from c2f_utils.settings.laws import Law, make_law
from c2f_utils.stages import coarse_rlhf
from c2f_utils.stages.bench import Bench, state_of

PACE = 2.0  # a mean of two steps is half of each: twice the learning rates of 03 and 05 keep either side's pace
AS_MANY = "equal generated tokens: sampled until as many"
ANSWERS = 8  # of the Coarse Actor to each prompt, of which the shortest right one is learnt from


def ppo(run: Run, bench: Bench) -> tuple[nn.Module, dict]:
    """RLHF from the instruction model, as many iterations as the Coarse Actor's."""
    process = _trainer(run, bench, "ppo_instruct", start=True)
    _train(run, process, "ppo_instruct", "RLHF from instruct")
    note = "the same RLHF started from the instruction model, which is also its reference"
    return process.policy.actor, {"rollout_tokens": process.rollout_tokens, "note": note}


def ppo_tokens(run: Run, bench: Bench) -> tuple[nn.Module, dict]:
    """The same until it has generated as many tokens as the Coarse Actor's training."""
    goal, name = _coarse(run)["rollout_tokens"], "ppo_instruct_tokens"
    config = run.settings.coarse
    most = -(-goal // config.prompts)  # an answer has a token at least
    process = _trainer(run, bench, name, start=True, config=config.model_copy(update={"iterations": most}))
    _train(run, process, name, "RLHF from instruct at equal tokens", goal)
    note = f"the same RLHF from the instruction model; equal generated tokens: on until {goal:,} as in 03"
    return process.policy.actor, _cost(process, note)


def parallel_average(run: Run, bench: Bench) -> tuple[nn.Module, dict]:
    """RL and SFT from the base, averaged step by step (`coarse/parallel.py`)."""
    settings, name = run.settings, "parallel_average"
    coarse, sft = settings.coarse, settings.instruct
    updates = partial(
        ParallelUpdates, examples=instruct.examples(settings), learning_rate=PACE * sft.learning_rate,
        pad_id=bench.inputs.tokenizer.pad_token_id, seed=settings.seed,
    )  # fmt: skip
    config = coarse.model_copy(update={"actor_learning_rate": PACE * coarse.actor_learning_rate})
    process = _trainer(run, bench, name, config=config, make=partial(CoarseTrainer, updates=updates))
    _train(run, process, name, "RL and SFT averaged")
    note = (
        "from the base, every optimiser step is the mean of one of RL and one of SFT, each with its own Adam and twice "
        "its usual learning rate; equal iterations, and the instruction model's examples once over; our reading of "
        "arXiv 2606.04272"
    )
    return process.policy.actor, _cost(process, note, process.updates.sft_tokens)


def distilled(run: Run, bench: Bench) -> tuple[nn.Module, dict]:
    """The Coarse Actor distilled into the instruction model on its own samples (`coarse/distil.py`)."""
    process = _student(run, bench)
    note = (
        "the instruction model samples; reverse KL to the Coarse Actor up to the first stated answer, to the "
        "instruction model as it was from there on; equal iterations and answers as in 03"
    )
    return process.policy.actor, _cost(process, note)


def distilled_merge(run: Run, bench: Bench) -> tuple[nn.Module, dict]:
    """The residue merged into the distilled model: distilled + c (coarse - base)."""
    note = "distilled + c (coarse - base), c chosen on the same grid by the same score; distilled at equal iterations"
    process = _student(run, bench)
    actor, spent = process.policy.actor, _cost(process, note)
    student = state_of(actor.merge_and_unload() if hasattr(actor, "merge_and_unload") else actor)
    del process, actor  # teacher, reference and critic must not stand beside the merges
    merger = merge.Merger(bench.states["base"], student, bench.states["coarse"], loading.device(run.settings.models))

    def merged(c: float) -> nn.Module:
        return bench.loaded(merger.tensors(bench.recipe({"name": "residue"}, c)))

    with run.here.timer("distilled_merge"):
        grid = run.settings.merge.coefficients
        sweep = [
            {"coefficient": c, **bench.kept(["distilled_merge", c], lambda c=c: bench.row(bench.answers(merged(c))))}
            for c in grid
        ]
    chosen = max(sweep, key=lambda row: row["score"])["coefficient"]
    return merged(chosen), {"coefficient": chosen, "sweep": sweep} | spent


def shortest_correct(run: Run, bench: Bench) -> tuple[nn.Module, dict]:
    """SFT of the instruction model on the shortest right one of each prompt's coarse answers."""
    found = _answers(run, bench, "coarse")
    what = f"the shortest right one of {ANSWERS} coarse answers {_asked(found)}; {AS_MANY} as in 03"
    return _fine_tuned(run, bench, "shortest_correct", _shortest(found), what, found)


def base_correct(run: Run, bench: Bench) -> tuple[nn.Module, dict]:
    """The same with the base for a teacher, whose analysis is begun for it: was RL needed to teach? As many tokens as
    the Coarse Actor's training and its answers."""
    found = _answers(run, bench, "base")
    what = f"the shortest right one of {ANSWERS} answers of the base with a forced beginning {_asked(found)}"
    what += f"; {AS_MANY} as in 03 and for the coarse answers"
    return _fine_tuned(run, bench, "base_correct", _shortest(found), what, found)


def filtered_sft(run: Run, bench: Bench) -> tuple[nn.Module, dict]:
    """SFT of the instruction model on all coarse answers that are right, as they are up to the last stated answer."""
    found = _answers(run, bench, "coarse")
    chosen = [
        (list(prompt.ids), answer)
        for prompt, answers in found
        for answer in stated.right_to_the_last(prompt.problem, answers)
    ]
    what = f"those of {ANSWERS * len(found)} coarse answers that are right, as they are up to their last stated answer"
    what += f"; {AS_MANY} as in 03"
    return _fine_tuned(run, bench, "filtered_sft", chosen, what, found)


MAKERS = {
    "ppo_instruct": ppo,
    "ppo_instruct_tokens": ppo_tokens,
    "parallel_average": parallel_average,
    "distilled": distilled,
    "distilled_merge": distilled_merge,
    "shortest_correct": shortest_correct,
    "filtered_sft": filtered_sft,
    "base_correct": base_correct,
}


def _coarse(run: Run) -> dict:
    return run.parent("03_coarse_rlhf").results()


def _cost(process: CoarseTrainer, note: str, sft_tokens: int = 0) -> dict:
    spent = {"rollout_tokens": process.rollout_tokens, "sft_tokens": sft_tokens, "iterations": process.iteration}
    return {**spent, "note": note}


def _trainer(run: Run, bench: Bench, name: str, start: bool = False, law: Law | None = None, **given) -> CoarseTrainer:
    """A trainer of 03 with checkpoints of its own; from the instruction model (`start`), else from the base."""
    bench.make_room()  # for actor, critic and reward model
    model = bench.inputs.instruct() if start else None
    rule, folder = make_law(law or run.settings.coarse.law), run.here.path("checkpoints", name)
    return coarse_rlhf.trainer(bench.inputs, rule, folder, start=model, evaluated=False, **given)


def _train(run: Run, process: CoarseTrainer, name: str, what: str, tokens: int | None = None) -> None:
    """Train to the last iteration or until so many `tokens` are generated; raises Stopped on request."""
    if tokens is not None:
        asked = process.stop
        process.stop = lambda: process.rollout_tokens >= tokens or asked()
    coarse_rlhf.restore_rows(run, process, control=name)
    progress = Progress(what, "token" if tokens else "iteration")
    with run.here.timer(name), stopping(run.here):
        for row in process:
            run.here.log({"control": name, **row})
            done = (min(process.rollout_tokens, tokens), tokens) if tokens else (process.iteration, _last(process))
            progress(*done)
    if process.iteration < _last(process) and (tokens is None or process.rollout_tokens < tokens):
        reached = f"iteration {process.iteration}" + f" of {_last(process)}" * (tokens is None)
        raise Stopped(f"{what}: stopped after {reached}; run again to continue")


def _last(process: CoarseTrainer) -> int:
    return process.config.iterations


def _student(run: Run, bench: Bench) -> CoarseTrainer:
    """The distillation, trained now or as its last checkpoint has it."""
    config = run.settings.coarse
    changes = {"critic": "shared", "critic_head": "zero", "critic_warmup": 0, "cut": "score"}  # no critic is asked
    law = Law(name="fixed", limit=make_law(config.law).largest)
    process = _trainer(
        run, bench, "distilled", start=True, law=law, config=config.model_copy(update=changes),
        make=partial(Distillation, teacher=bench.inputs.coarse()),
    )  # fmt: skip
    _train(run, process, "distilled", "distillation")
    return process


def _shortest(found: list[tuple[Prompt, list[list[int]]]]) -> list[instruct.Example]:
    """Question and shortest right answer, its forced beginning included, of every prompt that has one."""
    whole = ((p, [[*p.forced, *ids] for ids in answers]) for p, answers in found)
    short = ((p, stated.shortest_right(p.problem, answers)) for p, answers in whole)
    return [(list(p.ids[: len(p.ids) - len(p.forced)]), answer) for p, answer in short if answer]


def _asked(found: list) -> str:
    return f"to each of {len(found)} training prompts, up to its answer"


def _answers(run: Run, bench: Bench, teacher: str) -> list[tuple[Prompt, list[list[int]]]]:
    """Training prompts with a teacher's answers to them: the Coarse Actor's until it has generated as many tokens as in
    03, the base's, begun for it, until twice as many, as it took no training."""
    config, inputs, seed = run.settings.coarse, bench.inputs, run.settings.seed
    goal, limit = _coarse(run)["rollout_tokens"], make_law(config.law).largest
    prompts, each = inputs.prompts("train"), _each(config)
    model = inputs.coarse
    if teacher == "base":
        prompts, model, goal = analysed_prompts([p.problem for p in prompts]), inputs.base, 2 * goal

    @cache
    def sampler():
        bench.make_room()
        return inputs.sampler(model(), config, max(len(p.ids) for p in prompts) + limit)

    def answers(asked: list[Prompt], number: int) -> list[list[int]]:
        repeated = [p for p in asked for _ in range(ANSWERS)]
        drawn = sampler()(repeated, [limit] * len(repeated), temperature=config.temperature, seed=seed * 1000 + number)
        return [s.ids for s in drawn]

    found, tokens, number = [], 0, 0
    progress = Progress(f"{teacher} answers", "token")
    with run.here.timer(f"{teacher}_answers"), stopping(run.here):
        while tokens < goal:
            asked = [prompts[(number * each + k) % len(prompts)] for k in range(each)]
            drawn = bench.pieces([f"{teacher} answers", number], partial(answers, asked, number))
            found += [(p, drawn[k * ANSWERS : (k + 1) * ANSWERS]) for k, p in enumerate(asked)]
            tokens, number = tokens + sum(map(len, drawn)), number + 1
            progress(min(tokens, goal), goal)
    return found


def _each(config: Coarse) -> int:
    """Prompts that are answered at a time: as many answers as in an iteration of 03, where that is enough."""
    return max(1, config.prompts // ANSWERS)


def _fine_tuned(
    run: Run,
    bench: Bench,
    name: str,
    examples: list[instruct.Example],
    what: str,
    found: list[tuple[Prompt, list[list[int]]]],
) -> tuple[nn.Module, dict]:
    """The instruction model after SFT on these examples: whole passes, of at least as many optimiser steps as 03."""
    config, here, inputs = run.settings.coarse, run.here, bench.inputs
    bench.make_room()
    per_step, steps = -(-config.prompts // config.minibatches), config.iterations * config.epochs * config.minibatches
    passes = -(-steps // -(-len(examples) // per_step)) if examples else 0
    with here.timer(name), stopping(here):
        model = inputs.instruct()  # where nothing was right, it stays as it is
        if examples:
            model = instruct.fine_tune(
                inputs.instruct_source, inputs.tokenizer, run.settings, examples, per_step,
                folder=here.path("checkpoints", name), passes=passes, what=name, stop=here.stop_requested,
                progress=Progress(name.replace("_", " "), "step"),
            )  # fmt: skip
    return model, {
        "rollout_tokens": sum(len(ids) for _, answers in found for ids in answers),
        "sft_tokens": passes * sum(len(prompt) + len(answer) for prompt, answer in examples),
        "iterations": len(found) // _each(config),
        "examples": len(examples),
        "passes": passes,
        "note": f"SFT of the instruction model on {what}",
    }
