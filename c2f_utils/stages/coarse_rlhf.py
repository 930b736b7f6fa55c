"""03: what does RLHF straight on the base give as the limit grows? Also the loop that 04 and 06 reuse."""

import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from c2f_utils import limits
from c2f_utils.coarse import actor_critic
from c2f_utils.coarse.ranks import Ranks
from c2f_utils.coarse.trainer import CoarseTrainer
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import C2FError
from c2f_utils.files import read_jsonl, write_text
from c2f_utils.measure import answers
from c2f_utils.models import loading
from c2f_utils.models.rewards import RewardFunction
from c2f_utils.rollout.anatomy import output_weight, trunk_of
from c2f_utils.runs import provenance
from c2f_utils.runs.registry import OF_SETTINGS
from c2f_utils.runs.run import Run
from c2f_utils.settings.config import Coarse
from c2f_utils.settings.laws import make_law
from c2f_utils.stages import processes
from c2f_utils.stages.inputs import Inputs, keep_samples


def trainer(
    inputs: Inputs,
    law: limits.Law,
    folder: Path | None,
    *,
    start: nn.Module | None = None,
    reward: RewardFunction | None = None,
    config: Coarse | None = None,
    seed: int | None = None,
    prompts: list[Prompt] | None = None,
    evaluated: bool = True,
    ranks: Ranks | None = None,
) -> CoarseTrainer:
    """A trainer that continues from the checkpoints in `folder` (None keeps none); it starts from the base model
    unless `start` is given, on training prompts unless others are."""
    settings = inputs.settings
    config = config or settings.coarse
    on_gpu = loading.device(settings.models).type == "cuda"
    if settings.models.compile and not on_gpu:
        raise C2FError("models.compile = true, but torch sees no GPU; set it to false")
    model = inputs.base() if start is None else start
    # On a GPU adapters are of the trunk's type: beside bfloat16 the optimiser keeps float32 masters (`updates.py`), and
    # the library would otherwise carry every activation around in float32 for them.
    actor = loading.add_lora(model, settings.models.lora, alike=on_gpu) if settings.models.lora else model
    if config.critic == "separate" and config.critic_head == "reward":
        critic = actor_critic.Critic.from_reward(inputs.reward.model, inputs.reward.mean, inputs.reward.std)
    else:
        trunk = trunk_of(inputs.base()) if config.critic == "separate" else None
        critic = actor_critic.Critic(output_weight(actor).shape[1], trunk)
    policy = actor_critic.ActorCritic(actor, critic.to(loading.device(settings.models)))
    if settings.models.gradient_checkpointing:
        policy.recompute_activations()
    if settings.models.compile:
        policy.compile_layers()
    prompts = prompts or inputs.prompts("train", seed=seed)
    decoder = inputs.sampler(actor, config, max((len(p.ids) for p in prompts), default=0) + law.largest)
    inputs.self_check(actor, decoder, prompts, policy.head)
    return CoarseTrainer(
        policy, reward or inputs.reward, decoder, prompts, law, config,
        folder=folder,
        seed=settings.seed if seed is None else seed, pad_id=inputs.tokenizer.pad_token_id,
        evaluate=evaluator(inputs, config) if evaluated else None, stop=inputs.run.here.stop_requested,
        ranks=ranks,
    )  # fmt: skip


def evaluator(inputs: Inputs, config: Coarse):
    """Metrics on validation problems at a fixed limit, T=1, with the answers to the first few as probes."""
    prompts = inputs.prompts("validation", config.evaluation_prompts)

    def measure(actor: nn.Module) -> dict:
        samples = inputs.answers(actor, prompts, limit=config.evaluation_tokens)
        rows = answers.rows(samples[: config.probes], "coarse", "sampled_t1", inputs.reward)
        probes = [{key: row[key] for key in ("prompt", "text", "reward", "tokens", "stop")} for row in rows]
        return answers.measure(samples, inputs.reward) | {"probes": probes}

    return measure


def train(
    run: Run, law: limits.Law | None = None, reward: RewardFunction | None = None, ranks: Ranks | None = None
) -> Iterator[dict]:
    """Train the Coarse Actor of notebook 03, yielding one metrics row per iteration; nothing for a stage done before.

    `law` and `reward` may be your own objects; the stage then remembers their source and refuses to mix two of them.
    With `coarse.processes` above 1 the work is done by processes of their own (`processes.py`); `ranks` is set inside
    of one.
    """
    here = run.here
    if ranks is None and run.settings.coarse.processes > 1 and (law or reward):
        raise C2FError(
            "coarse.processes > 1 starts new processes, which cannot see a law or reward made in this notebook; "
            "set it to 1"
        )
    for name, own in (("law", law), ("reward", reward)):
        here.add_input(name, provenance.fingerprint(_identity(own)), _in_words(own))
    if here.loaded:
        return
    inputs = Inputs(run)
    if ranks is None and run.settings.coarse.processes > 1:
        yield from processes.train(run)
        return
    rule = law or make_law(run.settings.coarse.law)
    process = trainer(inputs, rule, here.path("checkpoints"), reward=reward, ranks=ranks)
    restore_rows(run, process)
    _snapshot(run, process)  # a kill may have fallen between the checkpoint continued from and its snapshot
    with here.timer("training"):
        for row in process:
            here.log(row)
            _snapshot(run, process)
            yield row
    with here.timer("evaluation"):
        finish(run, inputs, process)


def assist(run: Run, ranks: Ranks) -> None:
    """What every process but the first does while `train` runs there: the same training, and nothing on disk."""
    inputs = Inputs(run)
    process = trainer(inputs, make_law(run.settings.coarse.law), run.here.path("checkpoints"), ranks=ranks)
    for _ in process:
        pass
    ranks.plain(process.policy.actor, inputs.base)


def _snapshot(run: Run, process: CoarseTrainer) -> None:
    """Keep the actor of an iteration that was evaluated, if asked for, written beside its name and renamed."""
    evaluated = process.iteration and process.curve[-1]["iteration"] == process.iteration
    if not run.settings.coarse.snapshots or not evaluated:
        return
    path = run.here.path("snapshots", f"iteration-{process.iteration:05d}.safetensors")
    if path.exists():
        return
    partial = path.with_suffix(".partial")
    state = process.policy.actor.state_dict()
    save_file({name: value.detach().contiguous() for name, value in state.items()}, partial)
    os.replace(partial, path)


def finish(run: Run, inputs: Inputs, process: CoarseTrainer) -> None:
    """Save the actor, its answers on test problems and the results of 03."""
    here, actor = run.here, process.ranks.plain(process.policy.actor, inputs.base)
    loading.save_model(actor, inputs.tokenizer, here.path("model"))
    samples = inputs.answers(actor, inputs.prompts("test"))
    keep_samples(here, answers.rows(samples, "coarse", "sampled_t1", inputs.reward), run.settings)
    here.save_results({"law": type(process.law).__name__.lower()} | summary(process, samples, inputs))


def summary(process: CoarseTrainer, samples: list[Sample], inputs: Inputs) -> dict:
    """What 03 and 04 keep of one training run; `samples` answer the test problems at T=1."""
    probes = [{"iteration": point["iteration"], **probe} for point in process.curve for probe in point["probes"]]
    return {
        "rollout_tokens": process.rollout_tokens,
        "iterations": process.iteration,
        "final": answers.measure(samples, inputs.reward),
        "prefix_rewards": answers.prefix_rewards(samples, inputs.reward, inputs.settings.evaluation.prefixes),
        "curve": [{key: value for key, value in point.items() if key != "probes"} for point in process.curve],
        "limits": [row["limit"] for row in process.history],
        "probes": probes,
    }


def restore_rows(run: Run, process: CoarseTrainer, **labels: object) -> None:
    """Make metrics.jsonl agree with the checkpoint that training continues from.

    A kill may fall between a checkpoint and its row, or between rows and the next checkpoint. Rows with other `labels`
    are kept.
    """
    path = run.here.path("metrics.jsonl")
    others = [row for row in read_jsonl(path) if any(row.get(key) != value for key, value in labels.items())]
    write_text(path, "")
    for row in [*others, *({**labels, **row} for row in process.history)]:
        run.here.log(row)


def _identity(own: object) -> dict[str, str]:
    """What tells one law or reward of the user's from another: its source, and for an object what it was made with."""
    if own is None:
        return OF_SETTINGS
    return {"source": _source(own), "state": _plain(sorted(_state(own).items()))}


def _in_words(own: object) -> str:
    """The object's name and what it was made with, for a message; two with the same words differ in their code."""
    if own is None:
        return "that of the settings"
    name = own.__qualname__ if inspect.isroutine(own) else type(own).__qualname__
    made = ", ".join(f"{key}={_plain(value):.40}" for key, value in _state(own).items())
    code = provenance.fingerprint(_source(own))[:4]
    return f"{name}({made}), code {code}" if made else f"{name}, code {code}"


def _state(own: object) -> dict[str, object]:
    """What an object was made with; weights are left out, they would cost more to read than they tell."""
    if isinstance(own, nn.Module) or inspect.isroutine(own):
        return {}
    return own.state_dict() if hasattr(own, "state_dict") else dict(getattr(own, "__dict__", {}))


def _source(thing: object) -> str:
    """Source text of a function, or of an object's class: its methods and plain attributes, inherited ones too.

    `inspect.getsource` finds functions typed in a notebook, but no class: a kernel's `__main__` has no file.
    """
    if inspect.isroutine(thing):
        return _code(thing)
    parts = []
    for kind in type(thing).__mro__:
        if kind in (object, limits.Law, nn.Module):
            continue
        parts.append(kind.__qualname__)
        for name, value in vars(kind).items():
            if isinstance(value, property):
                parts += [_code(part) for part in (value.fget, value.fset) if part]
            elif callable(found := getattr(value, "__func__", getattr(value, "func", value))):
                parts.append(f"{name}: {_code(found)}")
            elif not name.startswith("__") and isinstance(value, _PLAIN):
                parts.append(f"{name} = {_plain(value)}")
    return "\n".join(parts)


_PLAIN = str | int | float | bool | None | tuple | list | dict


def _code(function: object) -> str:
    """Source text of a function; its instructions and constants where none is kept, else its name."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return f"{code.co_code.hex()} {code.co_names} {_plain(code.co_consts)}" if code else _plain(function)


def _plain(value: object) -> str:
    """`repr` without the addresses and places that change from one session to the next."""
    return re.sub(r" at 0x[0-9a-f]+|, file \".*?\", line \d+", "", repr(value))
