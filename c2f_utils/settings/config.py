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
from c2f_utils.settings.kinds import Count, Few, Items, Name, NonNegative, Positive, Rate, Section, Share
from c2f_utils.settings.retention_options import Retention, Safety, Sampling
from c2f_utils.settings.rlhf import Coarse, Schedules
from c2f_utils.settings.task_suites import Tasks
from c2f_utils.settings.tracking import Tracking
from c2f_utils.weights import count_of

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
    "07_evaluation": ("models", "data", "merge", "evaluation", "tasks", "retention", "sampling", "safety", "judge"),
    "08_report": (),
    "09_studies": (),
}

# Controls that go on training, in the form in which the base is prompted; the others are merges.
TRAINED_CONTROLS = (
    "ppo_instruct", "ppo_instruct_tokens", "parallel_average", "distilled", "shortest_correct", "filtered_sft",
    "base_correct",
)  # fmt: skip
# Of all controls those that need problems with known answers, or the embedded domain's instructions.
_EMBEDDED_CONTROLS = (
    "parallel_average", "distilled", "distilled_merge", "shortest_correct", "filtered_sft", "base_correct",
)  # fmt: skip

PAIR_ANSWER_TOKENS = 144  # embedded domain: longest answer of a preference pair


def trained_controls(controls: list[str]) -> set[str]:
    """Which trainings a choice of controls asks for; a merge into the distilled model asks for that model's."""
    merged = {"distilled"} if "distilled_merge" in controls else set()
    return merged | set(TRAINED_CONTROLS).intersection(controls)


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
    template_options: dict[str, bool | int | float | str] = Field(
        {}, description="variables given to chat templates, e.g. {enable_thinking: false}"
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
    domain: Literal["stories", "riddles"] = Field(
        "stories",
        description="embedded problems: stories, or half stories and half riddles, whose analysis only RL can find",
    )
    preferences: str | None = Field(None, description="HH-RLHF pairs: a .jsonl or .jsonl.gz file, or a hub data set id")
    preference_split: str = "train"
    preference_subsets: list[str] = Field(
        [], description="folders of a hub set or of a local copy of one, e.g. [harmless-base]; none = the whole set"
    )
    stop_strings: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="texts that end an answer, e.g. the next turn's header"
    )
    operations: tuple[Positive, Positive] = Field(
        (3, 5), description="fewest and most steps of an embedded problem", strict=False
    )
    vocabulary: Literal["small", "wide"] = Field(
        "small", description="words and numbers of embedded problems: 0 to 14, or 0 to 49 with many more words"
    )
    max_prompt_tokens: Positive = Field(64, description="longer prompts are left out and counted, tokens")
    train_prompts: Items = Field(2000, description="prompts that RLHF draws from, again and again if it asks more")
    validation_prompts: Items = Field(256, description="problems for choices such as the merge coefficient")
    test_prompts: Items = Field(256, description="problems for reported figures; disjoint from all others")

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
    max_positions: Annotated[int, Field(gt=0, le=2**17)] = Field(1024, description="positions of the model, tokens")
    tokens: Positive = Field(4_400_000, description="training tokens")
    tokens_per_step: Positive = Field(2048, description="tokens of one optimiser step")
    learning_rate_matrices: Rate = Field(6e-3, description="Muon, layer matrices")
    learning_rate_other: Rate = Field(4e-3, description="AdamW, embeddings, head and norms")
    warmup_steps: Count = 40
    weight_decay: NonNegative = 0.02

    @property
    def weights(self) -> int:
        """How many weights the model has, without its embeddings."""
        return count_of({
            "hidden_size": self.hidden_size, "num_attention_heads": self.heads, "intermediate_size":
            self.intermediate_size, "num_key_value_heads": self.key_value_heads, "num_hidden_layers": self.layers,
            "vocab_size": 0,
        })  # fmt: skip


class Reward(Section):
    """Reward model training (TRL `RewardTrainer`, Bradley-Terry loss)."""

    pairs: Items = Field(7000, description="preference pairs for training")
    held_out_pairs: Annotated[Items, Field(ge=2)] = Field(500, description="pairs for calibration, never trained on")
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
    members: Few = Field(1, description="models averaged in weight space (WARM)")


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
    sections: list[Literal["layers", "depths", "averages", "proxies", "roundings", "label_free"]] = Field(
        ["layers", "depths", "averages", "proxies", "roundings"],
        description="comparisons beside the coefficient sweep; each costs generation runs; label_free: what "
        "coefficient would be chosen without a checker",
    )
    controls: list[
        Literal[
            "interpolation", "coarse_interpolation", "random_residue", "fixed_long_residue", "ppo_instruct",
            "ppo_instruct_tokens", "parallel_average", "distilled", "distilled_merge", "shortest_correct",
            "filtered_sft", "base_correct",
        ]
    ] = Field(
        ["interpolation", "random_residue", "ppo_instruct", "fixed_long_residue"],
        description="simpler merges and the field's rivals, measured beside the merge in 07; notebook 06 says what "
        "each is",
    )  # fmt: skip


class Evaluation(Section):
    """Generation and scoring of the finished models."""

    max_tokens: Positive = Field(160, description="answer limit, tokens")
    decodings: list[Literal["sampled_t1", "sampled_t07", "greedy"]] = Field(
        ["sampled_t1", "sampled_t07", "greedy"], min_length=1
    )
    prefixes: list[Positive] = Field([32, 64, 128], description="prefixes at which redundancy is compared, tokens")
    samples_kept: Count = Field(12, description="answers per model kept in samples.jsonl")


class Settings(Section):
    """Everything a run depends on."""

    profile: Literal[PROFILES]
    seed: Count = 0
    run_id: Name = "lab"
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
    tasks: Tasks = Tasks()
    retention: Retention = Retention()
    sampling: Sampling = Sampling()
    safety: Safety = Safety()
    judge: Judge = Judge()
    tracking: Tracking = Tracking()  # decides no stage

    @property
    def embedded(self) -> bool:
        """Whether answers can be checked exactly (the embedded domain)."""
        return self.data.source == "embedded"

    @property
    def forced_models(self) -> tuple[str, ...]:
        """Models whose answers are also begun for them on the embedded domain; with kinds of problem the merge, too:
        there it may hold an analysis and not the habit of using it."""
        merge = ("fine",) if self.data.domain == "riddles" else ()
        return ("instruct", "base", *merge) if self.embedded else ()

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
        if self.data.domain == "riddles" and not self.embedded:
            found.append("data.domain = 'riddles' needs data.source 'embedded'; leave it out")
        if self.data.domain == "riddles" and self.data.vocabulary != "small":
            found.append("data.domain = 'riddles' has the small vocabulary's stories; set data.vocabulary to 'small'")
        if self.coarse.reward == "verifiable" and not self.embedded:
            found.append("coarse.reward = 'verifiable' needs problems with known answers; hub data has none: 'model'")
        for key in ("preferences", "preference_subsets"):
            if self.embedded and (value := getattr(self.data, key)):
                found.append(
                    f"data.{key} = {value!r} is not read, because data.source is 'embedded'; leave it out, or choose "
                    "profile mistral_7b or small_gpu, or set data.source to 'preferences' and name models.base and "
                    "models.instruct"
                )
        found += [
            f"merge.controls names {name!r}, which needs the embedded domain's problems and instructions (nobody knows "
            "elsewhere what is right and where an answer states it); leave it out"
            for name in self.merge.controls
            if name in _EMBEDDED_CONTROLS and not self.embedded
        ]
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
    def recorded(cls, there: dict[str, object], stage: str) -> dict[str, object]:
        """Settings of a stage as an earlier version recorded them, with the defaults of those that it did not have."""
        sections = _DECIDES.get(stage, ()) if there else ()
        usual = {name: cls.model_fields[name].annotation().model_dump(mode="json") for name in sections}
        return there | {name: value | there.get(name, {}) for name, value in usual.items()}
