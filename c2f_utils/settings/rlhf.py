"""Settings of coarse RLHF and of the study that compares laws for the limit."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from c2f_utils.settings.kinds import Count, Few, Items, Name, NonNegative, Positive, Rate, Section, Share
from c2f_utils.settings.laws import Law

Cut = Literal["score", "average", "bootstrap", "penalty", "mask", "continue"]
Paid = Literal["model", "verifiable"]  # by the reward model, or by the embedded domain's exact checker


class Coarse(Section):
    """Actor-critic RLHF straight on the base model."""

    law: Law = Law(name="logistic", start=24, maximum=144, step=8)
    iterations: Positive = Field(17, description="rounds of rollout and update")
    prompts: Items = Field(64, description="prompts (and answers) per iteration, all processes together")
    temperature: Annotated[float, Field(ge=0.01, le=100)] = Field(
        1.0, description="divides policy and reference logits alike"
    )
    epochs: Positive = Field(2, description="passes over each rollout batch")
    minibatches: Positive = Field(2, description="optimiser steps per pass")
    tokens_per_micro_batch: Positive = Field(16_384, description="padded tokens of one forward/backward pass")
    tokens_in_cache: Positive = Field(
        65_536, description="key/value positions held while decoding; more answers wait their turn"
    )
    engine: Literal["kv", "library", "continuous", "vllm"] = Field(
        "kv",
        description="sampler of training: our decoder (the library's forward where it does not hold, and a line says "
        "so), the library's forward, its continuous batching, or vLLM (GPU, extra 'vllm'; not yet run on one)",
    )
    engine_memory: Rate = Field(
        0.3, description="engine vllm: share of the GPU's memory that it holds beside training, weights and cache"
    )
    old_logps: Literal["auto", "recorded", "recomputed"] = Field(
        "auto",
        description="old log-probabilities: the sampler's or the training forward's; auto: recorded if float32 and "
        "not from vLLM",
    )
    importance_cap: NonNegative = Field(
        2.0,
        description="recomputed old log-probabilities, whichever engine: a token's policy loss is weighted by "
        "min(pi_old / pi_sampler, cap); 0 = not at all",
    )
    processes: Few = Field(1, description="training processes; more than 1 starts `accelerate launch`")
    spread: Literal["ddp", "fsdp2"] = Field(
        "ddp", description="processes > 1: weights replicated (LoRA), or split (full fine-tuning)"
    )
    actor_learning_rate: Rate = 5e-4
    critic_learning_rate: Rate = 1e-3
    critic: Literal["separate", "shared"] = "separate"
    critic_head: Literal["reward", "zero"] = Field(
        "reward", description="initial critic: the reward model, or a zero head"
    )
    critic_warmup: Count = Field(0, description="iterations in which only the critic learns; their tokens count")
    value_coefficient: NonNegative = Field(0.1, description="weight of the value loss when the trunk is shared")
    clip: Rate = Field(0.2, description="PPO ratio clip")
    clip_high: NonNegative = Field(0.0, description="clip of ratios above 1 (clip-higher); 0 = as `clip`")
    value_clip: NonNegative = Field(0.2, description="value clip in units of the reward's standard deviation; 0 = off")
    kl_coefficient: NonNegative = Field(0.05, description="price of one nat of KL to the reference")
    kl_target: NonNegative = Field(
        0.0, description="target KL per token for the adaptive controller, nats; 0 = fixed coefficient"
    )
    discount: Share = Field(1.0, description="gamma")
    lambda_policy: Share | Literal["adaptive"] = Field(
        0.95, description="GAE lambda of the policy; adaptive = clamp(1 - 1/(alpha l), .95, 1)"
    )
    lambda_critic: Share = Field(0.95, description="GAE lambda of the value targets")
    lambda_alpha: Annotated[float, Field(gt=0)] = 0.05
    cut: Cut = Field(
        "score",
        description="how an answer cut by the limit is credited: by its reward, the mean reward of its last eighth of "
        "prefixes (while most answers are cut), what the critic expects of the rest, its reward less a penalty, not at "
        "all (nothing is learnt from it), or as by the critic, and it goes on in the next iteration",
    )
    cut_penalty: NonNegative = Field(1.0, description="subtracted from the reward of a cut answer when cut = penalty")
    reward_clip: Annotated[float, Field(gt=0)] = Field(10.0, description="bound of the normalised reward")
    reward_scaling: Literal["base", "running"] = Field(
        "base", description="z-score on base samples, or running root mean square"
    )
    reward: Paid = Field(
        "model", description="what pays: the reward model, or the embedded domain's exact checker (utility)"
    )
    token_price: NonNegative = Field(0.0, description="subtracted from the reward per answer token")
    overlong: NonNegative = Field(
        0.0, description="soft overlong punishment: subtracted at the limit, less before it, nothing before the buffer"
    )
    overlong_buffer: Rate = Field(0.25, description="share of l(t) over which it rises")
    length_budget: Count = Field(
        0, description="dual price: it moves until answers have this many tokens on average; 0 = off"
    )
    length_price_rate: NonNegative = Field(0.1, description="how fast it moves: per iteration and relative overshoot")
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    evaluate_every: Positive = Field(4, description="iterations between evaluations on validation problems")
    evaluation_prompts: Items = Field(128, description="validation problems of the curve")
    evaluation_tokens: Positive = Field(144, description="answer limit of the curve, fixed while l(t) moves, tokens")
    checkpoint_every: Positive = Field(2, description="iterations between checkpoints")
    probes: Count = Field(4, description="prompts followed through training")
    snapshots: bool = Field(False, description="keep the actor at every evaluation, for averages in 06 (small models)")

    @model_validator(mode="after")
    def _head_fits_critic(self) -> "Coarse":
        if self.critic == "shared" and self.critic_head == "reward":
            raise ValueError("critic 'shared' has a head on the actor's trunk: set critic_head to 'zero'")
        return self

    @model_validator(mode="after")
    def _cap_leaves_one_alone(self) -> "Coarse":
        if 0 < self.importance_cap < 1:
            raise ValueError(
                f"importance_cap = {self.importance_cap:g} would shrink tokens that need no weight; expected 0 (off) "
                "or at least 1"
            )
        return self

    @model_validator(mode="after")
    def _minibatches_have_prompts(self) -> "Coarse":
        if self.minibatches > self.prompts:
            raise ValueError(f"minibatches {self.minibatches} is above prompts {self.prompts}: a step needs a prompt")
        return self


class Credit(Section):
    """What an entry of `schedules` changes in `coarse` beside its law; null keeps the setting of `coarse`."""

    cut: Cut | None = None
    cut_penalty: NonNegative | None = None
    token_price: NonNegative | None = None
    iterations: Positive | None = None


class CriticFree(Section):
    """A critic-free baseline (TRL) under a law; everything else is as in `coarse`."""

    trainer: Literal["grpo", "rloo"]
    law: Law
    reward: Paid = Field("model", description="reward model, or the embedded domain's exact checker (as in R1-Zero)")
    generations: Annotated[int, Field(ge=2)] = Field(4, description="answers per prompt: the group of the baseline")
    iterations: Positive | None = Field(None, description="rounds of rollout and update; null: coarse.iterations")
    learning_rate: Rate = Field(3e-4, description="tiny: best of three (GRPO: four) tried on a seed of its own")


class Schedules(Section):
    """Laws compared in notebook 04; the law of `coarse.law` is reused from 03 and stands for `logistic`."""

    laws: dict[Name, Law] = {}
    study_laws: dict[Name, Law] = Field({}, description="further laws, only with study=True")
    credit: dict[Name, Credit] = Field(
        {}, description="by name of the law: another way to credit cut answers, and for how long"
    )
    critic_free: dict[Name, CriticFree] = Field(
        {}, description="baselines without a critic, only with study=True; not for laws that read the critic"
    )
    study_seeds: list[Count] = Field([0, 1, 2], min_length=1, description="seeds of the study")
