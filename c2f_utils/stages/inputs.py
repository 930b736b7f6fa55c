"""What a stage works on: models and prompts of the earlier stages, loaded when first asked for."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from c2f_utils import weights
from c2f_utils.coarse.heads import Head
from c2f_utils.domain import forms
from c2f_utils.domain.forms import Form
from c2f_utils.domain.problems import Split
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import C2FError, Stopped
from c2f_utils.files import write_text
from c2f_utils.measure.answers import answers
from c2f_utils.models import loading, rewards
from c2f_utils.models.generated import generator
from c2f_utils.models.loading import refuse_other_tokenizer
from c2f_utils.models.packing import collate
from c2f_utils.notebook.interrupt import stopping
from c2f_utils.rollout.check import Agreement, agree
from c2f_utils.rollout.choice import choose
from c2f_utils.rollout.sampler import Sampler
from c2f_utils.runs.run import Run
from c2f_utils.runs.stage import Stage
from c2f_utils.settings.config import Coarse, Models, Settings
from c2f_utils.stages import data

CHECKPOINTS = "checkpoints"  # folder in a stage's


class Inputs:
    """Models, tokenizer and prompts for one run; a missing earlier stage is an error that names the notebook to run."""

    def __init__(self, run: Run):
        self.run, self.settings = run, run.settings
        self._prompts: dict[tuple, list[Prompt]] = {}
        for path, digest in data.checksum(run.settings).items():
            run.here.add_input(f"data:{path}", digest)

    @cached_property
    def base_source(self) -> str:
        """Folder of the base model, or its hub id and commit."""
        return self._named("base") or str(self.run.parent("01_base_model").model())

    @cached_property
    def instruct_source(self) -> str:
        return self._named("instruct") or str(self.run.parent("05_instruction_model").model())

    @cached_property
    def reward_source(self) -> str:
        return self._named("reward") or str(self.run.parent("02_reward_model").model())

    @cached_property
    def coarse_source(self) -> str:
        return str(self.run.parent("03_coarse_rlhf").model())

    def _named(self, role: str) -> str | None:
        """The model that the settings name for a role, a hub id with its commit; its identity is an input."""
        models = self.settings.models
        if getattr(models, role) is None:
            return None
        source = weights.pinned(getattr(models, role), getattr(models, f"{role}_revision"), f"models.{role}")
        self.run.use_weights(role, weights.identity(source))
        if found := weights.reading(source):
            self.run.use_reading(role, found)
        return source

    @cached_property
    def tokenizer(self):
        """The base's tokenizer, in which answers are scored; C2FError when it lacks the template it is asked for."""
        return fitted_tokenizer(self.base_source, "base", self.settings.models)

    @cached_property
    def instruct_tokenizer(self):
        """The instruction model's own tokenizer, of its chat template; C2FError as for the base's."""
        return fitted_tokenizer(self.instruct_source, "instruct", self.settings.models)

    def refuse_instruct_template(self) -> None:
        """Raise C2FError where the tokenizer of the user's instruction model is refused; it is no input by this."""
        models = self.settings.models
        if models.instruct:
            source = weights.pinned(models.instruct, models.instruct_revision, "models.instruct")
            fitted_tokenizer(source, "instruct", models)

    @property
    def instruct_forms(self) -> list[Form]:
        """The forms in which instruction models are measured: that of the settings, then the other one, if there is a
        template."""
        form = self.settings.models.instruct_form
        if not self.instruct_tokenizer.chat_template:
            return [form]
        return [form, "raw" if form == "template" else "template"]

    def base(self) -> nn.Module:
        """A fresh copy of the base model; callers may train it."""
        return loading.load_causal(self.base_source, self.settings.models)

    def instruct(self) -> nn.Module:
        return loading.load_causal(self.instruct_source, self.settings.models)

    def coarse(self) -> nn.Module:
        """The Coarse Actor as one ordinary model (adapters merged)."""
        return loading.load_actor(Path(self.coarse_source), self.settings.models, self.base_source)

    @cached_property
    def reward(self) -> rewards.RewardModel:
        """The reward model with the normalisation that notebook 02 measured on base samples."""
        found = self.run.parent("02_reward_model").results()
        if self.settings.models.reward:
            refuse_other_tokenizer(self.reward_source, self.tokenizer)
        return rewards.load_reward_model(
            self.reward_source, self.settings, self.tokenizer.pad_token_id, found["mean"], found["std"]
        )

    def prompts(self, split: Split, count: int | None = None, seed: int | None = None) -> list[Prompt]:
        """Prompts of a split, tokenised once; the default counts and seed are those of the settings."""
        key = split, count or getattr(self.settings.data, f"{split}_prompts"), seed
        if key not in self._prompts:
            self._prompts[key] = data.prompts(self.settings, split, key[1], self.tokenizer, seed)
        return list(self._prompts[key])

    def answers(
        self,
        model: nn.Module,
        prompts: list[Prompt],
        decoding: str = "sampled_t1",
        limit: int | None = None,
        form: Form | None = None,
    ) -> list[Sample]:
        """One answer per prompt under the evaluation's limit (tokens) and this run's seed.

        Without a `form` it is the base's. With one, and a chat template on either side, the prompts are put in that
        form with the instruction model's tokenizer, and the answers are handed back as answers to `prompts`, so that
        they can be scored beside all others.
        """
        samples, base = self.sampled(model, prompts, form, decoding, limit), self.settings.models.base_form
        if not self._templated(form):
            return samples
        return [self._as_answer_to(p, s, base) for p, s in zip(prompts, samples, strict=True)]

    def sampled(
        self,
        model: nn.Module,
        prompts: list[Prompt],
        form: Form | None = None,
        decoding: str = "sampled_t1",
        limit: int | None = None,
    ) -> list[Sample]:
        """The same answers as the model read the prompts and chose its tokens, not brought back into the base's
        form."""
        limit = limit or self.settings.evaluation.max_tokens
        tokenizer, prompts = self.asked(prompts, form)
        given = self.settings.seed, self.stop_strings(form), self.settings.coarse.tokens_in_cache
        return answers(model, tokenizer, prompts, decoding, limit, *given)

    def asked(self, prompts: list[Prompt], form: Form | None) -> tuple[object, list[Prompt]]:
        """The tokenizer of this form, and the prompts as a model reads them in it."""
        if not self._templated(form):
            return self.tokenizer, prompts
        own = self.instruct_tokenizer
        return own, [replace(p, ids=tuple(forms.prompt_ids(p.text, form, own))) for p in prompts]

    def _templated(self, form: Form | None) -> bool:
        """Whether a chat template on either side makes prompts of this form others than the base's."""
        return form is not None and "template" in (self.settings.models.base_form, form)

    def text(self, ids: Sequence[int]) -> str:
        """What token ids of an answer say, without special tokens."""
        if self.settings.embedded:
            return generator(self.settings.data).vocabulary.decode(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def stop_strings(self, form: Form | None = None) -> list[str]:
        """The texts that end an answer in this form (default: the base's)."""
        return forms.stop_strings(form or self.settings.models.base_form, self.settings.data.stop_strings)

    def _as_answer_to(self, prompt: Prompt, sample: Sample, form: Form) -> Sample:
        # In transcripts a space follows the header that a template's answers do not begin with.
        text = f" {sample.text.strip()}"
        ids = forms.answer_ids(text, prompt.text, form, self.tokenizer)
        ids += [] if sample.cut and ids else [self.tokenizer.eos_token_id]
        return replace(sample, prompt=prompt, ids=ids, text=text)

    def sampler(self, model: nn.Module, config: Coarse, longest: int) -> Sampler:
        """What answers in training; `longest` are the tokens of the longest prompt and its limit together."""
        if config.engine == "vllm" and loading.device(self.settings.models).type != "cuda":
            raise C2FError("coarse.engine = 'vllm', but torch sees no GPU; set it to 'kv'")
        stop_strings, memory = self.stop_strings(), config.engine_memory
        return choose(model, self.tokenizer, config.tokens_in_cache, stop_strings, config.engine, longest, memory)

    def self_check(self, model: nn.Module, sampler: Sampler, prompts: list[Prompt], head: Head) -> Agreement | None:
        """That sampler, trainer and the model's own forward agree on some prompts; raises C2FError if not."""
        device, pad = loading.device(self.settings.models), self.tokenizer.pad_token_id

        def score(answers: list[Sample]) -> Tensor:
            return head.score(model, collate(answers, pad, device, sampled=True))

        return agree(model, sampler, prompts, score)


def fitted_tokenizer(source: str, role: Literal["base", "instruct"], models: Models):
    """The tokenizer of a model, with the options of its chat template; C2FError when its template is missing and asked
    for, can do what the settings leave open, or ends an answer in what is no end for the model."""
    found, form = loading.load_tokenizer(source), getattr(models, f"{role}_form")
    forms.refuse_missing(form, found, f"models.{role}_form")
    # 07 measures an instruction model in its template whatever its form is.
    if form == "template" or (role == "instruct" and found.chat_template):
        forms.refuse_undecided(found, models.template_options)
        forms.refuse_endless(found, loading.ends(source, found))
        forms.set_options(found, models.template_options)
    return found


@contextmanager
def stopped_here(stage: Stage) -> Iterator[None]:
    """Let a stop on request, an interrupt among them, end the stage as `stopped`, from which it continues."""
    try:
        with stopping(stage):
            yield
    except Stopped:
        stage.stop()
        raise


def keep_samples(stage: Stage, table: list[dict], settings: Settings) -> None:
    """Replace a stage's samples.jsonl by the first `samples_kept` answers of each model and decoding."""
    seen: dict[tuple, int] = {}
    lines = []
    for row in table:
        key = (row["model"], row["decoding"])
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= settings.evaluation.samples_kept:
            lines.append(json.dumps(row, ensure_ascii=False))
    write_text(stage.path("samples.jsonl"), "".join(line + "\n" for line in lines))
