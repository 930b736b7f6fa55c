"""Typed settings: what can be set, in which unit, and which stage a setting decides.

Inputs: a profile (`profiles/*.yaml`), a seed and overrides. Output: one frozen `Settings` object. Every problem is
reported at once, before any work starts. Values are strict: `'1e-6'` is text, not a number, and `'false'` is text,
not a flag, because papermill hands exactly such strings on when it reads YAML itself.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from c2f_utils.domain.forms import Form
from c2f_utils.domain.worlds import WORLDS, World
from c2f_utils.settings.judge import Judge
from c2f_utils.settings.kinds import Count, NonNegative, Positive, Rate, Section, Share
from c2f_utils.settings.laws import Law

PROFILES = ("smoke", "tiny", "gpu_demo", "small_gpu", "mistral_7b")

STAGES = (
    "00_environment_and_data", "01_base_model", "02_reward_model", "03_coarse_rlhf", "04_length_schedules",
    "05_instruction_model", "06_residue_merging", "07_evaluation", "08_report", "09_studies",
)  # fmt: skip

# Which sections decide a stage's own result; what its parents decide reaches it through their fingerprints.
_DECIDES = {
    "00_environment_and_data": ("models", "data"),
    "01_base_model": ("models", "data", "pretrain"),
    "02_reward_model": ("models", "data", "reward"),
    "03_coarse_rlhf": ("models", "data", "coarse", "evaluation"),
    "04_length_schedules": ("models", "data", "coarse", "schedules", "evaluation"),
    "05_instruction_model": ("models", "data", "instruct", "evaluation"),
    "06_residue_merging": ("models", "data", "coarse", "merge", "evaluation"),
    "07_evaluation": ("models", "data", "merge", "evaluation", "judge"),
    "08_report": (),
    "09_studies": (),
}

PAIR_ANSWER_TOKENS = 144  # embedded domain: longest answer of a preference pair

Cut = Literal["score", "average", "bootstrap", "penalty"]


class Lora(Section):
    """Low-rank adapters on the linear layers of the trunk; the base weights stay frozen and serve as the reference."""

    rank: Positive = 16
    alpha: Positive = 32
    targets: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Models(Section):
    """Where the models come from; `null` for `base` and `instruct` means: make them on the embedded domain."""

    base: str | None = Field(None, description="local folder or hub id of a causal language model")
    base_revision: str | None = Field(None, description="hub branch, tag or commit; null: main, as the cache has it")
    instruct: str | None = Field(
        None, description="local folder or hub id of an instruction model derived from the same base"
    )
    instruct_revision: str | None = None
    base_form: Form = Field(
        "raw",
        description="how the base is prompted, and so how the coarse actor is trained: raw = as the data has it, "
        "human_assistant = the same, and the next turn's header ends an answer, template = its tokenizer's template",
    )
    instruct_form: Form = Field(
        "raw", description="the same for the instruction model and all merges; 07 measures both, if there is a template"
    )
    reward: str | None = Field(None, description="local folder or hub id of a finished reward model; null trains one")
    reward_revision: str | None = None
    lora: Lora | None = Field(None, description="adapters for actor and reward model; null trains all weights")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of frozen weights and activations")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = Field(
        False, description="GPU: compile the decoder layers for scoring and updates; seconds at the start, faster then"
    )


class Data(Section):
    """Prompts, preferences and instructions: the embedded domain or files in the HH-RLHF format."""

    source: Literal["embedded", "preferences"] = "embedded"
    preferences: str | None = Field(None, description="HH-RLHF pairs: a .jsonl or .jsonl.gz file, or a hub data set id")
    preference_split: str = "train"
    preference_subsets: list[str] = Field(
        [], description="folders of a hub set or of a local copy of one, e.g. [harmless-base]; none = the whole set"
    )
    stop_strings: list[str] = Field([], description="texts that end an answer, e.g. the next turn's header")
    operations: tuple[Positive, Positive] = Field(
        (3, 5), description="fewest and most steps of an embedded problem", strict=False
    )
    vocabulary: Literal["small", "wide"] = Field(
        "small", description="words and numbers of embedded problems: 0 to 14, or 0 to 49 with many more words"
    )
    max_prompt_tokens: Positive = Field(64, description="longer prompts are left out and counted, tokens")
    validation_prompts: Positive = Field(256, description="problems for choices such as the merge coefficient")
    test_prompts: Positive = Field(256, description="problems for reported figures; disjoint from all others")

    @property
    def world(self) -> World:
        """What embedded problems are made of."""
        return WORLDS[self.vocabulary]


class Pretrain(Section):
    """Pretraining of the embedded base model (Mistral layout)."""

    hidden_size: Positive = 64
    layers: Positive = 2
    heads: Positive = 4
    key_value_heads: Positive = 2
    intermediate_size: Positive = 160
    max_positions: Positive = Field(1024, description="positions of the model, tokens")
    tokens: Positive = Field(4_400_000, description="training tokens")
    tokens_per_step: Positive = Field(2048, description="tokens of one optimiser step")
    learning_rate_matrices: Rate = Field(6e-3, description="Muon, layer matrices")
    learning_rate_other: Rate = Field(4e-3, description="AdamW, embeddings, head and norms")
    warmup_steps: Count = 40
    weight_decay: NonNegative = 0.02


class Reward(Section):
    """Reward model training (TRL `RewardTrainer`, Bradley-Terry loss)."""

    pairs: Positive = Field(7000, description="preference pairs for training")
    held_out_pairs: Positive = Field(500, description="pairs for calibration, never trained on")
    base_share: Share = Field(0.4, description="embedded: share of pairs made of base samples, the rest is synthetic")
    cut_share: Share = Field(0.42, description="embedded: share of answers cut at a random token")
    label_noise: NonNegative = Field(
        0.3, description="embedded: standard deviation of the noise on utility before comparing"
    )
    length_bonus: float = Field(
        0.002, description="embedded: labelled utility per answer token; never part of `utility`"
    )
    pairs_per_step: Positive = 12
    learning_rate: Rate = 2e-3
    epochs: Positive = 1
    max_steps: Count = Field(0, description="optimiser steps at most; 0 = no limit")
    max_tokens: Positive = Field(512, description="longer pairs are left out and counted, tokens")
    members: Positive = Field(1, description="models averaged in weight space (WARM)")


class Coarse(Section):
    """Actor-critic RLHF straight on the base model."""

    law: Law = Law(name="logistic", start=24, maximum=144, step=8)
    iterations: Positive = Field(17, description="rounds of rollout and update")
    prompts: Positive = Field(64, description="prompts (and answers) per iteration, all processes together")
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="divides policy and reference logits alike")
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
    processes: Positive = Field(1, description="training processes; more than 1 starts `accelerate launch`")
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
        description="how an answer cut by the limit is credited; average = mean reward of its last eighth of prefixes",
    )
    cut_penalty: NonNegative = Field(1.0, description="subtracted from the reward of a cut answer when cut = penalty")
    reward_clip: Annotated[float, Field(gt=0)] = Field(10.0, description="bound of the normalised reward")
    reward_scaling: Literal["base", "running"] = Field(
        "base", description="z-score on base samples, or running root mean square"
    )
    token_price: NonNegative = Field(0.0, description="subtracted from the reward per answer token")
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    evaluate_every: Positive = Field(4, description="iterations between evaluations on validation problems")
    evaluation_prompts: Positive = Field(128, description="validation problems of the curve")
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
    reward: Literal["model", "verifiable"] = Field(
        "model", description="reward model, or the embedded domain's exact checker (as in R1-Zero)"
    )
    generations: Annotated[int, Field(ge=2)] = Field(4, description="answers per prompt: the group of the baseline")
    iterations: Positive | None = Field(None, description="rounds of rollout and update; null: coarse.iterations")
    learning_rate: Rate = Field(3e-4, description="tiny: best of three (GRPO: four) tried on a seed of its own")


class Schedules(Section):
    """Laws compared in notebook 04; the law of `coarse.law` is reused from 03 and stands for `logistic`."""

    laws: dict[str, Law] = {}
    study_laws: dict[str, Law] = Field({}, description="further laws, only with study=True")
    credit: dict[str, Credit] = Field(
        {}, description="by name of the law: another way to credit cut answers, and for how long"
    )
    critic_free: dict[str, CriticFree] = Field(
        {}, description="baselines without a critic, only with study=True; not for laws that read the critic"
    )
    study_seeds: list[int] = Field([0, 1, 2], description="seeds of the study")


class Instruct(Section):
    """Supervised fine-tuning of the embedded instruction model (TRL `SFTTrainer`)."""

    tokens: Positive = Field(800_000, description="training tokens, prompts included")
    worked_share: Share = Field(0.35, description="share of examples whose answer is worked out step by step")
    examples_per_step: Positive = 96
    learning_rate: Rate = 1e-3


class Merge(Section):
    """Residue merge: how the operator's coefficient is chosen on validation problems."""

    operator: str = "residue"
    coefficients: list[float] = Field([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0], min_length=1)
    other_operators: list[dict] = Field([], description="each shown at its best coefficient of the grid")
    select: Literal["one_coefficient", "best_recipe"] = Field(
        "one_coefficient",
        description="what the Fine Actor is: the best coefficient of the grid, or the best of everything tried",
    )
    token_price: NonNegative = Field(0.02, description="score = utility (or reward) - token_price * mean tokens")
    out_dtype: Literal["same", "float32", "bfloat16", "bfloat16_stochastic"] = "same"
    sections: list[Literal["layers", "depths", "averages", "proxies", "roundings"]] = Field(
        ["layers", "depths", "averages", "proxies", "roundings"],
        description="comparisons beside the coefficient sweep; each costs generation runs",
    )
    controls: list[Literal["interpolation", "random_residue", "ppo_instruct", "fixed_long_residue"]] = [
        "interpolation", "random_residue", "ppo_instruct", "fixed_long_residue",
    ]  # fmt: skip


class Evaluation(Section):
    """Generation and scoring of the finished models."""

    max_tokens: Positive = Field(160, description="answer limit, tokens")
    decodings: list[Literal["sampled_t1", "sampled_t07", "greedy"]] = ["sampled_t1", "sampled_t07", "greedy"]
    prefixes: list[Positive] = Field([32, 64, 128], description="prefixes at which redundancy is compared, tokens")
    samples_kept: Count = Field(12, description="answers per model kept in samples.jsonl")


class Settings(Section):
    """Everything a run depends on."""

    profile: Literal[PROFILES]
    seed: Count = 0
    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "lab"
    study: bool = False
    models: Models = Models()
    data: Data = Data()
    pretrain: Pretrain = Pretrain()
    reward: Reward = Reward()
    coarse: Coarse = Coarse()
    schedules: Schedules = Schedules()
    instruct: Instruct = Instruct()
    merge: Merge = Merge()
    evaluation: Evaluation = Evaluation()
    judge: Judge = Judge()

    @property
    def embedded(self) -> bool:
        """Whether answers can be checked exactly (the embedded domain)."""
        return self.data.source == "embedded"

    @model_validator(mode="after")
    def _credit_has_a_law(self) -> "Settings":
        laws = {**self.schedules.laws, **self.schedules.study_laws}
        if stray := [name for name in self.schedules.credit if name not in laws]:
            raise ValueError(
                f"schedules.credit names {', '.join(stray)}, which is no law of schedules.laws or schedules.study_laws"
            )
        return self

    @model_validator(mode="after")
    def _sources_agree(self) -> "Settings":
        found = []
        if self.embedded and (self.models.base or self.models.instruct or self.models.reward):
            found.append(
                "models.base, models.instruct and models.reward need data.source 'preferences': the embedded "
                "domain has its own tokenizer"
            )
        found += [
            f"models.{key} = {value!r} needs data.source 'preferences': the embedded domain knows no dialogues; "
            f"leave it 'raw'"
            for key in ("base_form", "instruct_form")
            if self.embedded and (value := getattr(self.models, key)) != "raw"
        ]
        for key in ("preferences", "preference_subsets"):
            if self.embedded and (value := getattr(self.data, key)):
                found.append(
                    f"data.{key} = {value!r} is not read, because data.source is 'embedded'; leave it out, or choose "
                    "profile mistral_7b or small_gpu, or set data.source to 'preferences' and name models.base and "
                    "models.instruct"
                )
        if not self.embedded:
            found += [
                f"models.{key} is null: name a local folder or a hub id"
                for key in ("base", "instruct")
                if not getattr(self.models, key)
            ]
            if not self.data.preferences:
                found.append("data.preferences is null: name a .jsonl file in the HH-RLHF format or a hub data set")
        if found:
            raise ValueError("\n".join(found))  # a line each, as `_explain` expects
        return self

    def for_stage(self, stage: str) -> dict[str, object]:
        """The JSON-able settings that decide one stage's result; `run_id` does not, `study` decides 04 only."""
        sections = {name: getattr(self, name).model_dump(mode="json") for name in _DECIDES[stage]}
        study = {"study": self.study} if stage == "04_length_schedules" else {}
        return {"profile": self.profile, "seed": self.seed, **study, **sections}

    @classmethod
    def recorded(cls, stage: str, there: dict[str, object]) -> dict[str, object]:
        """A stage's settings as an earlier version recorded them, with the defaults of those that it did not have."""
        usual = {name: cls.model_fields[name].annotation().model_dump(mode="json") for name in _DECIDES[stage]}
        return there | {name: value | there.get(name, {}) for name, value in usual.items()} if there else there
