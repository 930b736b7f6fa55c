"""The laws for l(t) in somebody else's trainer: TRL's GRPO and RLOO, which have no critic.

Question: what does a critic add, and do the laws work without our trainer? Inputs: a law and a TRL trainer. Output:
that trainer, generating under l(t). What a trainer without critic can tell a law: reward, truncated share, tail
return (if the reward gives prefix scores), tail repetition, KL per token (if it is logged). Laws that read the critic
or draw a limit for every request are refused before training.

Read in TRL 1.16 and tested with it. Its trainers copy `args.max_completion_length` when they are built, and nothing
warns that changing it later has no effect; what generation reads is named in `set_limit`. Rollouts are kept for
`steps_per_generation * num_iterations` micro-steps, so the limit moves only where a new one is about to be generated.
A resumed trainer makes its callbacks anew: the law's state lies in each checkpoint beside the weights.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from c2f_utils.coarse.experience import tail_return, useful_length
from c2f_utils.errors import C2FError, problems
from c2f_utils.files import read_json, write_json
from c2f_utils.limits import CRITIC_FREE, Law, Signals, refuse_another, refuse_beyond, refuse_unfed
from c2f_utils.redundancy import rep_n, repeated_spans

STATE = "limit.json"  # in every checkpoint folder


def set_limit(trainer, limit: int) -> None:
    """Make the next generation of a TRL 1.16 trainer stop after `limit` tokens.

    Generation with transformers (plain or continuous batching) reads `generation_config`, and overwrites the model's
    own by `generation_kwargs`; vLLM reads `vllm_generation`; the loss and the tool loop read `max_completion_length`.
    """
    engine = getattr(trainer, "vllm_generation", None)
    if engine is not None:
        engine.max_completion_length = limit
    else:
        trainer.generation_config.max_new_tokens = limit
        trainer.generation_kwargs["max_new_tokens"] = limit
    trainer.max_completion_length = limit


class LimitCallback(TrainerCallback):
    """Drives the completion limit of anybody's TRL `GRPOTrainer` or `RLOOTrainer` by a law, in three lines:

        limit = LimitCallback(Clock(24, maximum=144, duration=17))
        trainer = GRPOTrainer(model, limit.watch(reward), args, train_dataset=prompts, callbacks=[limit])
        limit.trainer = trainer

    then `trainer.train()`, also with `resume_from_checkpoint`. `reward` is a TRL reward function; several are allowed,
    the law sees the watched one. A soft overlong punishment among them follows the limit, its buffer in proportion.
    `history` has one row per generation. Raises C2FError before training for laws that cannot be fed and for settings
    under which the limit would not be obeyed, and during it when an answer came out longer than the limit.
    """

    def __init__(self, law: Law):
        refuse_unfed(law)
        self.law, self.trainer = law, None
        self._law_began, self._largest = law.state_dict(), law.largest
        self.history: list[dict] = []
        self.rollout_tokens = 0
        self._pending: Signals | None = None  # what the last generation told, until the next one is due
        self._due = False  # a limit was set and its generation has not come yet
        self._watched: Callable | None = None
        self._buffers: list[tuple[object, int, int]] = []  # overlong punishments with their first length and buffer

    def watch(self, reward: Callable) -> Callable:
        """The same TRL reward function, observed; raises C2FError for a model, a name or an `async` function.

        If `reward` has `prefix_scores(prompts=, completions=, completion_ids=, ...)`, a list of [len(ids)] tensors
        with the reward after every token, the last ones are the rewards and laws may use the tail return.
        """
        if isinstance(reward, str | nn.Module) or not callable(reward) or inspect.iscoroutinefunction(reward):
            raise C2FError(
                f"LimitCallback.watch got {reward!r:.80}; expected an ordinary function from completions to rewards: "
                "wrap a reward model in one"
            )
        self._watched = reward

        def watched(prompts, completions, completion_ids, **columns) -> list[float | None]:
            given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
            prefixes = reward.prefix_scores(**given) if hasattr(reward, "prefix_scores") else None
            rewards = [float(row[-1]) for row in prefixes] if prefixes is not None else list(reward(**given))
            if self.trainer is None or self.trainer.model.training:  # evaluation says nothing to the law
                self._observe(rewards, completion_ids, prefixes)
            return rewards

        watched.__name__ = getattr(reward, "__name__", type(reward).__name__)  # TRL's logs use it
        return watched

    # --- what the trainer calls --------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **_):
        self._refuse(args)
        if not self._buffers:  # else trained before: their lengths have moved since
            punishments = [r for r in (self._watched, *self.trainer.reward_funcs) if hasattr(r, "max_completion_len")]
            self._buffers = [(r, r.max_completion_len, r.soft_punish_cache) for r in punishments]
        if state.global_step:
            self.load(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_step_begin(self, args, state, control, **_):
        self._move(args)

    def on_substep_end(self, args, state, control, **_):
        self._move(args)  # with gradient accumulation a generation may fall between two optimiser steps

    def on_log(self, args, state, control, logs=None, **_):
        if self._pending and self._pending.kl_per_token is None and (logs or {}).get("kl") is not None:
            self._pending = replace(self._pending, kl_per_token=logs["kl"])
            self.history[-1]["kl_per_token"] = round(logs["kl"], 6)

    def on_save(self, args, state, control, **_):
        if state.is_world_process_zero:
            self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    # --- state -------------------------------------------------------------------------------------------------------

    def save(self, checkpoint: Path) -> None:
        """Put the law's state, the signals it has not seen yet and the history into a checkpoint folder."""
        pending = self._pending and asdict(self._pending)
        state = {"law_name": type(self.law).__name__, "law": self.law.state_dict(), "law_began": self._law_began}
        state["pending"] = pending
        state |= {"history": self.history, "rollout_tokens": self.rollout_tokens}
        write_json(Path(checkpoint) / STATE, state)

    def load(self, checkpoint: Path) -> None:
        """Continue l(t) from a checkpoint folder; raises C2FError when it has no limit or that of another law."""
        path = Path(checkpoint) / STATE
        if not path.is_file():
            raise C2FError(
                f"{path} does not exist, so l(t) would start anew at {self.law.limit} tokens; resume from a checkpoint "
                "in args.output_dir that was saved with this callback"
            )
        state = read_json(path)
        refuse_another(self.law, state["law_name"], state.get("law_began"), path)
        self.law.load_state_dict(state["law"])
        self.history, self.rollout_tokens = state["history"], state["rollout_tokens"]
        pending = state["pending"]
        self._pending = pending and Signals(**pending | {"rewards": tuple(pending["rewards"]), "limits": ()})

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _refuse(self, args) -> None:
        trainer = self.trainer
        if trainer is None or self._watched is None:
            raise C2FError(
                "LimitCallback is not connected; pass `callback.watch(reward)` as a reward function and set "
                "`callback.trainer = trainer` once the trainer is built"
            )
        engine = getattr(trainer, "vllm_generation", None)
        if engine is None and not hasattr(trainer, "generation_config"):
            raise C2FError(
                f"{type(trainer).__name__} has neither generation_config nor vllm_generation; LimitCallback is for "
                "TRL's GRPOTrainer and RLOOTrainer as of 1.16"
            )
        known = dict.fromkeys(("tail_return", "useful_length"), hasattr(self._watched, "prefix_scores"))
        known["kl_per_token"] = args.beta and args.logging_steps == 1
        refuse_unfed(self.law, [name for name in CRITIC_FREE if known.get(name, True)])
        found = []
        if getattr(args, "loss_type", None) == "dr_grpo" and self.law.largest != self.law.limit:
            found.append("loss_type 'dr_grpo' divides by the limit, so steps would shrink as it grows; use 'dapo'")
        if engine is not None and "max_tokens" in (args.generation_kwargs or {}):
            found.append("generation_kwargs has max_tokens, which overrides every limit in vLLM; take it out")
        room = args.vllm_max_model_length if engine is not None else None
        if room is not None and room <= self.law.largest:
            found.append(
                f"vllm_max_model_length = {room} has no room for a prompt and the law's largest limit "
                f"{self.law.largest}; raise it, the engine cannot grow later"
            )
        if found:
            raise problems("this trainer cannot follow the law:", found)

    def _move(self, args) -> None:
        if self.trainer._step % (args.steps_per_generation * self.trainer.num_iterations):
            return  # the rollouts at hand are still being learnt from
        if self._pending:
            refuse_beyond(self.law, [self.law.update(self._pending)], self._largest)
            self._pending = None
        set_limit(self.trainer, self.law.limit)
        for reward, length, buffer in self._buffers:
            reward.max_completion_len = self.law.limit
            reward.soft_punish_cache = round(buffer * self.law.limit / length)
        self._due = True

    def _observe(self, rewards: Sequence, answers: Sequence[Sequence[int]], prefixes: list[Tensor] | None) -> None:
        from accelerate.utils import gather_object

        if not self._due:
            raise C2FError(
                "rewards came for a generation that no limit was set for; watch one reward function, and connect the "
                "callback to the trainer that calls it"
            )
        self._due = False
        if bad := [i for i, row in enumerate(prefixes or ()) if not row.isfinite().all()]:
            raise C2FError(
                f"non-finite reward of a prefix in iteration {len(self.history) + 1}, answers {bad} of "
                f"{len(prefixes)}; a law cannot follow it: mend `prefix_scores` of the watched reward"
            )
        limit, ends = self.law.limit, set(self.trainer.eos_token_ids)
        facts = []
        for index, (reward, ids) in enumerate(zip(rewards, answers, strict=True)):
            cut = ids[-1] not in ends
            repeats = float(repeated_spans(ids)[int(0.75 * len(ids)) :].mean()) if cut else None
            gain = tail_return([prefixes[index]], limit) if prefixes is not None else None
            curve = prefixes[index].tolist() if prefixes is not None else None
            facts.append((reward, len(ids), cut, repeats, gain, rep_n(ids, 4), curve))
        # Every process must move its law alike, so all of them see all answers.
        scores, tokens, cuts, repeats, gains, rep4, curves = zip(*gather_object(facts), strict=True)
        if max(tokens) > limit:
            raise C2FError(
                f"an answer has {max(tokens)} tokens under a limit of {limit}: this trainer reads its limit elsewhere "
                "(TRL 1.16 is what LimitCallback was tested with)"
            )
        known = [float(score) for score in scores if score is not None]
        if not known:
            raise C2FError("the watched reward function gave no reward to any answer; a law needs at least one")
        self.rollout_tokens += sum(tokens)
        seen = Signals(
            iteration=len(self.history),
            reward=sum(known) / len(known),
            truncated_share=sum(cuts) / len(cuts),
            tail_return=_mean(gains) if prefixes is not None else None,
            useful_length=useful_length([torch.tensor(c) for c in curves], limit) if prefixes is not None else None,
            tail_repetition=_mean(repeats) or 0.0,
            rewards=tuple(known),
        )
        self._pending = seen
        deviation = (sum((x - seen.reward) ** 2 for x in known) / max(1, len(known) - 1)) ** 0.5
        row = {
            "iteration": seen.iteration + 1,
            "limit": limit,
            "reason": self.law.reason,  # for this limit
            "rollout_tokens": self.rollout_tokens,
            "reward": seen.reward,
            "reward_sd": deviation,
            "mean_tokens": sum(tokens) / len(tokens),
            "longest": max(tokens),
            "truncated_share": seen.truncated_share,
            "tail_return": seen.tail_return,
            "rep4": _mean(rep4),
        }
        self.history.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
