"""03: what does RLHF straight on the base give as the limit grows? Also the loop that 04 and 06 reuse."""

import copy
import dataclasses
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from c2f_utils import limits
from c2f_utils.coarse import actor_critic
from c2f_utils.coarse.ranks import Ranks
from c2f_utils.coarse.trainer import CoarseTrainer
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import C2FError
from c2f_utils.files import read_jsonl, replacing, write_text
from c2f_utils.measure import answers
from c2f_utils.models import loading
from c2f_utils.models.rewards import RewardFunction, exact
from c2f_utils.notebook import seed_everything
from c2f_utils.notebook.interrupt import stopping
from c2f_utils.rollout.anatomy import output_weight, trunk_of
from c2f_utils.runs.run import Run
from c2f_utils.settings.config import Coarse, Lora
from c2f_utils.settings.laws import make_law
from c2f_utils.stages import own_parts, processes
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
    make: Callable[..., CoarseTrainer] = CoarseTrainer,
) -> CoarseTrainer:
    """A trainer that continues from the checkpoints in `folder` (None keeps none); it starts from the base model
    unless `start` is given, on training prompts unless others are. `make` is called as the class would be."""
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
    return make(
        policy, reward or paid(inputs, config, law), decoder, prompts, law, config,
        folder=folder,
        seed=settings.seed if seed is None else seed, pad_id=inputs.tokenizer.pad_token_id,
        evaluate=evaluator(inputs, config) if evaluated else None, stop=inputs.run.here.stop_requested,
        ranks=ranks,
    )  # fmt: skip


def paid(inputs: Inputs, config: Coarse, law: limits.Law) -> RewardFunction:
    """What training maximises if the notebook hands over no reward of its own."""
    return inputs.reward if config.reward == "model" else exact(law, config.cut)


def evaluator(inputs: Inputs, config: Coarse):
    """Metrics on validation problems at a fixed limit, T=1, with the answers to the first few as probes."""
    prompts = inputs.prompts("validation", config.evaluation_prompts)

    def measure(actor: nn.Module) -> dict:
        samples = inputs.answers(actor, prompts, limit=config.evaluation_tokens)
        rows = answers.rows(samples[: config.probes], "coarse", "sampled_t1", inputs.reward)
        probes = [{key: row[key] for key in ("prompt", "text", "reward", "tokens", "stop")} for row in rows]
        kinds = answers.by_kind(samples)
        apart = {f"accuracy_first_{kind}": row["accuracy_first"] for kind, row in kinds.items()}
        return answers.measure(samples, inputs.reward) | apart | {"probes": probes}

    return measure


def small_trainer(
    inputs: Inputs, law: limits.Law | None = None, reward: RewardFunction | None = None, prompts: int = 12
) -> CoarseTrainer:
    """A trainer to throw away, whose verbs a notebook calls one by one: the training's first `prompts` questions.

    It works on copies (of `law`, too), writes nothing and measures nothing, and its critic and actor learn at once.
    Where training splits full weights over processes, adapters stand in for them: here one process holds everything.
    """
    own_parts.refuse(law, reward)
    settings = inputs.settings
    coarse = settings.coarse
    count = min(prompts, coarse.prompts)
    steps = {"minibatches": min(coarse.minibatches, count), "critic_warmup": 0}
    if coarse.processes > 1 and coarse.spread == "fsdp2" and not settings.models.lora:
        models = settings.models.model_copy(update={"lora": Lora()})
        run = dataclasses.replace(inputs.run, settings=settings.model_copy(update={"models": models}))
        inputs = Inputs(run)
    rule = copy.deepcopy(law) if law else make_law(coarse.law)
    config = coarse.model_copy(update={"prompts": count, **steps})
    return trainer(inputs, rule, None, reward=reward, config=config, evaluated=False)


def train(
    run: Run, law: limits.Law | None = None, reward: RewardFunction | None = None, ranks: Ranks | None = None
) -> Iterator[dict]:
    """Train the Coarse Actor of notebook 03, yielding one metrics row per iteration, with the evaluations so far as its
    `curve`; nothing for a stage done before.

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
    own_parts.refuse(law, reward)
    own_parts.record(here, law=law, reward=reward)
    if here.loaded:
        return
    gc.collect()  # models of earlier cells must not stand in memory beside those that are loaded now
    seed_everything(run.settings.seed)  # nor may what those cells drew decide the first weights of adapters
    inputs = Inputs(run)
    if ranks is None and run.settings.coarse.processes > 1:
        yield from processes.train(run)
        return
    rule = law or make_law(run.settings.coarse.law)
    process = trainer(inputs, rule, here.path("checkpoints"), reward=reward, ranks=ranks)
    restore_rows(run, process)
    _snapshot(run, process)  # a kill may have fallen between the checkpoint continued from and its snapshot
    with here.timer("training"), stopping(here):
        for row in process:
            here.log(row)
            _snapshot(run, process)
            yield row | {"curve": curve(process)}
    if process.iteration < process.config.iterations:
        print(f"stopped after iteration {process.iteration} of {process.config.iterations}; run again to continue")
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
    """Keep the actor of an iteration that was evaluated, if asked for."""
    evaluated = process.iteration and process.curve[-1]["iteration"] == process.iteration
    if not run.settings.coarse.snapshots or not evaluated:
        return
    path = run.here.path("snapshots", f"iteration-{process.iteration:05d}.safetensors")
    if path.exists():
        return
    state = process.policy.actor.state_dict()
    with replacing(path) as partial:
        save_file({name: value.detach().contiguous() for name, value in state.items()}, partial)


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
    rewards = inputs.reward(samples)
    kinds = answers.by_kind(samples, rewards)
    return {
        "rollout_tokens": process.rollout_tokens,
        "iterations": process.iteration,
        "final": answers.measure(samples, lambda _: rewards),
        "prefix_rewards": answers.prefix_rewards(samples, inputs.reward, inputs.settings.evaluation.prefixes),
        "curve": curve(process),
        "limits": [row["limit"] for row in process.history],
        "probes": probes,
        **({"by_kind": kinds} if kinds else {}),
    }


def curve(process: CoarseTrainer) -> list[dict]:
    """The evaluations so far, without their probes."""
    return [{key: value for key, value in point.items() if key != "probes"} for point in process.curve]


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
