"""Critic-free baselines of 04: GRPO and RLOO from TRL on our base, prompts, rewards, laws and evaluation.

What is equal to `CoarseTrainer`: prompts and answers per iteration, optimiser steps per rollout, clip, KL price, Adam,
temperature, the law, the count of rollout tokens and the evaluation. What cannot be: answers come in groups of
`generations` to one prompt, the baseline is the group's instead of a critic's, GRPO prices KL in its loss. With the
verifiable reward instead of the reward model this is reinforcement learning as in R1-Zero, on the embedded domain.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback

from c2f_utils import limits
from c2f_utils.coarse import trl_limit
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import problems
from c2f_utils.files import read_json, room, write_json
from c2f_utils.models import loading, rewards
from c2f_utils.models.course import latest
from c2f_utils.models.library_trainers import arguments, fit, quiet
from c2f_utils.positions import beyond, positions_of
from c2f_utils.rollout.sampler import eos_ids
from c2f_utils.settings.config import Coarse
from c2f_utils.settings.laws import make_law
from c2f_utils.settings.preflight import refused_baseline
from c2f_utils.settings.rlhf import CriticFree
from c2f_utils.stages.coarse_rlhf import evaluator
from c2f_utils.stages.inputs import Inputs

CURVE = "curve.json"  # in every checkpoint folder, written last: a checkpoint that has it is whole


class Baseline:
    """One run of a critic-free trainer; built on a folder with checkpoints it continues.

    Has what `coarse_rlhf.summary` reads: `history`, `curve`, `iteration`, `rollout_tokens`. Raises C2FError before
    any model is loaded for a law that needs a critic, and before training for everything else that is impossible.
    """

    def __init__(
        self, inputs: Inputs, entry: CriticFree, folder: Path, *, seed: int | None = None, evaluated: bool = True
    ):
        if found := refused_baseline(entry, inputs.settings):
            raise problems(f"the {entry.trainer} baseline cannot be trained:", found)
        self.law = make_law(entry.law)
        changes = {"iterations": entry.iterations} if entry.iterations else {}
        self.config: Coarse = inputs.settings.coarse.model_copy(update=changes)
        self.inputs, self.entry, self.folder = inputs, entry, Path(folder)
        self.seed = inputs.settings.seed if seed is None else seed
        self.prompts = inputs.prompts("train", seed=self.seed)
        self.evaluate = evaluator(inputs, self.config) if evaluated else None
        self.limit = trl_limit.LimitCallback(self.law)
        self.curve: list[dict] = []
        self.actor = None
        self.resume = latest(self.folder, CURVE)
        if self.resume:
            self.limit.load(self.resume)
            self.curve = read_json(self.resume / CURVE)

    @property
    def history(self) -> list[dict]:
        return self.limit.history

    @property
    def iteration(self) -> int:
        return len(self.limit.history)

    @property
    def rollout_tokens(self) -> int:
        return self.limit.rollout_tokens

    def train(self, log: Callable[[dict], None] = lambda row: None) -> None:
        """Train to the last iteration or a stop request; `log` receives one row per iteration."""
        if self.iteration >= self.config.iterations:  # killed between the last checkpoint and the result
            self.actor = loading.load_actor(self.resume, self.inputs.settings.models)
            return
        trainer = self._trainer(log)
        with quiet(), room(self.folder):
            fit(trainer, lambda row: None, str(self.resume) if self.resume else None)
        self.actor = trainer.model.eval()

    def _trainer(self, log: Callable[[dict], None]):
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

        settings, config, inputs = self.inputs.settings, self.config, self.inputs
        _refuse_prompts(self.prompts, inputs.tokenizer)
        model = inputs.base()
        self.ends = eos_ids(inputs.tokenizer, model)
        if said := beyond(max(len(p.ids) for p in self.prompts), self.law.largest, positions_of(model.config)):
            raise problems("the law does not fit the model:", [f"{said}; lower the law's maximum"])
        make, configure = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[self.entry.trainer]
        # A token normaliser that l(t) does not move; RLOO has none, its loss is one ratio per answer.
        special = {"loss_type": "dapo"} if self.entry.trainer == "grpo" else {"normalize_advantages": True}
        steps = config.epochs * config.minibatches
        options = arguments(
            config.iterations * steps, self.seed, loading.device(settings.models).type == "cpu", self.folder
        )
        del options["max_length"]  # these two never cut a prompt
        revision = {"revision": model.revision} if model.revision else {}
        options |= special | {
            "per_device_train_batch_size": config.prompts // config.minibatches,
            "gradient_accumulation_steps": 1,
            "steps_per_generation": config.minibatches,
            "num_iterations": config.epochs,
            "num_generations": self.entry.generations,
            "max_completion_length": self.law.limit,
            "temperature": config.temperature,
            "epsilon": config.clip,
            "beta": config.kl_coefficient,
            "learning_rate": self.entry.learning_rate,
            "lr_scheduler_type": "constant",
            "adam_epsilon": 1e-5,
            "max_grad_norm": config.gradient_clip,
            "activation_checkpointing": settings.models.gradient_checkpointing,
            "logging_steps": 1,
            "model_init_kwargs": {"use_safetensors": True, **revision},  # of the reference
        }
        dataset = Dataset.from_dict({"prompt": [p.text for p in self.prompts], "number": [*range(len(self.prompts))]})
        course = _Course(self, steps, log)
        with quiet():
            if settings.models.lora:
                model = loading.add_lora(model, settings.models.lora)
            trainer = make(
                model, [self._shaped()], configure(**options), dataset, processing_class=inputs.tokenizer,
                callbacks=[self.limit, course],
            )  # fmt: skip
        self.limit.trainer = course.trainer = trainer
        return trainer

    def _shaped(self) -> Callable:
        """What the trainer maximises: as `CoarseTrainer.credit` shapes it, while the law sees the reward as it is."""
        config, ends = self.config, self.ends
        raw = self.inputs.reward
        if self.entry.reward == "verifiable":
            raw = rewards.exact(self.law)
        columns = _PrefixColumns if hasattr(raw, "prefix_scores") else _Columns
        watched = self.limit.watch(columns(raw, self.prompts, ends, self.inputs.tokenizer.eos_token_id, self.law))

        def reward(completion_ids, **columns) -> list[float]:
            tokens = torch.tensor([float(len(ids)) for ids in completion_ids])
            cut = torch.tensor([ids[-1] not in ends for ids in completion_ids])
            shaped = torch.tensor(watched(completion_ids=completion_ids, **columns)) - config.token_price * tokens
            shaped = shaped.clamp(-config.reward_clip, config.reward_clip)
            return (shaped - config.cut_penalty * cut if config.cut == "penalty" else shaped).tolist()

        return reward


class _Columns:
    """A reward on our samples as TRL calls it."""

    def __init__(self, reward, prompts: Sequence[Prompt], ends: frozenset[int], eos: int, law: limits.Law):
        self.reward, self.prompts, self.ends, self.eos, self.law = reward, prompts, ends, eos, law

    def __call__(self, **columns) -> list[float]:
        return self.reward(self._samples(**columns)).tolist()

    def _samples(self, completion_ids, completions, number, **_) -> list[Sample]:
        found = []
        for i, sampled, text in zip(number, completion_ids, completions, strict=True):
            ended = sampled[-1] in self.ends  # whichever of the ends it is, what is scored ends in the tokenizer's EOS
            ids = [*sampled[:-1], self.eos] if ended else sampled
            stop = "eos" if ended else "limit"
            found.append(Sample(self.prompts[i], ids, stop, self.law.limit, text=text, sampled=sampled))
        return found


class _PrefixColumns(_Columns):
    """The same for a reward that also scores every prefix: laws read the tail return off it."""

    def prefix_scores(self, **columns) -> list[Tensor]:
        return self.reward.prefix_scores(self._samples(**columns))


class _Course(TrainerCallback):
    """Evaluations, checkpoints, rows and stops at the end of an iteration, which is several optimiser steps long."""

    def __init__(self, baseline: Baseline, steps: int, log: Callable[[dict], None]):
        self.baseline, self.steps, self.log, self.trainer = baseline, steps, log, None

    def on_train_begin(self, args, state, control, **_):
        if not state.global_step:
            self._measure(0)

    def on_step_end(self, args, state, control, **_):
        iteration, rest = divmod(state.global_step, self.steps)
        if rest:
            return
        config = self.baseline.config
        stop = self.baseline.inputs.run.here.stop_requested()
        last = iteration == config.iterations
        if iteration % config.evaluate_every == 0 or last:
            self._measure(iteration)
        control.should_save = iteration % config.checkpoint_every == 0 or last or stop
        control.should_training_stop = last or stop

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in (logs or {}) and state.global_step % self.steps == 0:
            self.log(self.baseline.history[-1])

    def on_save(self, args, state, control, **_):
        write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / CURVE, self.baseline.curve)

    def _measure(self, iteration: int) -> None:
        if self.baseline.evaluate:
            limit = self.baseline.law.limit
            row = {"iteration": iteration, "rollout_tokens": self.baseline.rollout_tokens, "limit": limit}
            self.baseline.curve.append(row | self.baseline.evaluate(self.trainer.model))


def _refuse_prompts(prompts: Sequence[Prompt], tokenizer) -> None:
    """TRL takes texts: refuse those that its tokenisation would turn into other ids than our trainer sees."""
    ids = tokenizer([p.text for p in prompts])["input_ids"]
    other = [repr(p.text[:60]) for p, found in zip(prompts, ids, strict=True) if [*p.ids] != found]
    if other:
        title = f"{len(other)} of {len(prompts)} prompts become other token ids when TRL tokenises their text:"
        raise problems(title, [*other[:3], "leave schedules.critic_free empty for this data"])
