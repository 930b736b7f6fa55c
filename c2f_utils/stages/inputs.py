"""What a stage works on: models and prompts of the earlier stages, loaded when first asked for."""

import json
from functools import cached_property
from pathlib import Path

from torch import nn

from c2f_utils.coarse.heads import Head
from c2f_utils.domain import stories
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.files import write_text
from c2f_utils.measure.answers import answers
from c2f_utils.models import loading, rewards
from c2f_utils.models.loading import refuse_other_tokenizer
from c2f_utils.models.packing import collate
from c2f_utils.rollout.check import Agreement, agree
from c2f_utils.rollout.choice import choose
from c2f_utils.rollout.sampler import Sampler
from c2f_utils.runs.run import Run
from c2f_utils.settings.config import Coarse, Settings
from c2f_utils.stages import data

TRAIN_PROMPTS = 2000


class Inputs:
    """Models, tokenizer and prompts for one run; a missing earlier stage is an error that names the notebook to run."""

    def __init__(self, run: Run):
        self.run, self.settings = run, run.settings
        for path, digest in data.checksum(run.settings).items():
            run.here.add_input(f"data:{path}", digest)

    @cached_property
    def base_source(self) -> str:
        """Folder or hub id of the base model."""
        return self.settings.models.base or str(self.run.parent("01_base_model").dir / "model")

    @cached_property
    def instruct_source(self) -> str:
        return self.settings.models.instruct or str(self.run.parent("05_instruction_model").dir / "model")

    @cached_property
    def coarse_source(self) -> str:
        return str(self.run.parent("03_coarse_rlhf").dir / "model")

    @cached_property
    def tokenizer(self):
        return loading.load_tokenizer(self.base_source, self.settings.models.base_revision)

    def base(self) -> nn.Module:
        """A fresh copy of the base model; callers may train it."""
        return loading.load_causal(self.base_source, self.settings.models, self.settings.models.base_revision)

    def instruct(self) -> nn.Module:
        return loading.load_causal(self.instruct_source, self.settings.models)

    def coarse(self) -> nn.Module:
        """The Coarse Actor as one ordinary model (adapters merged)."""
        return loading.load_actor(Path(self.coarse_source), self.settings.models)

    @cached_property
    def reward(self) -> rewards.RewardModel:
        """The reward model with the normalisation that notebook 02 measured on base samples."""
        stage = self.run.parent("02_reward_model")
        found = stage.results()
        source = self.settings.models.reward or stage.dir / "model"
        if self.settings.models.reward:
            refuse_other_tokenizer(source, self.tokenizer)
        return rewards.load_reward_model(
            source, self.settings, self.tokenizer.pad_token_id, found["mean"], found["std"]
        )

    def prompts(self, split: stories.Split, count: int | None = None, seed: int | None = None) -> list[Prompt]:
        """Prompts of a split; the default counts and seed are those of the settings."""
        sizes = {
            "train": TRAIN_PROMPTS,
            "validation": self.settings.data.validation_prompts,
            "test": self.settings.data.test_prompts,
        }
        return data.prompts(self.settings, split, count or sizes[split], self.tokenizer, seed)

    def answers(
        self, model: nn.Module, prompts: list[Prompt], decoding: str = "sampled_t1", limit: int | None = None
    ) -> list[Sample]:
        """One answer per prompt under the evaluation's limit (tokens) and this run's seed."""
        limit = limit or self.settings.evaluation.max_tokens
        return answers(
            model, self.tokenizer, prompts, decoding, limit, self.settings.seed, self.settings.data.stop_strings
        )

    def sampler(self, model: nn.Module, config: Coarse, longest: int) -> Sampler:
        """What answers in training; `longest` are the tokens of the longest prompt and its limit together."""
        return choose(
            model, self.tokenizer, config.tokens_in_cache, self.settings.data.stop_strings, config.engine, longest
        )

    def self_check(self, model: nn.Module, sampler: Sampler, prompts: list[Prompt], head: Head) -> Agreement | None:
        """That sampler, trainer and the model's own forward agree on some prompts; raises C2FError if not."""
        device, pad = loading.device(self.settings.models), self.tokenizer.pad_token_id
        return agree(model, sampler, prompts, lambda answers: head.score(model, collate(answers, pad, device)))


def keep_samples(stage, table: list[dict], settings: Settings) -> None:
    """Replace a stage's samples.jsonl by the first `samples_kept` answers of each model and decoding."""
    seen: dict[tuple, int] = {}
    lines = []
    for row in table:
        key = (row["model"], row["decoding"])
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= settings.evaluation.samples_kept:
            lines.append(json.dumps(row, ensure_ascii=False))
    write_text(stage.path("samples.jsonl"), "".join(line + "\n" for line in lines))
