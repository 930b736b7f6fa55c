"""Reward: train it (TRL `RewardTrainer`), average it (WARM), ask it for whole answers and for every prefix.

Question: does the reward rank answers as intended, and how much does it like length? Inputs: preference pairs as
token ids. Outputs: a `*ForSequenceClassification` checkpoint and its normalisation. The score is read off the last
real token by explicit length, so a cut answer is scored as cut; being causal, one pass gives the reward of every
prefix. Any function `samples -> rewards` can take the reward model's place (see `RewardFunction`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from c2f_utils.domain.problems import check
from c2f_utils.domain.samples import Sample
from c2f_utils.errors import C2FError
from c2f_utils.limits import Law
from c2f_utils.models.loading import add_lora, device, disable_dropout, fuse_norms, pretrained
from c2f_utils.models.packing import collate, pack
from c2f_utils.rollout.anatomy import trunk_of
from c2f_utils.settings.config import Reward, Settings
from c2f_utils.settings.preflight import check_folder

Pair = tuple[list[int], list[int]]  # prompt + chosen answer, prompt + rejected answer


class RewardFunction(Protocol):
    """What the trainer asks for: one reward per sample, in any unit; `prefix_scores` is optional and feeds the tail
    laws."""

    def __call__(self, samples: Sequence[Sample]) -> Tensor: ...


@dataclass
class RewardModel:
    """A trained scalar model with the mean and deviation of its score on base samples; rewards are (score - mean) /
    std."""

    model: nn.Module
    pad_id: int
    mean: float = 0.0
    std: float = 1.0
    tokens_per_batch: int = 16_384

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        """Normalised rewards [B], float32, CPU."""
        return torch.stack([row[-1] for row in self.prefix_scores(samples)])

    @torch.no_grad()
    def prefix_scores(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Per sample the normalised reward after each answer token, [len(ids)] float32: what the reward had been,
        cut there."""
        scores: list[Tensor] = [torch.empty(0)] * len(samples)
        for group in pack([len(s.prompt.ids) + s.tokens for s in samples], self.tokens_per_batch):
            batch = collate([samples[i] for i in group], self.pad_id, self.model.score.weight.device)
            hidden = trunk_of(self.model)(input_ids=batch.ids, use_cache=False).last_hidden_state[
                batch.rows, batch.columns + 1
            ]
            flat = (self.model.score(hidden)[:, 0].float().cpu() - self.mean) / self.std
            for index, row in zip(group, batch.split(flat), strict=True):
                scores[index] = row
        return scores

    def normalised_on(self, samples: Sequence[Sample]) -> "RewardModel":
        """The same model with mean 0 and deviation 1 on these samples; raises C2FError if it gives them all the same
        score."""
        raw = self(samples) * self.std + self.mean
        if not torch.isfinite(raw).all():
            raise C2FError("the reward model gives non-finite scores on base samples; lower reward.learning_rate")
        if raw.std() < 1e-6:
            raise C2FError(
                "the reward model gives every base sample the same score; it has learnt nothing: more pairs or steps"
            )
        return RewardModel(self.model, self.pad_id, float(raw.mean()), float(raw.std()), self.tokens_per_batch)


def new_reward_model(source: str | Path, settings: Settings, seed: int) -> nn.Module:
    """The base model's trunk with a small scalar head (standard deviation 1/sqrt(d + 1)), dropout off.

    What will be trained is float32 whatever `models.dtype` is: all of it, or the head beside adapters.
    """
    check_folder(str(source), "models.base")
    torch.manual_seed(seed)
    model = _scorer(source, settings.models.dtype if settings.models.lora else "float32", num_labels=1)
    model.score.float()
    nn.init.normal_(model.score.weight, std=(model.score.weight.shape[1] + 1) ** -0.5)
    disable_dropout(model)
    return model.to(device(settings.models))


def _scorer(source: str | Path, dtype: str, **options: object) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    options |= {"dtype": getattr(torch, dtype), "use_safetensors": True}
    return pretrained(AutoModelForSequenceClassification, source, "reward model", **options)


def refuse_without_scores(config) -> None:
    """Raise C2FError for a model from which no reward model can be made, because the library has no scores for it."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise C2FError(
            f"models.base is a {config.model_type!r} model, of which the library has no sequence classifier: no reward "
            "model can be trained from it in notebook 02; name one with the same tokenizer as models.reward, or choose "
            "another base"
        )


def load_reward_model(
    source: str | Path, settings: Settings, pad_id: int, mean: float = 0.0, std: float = 1.0
) -> RewardModel:
    """A finished reward model; raises C2FError when the folder is no single-output model."""
    check_folder(str(source), "models.reward")
    model = _scorer(source, settings.models.dtype)
    if model.config.num_labels != 1 or not hasattr(model, "score"):
        raise C2FError(
            f"reward model {source} has {model.config.num_labels} outputs; expected one score per sequence "
            "(num_labels=1)"
        )
    disable_dropout(model)
    return RewardModel(fuse_norms(model.to(device(settings.models)).eval()), pad_id, mean, std)


def train(
    source: str | Path,
    pairs: Sequence[Pair],
    tokenizer,
    settings: Settings,
    order: int,
    log=lambda row: None,
    folder: Path | None = None,
    **watch: Callable,
) -> nn.Module:
    """Fit a reward model on pairs of full token sequences with TRL's `RewardTrainer` (Bradley-Terry loss).

    `order` seeds the order of the pairs; the initial head is that of `settings.seed`, so that members can be averaged.

    `folder` holds its checkpoints, from the newest of which it continues; `watch` may hold `stop` and `progress` of
    `course.run`. Pairs are handed over as `chosen_ids`/`rejected_ids` with `max_length=None`: given text, the trainer
    would append EOS to every answer, also to cut ones, and drop long pairs. `log` receives {"step", "loss"}. Raises
    C2FError without pairs, Stopped on request.
    """
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from c2f_utils.models import course
    from c2f_utils.models.library_trainers import arguments, quiet, trained

    if not pairs:
        raise C2FError("no preference pairs are left to train on; check data.preferences and reward.max_tokens")
    config: Reward = settings.reward
    with quiet():
        model = new_reward_model(source, settings, settings.seed)
    if settings.models.lora:
        model = add_lora(model, settings.models.lora, "SEQ_CLS", ["score"])
    dataset = Dataset.from_dict({"chosen_ids": [c for c, _ in pairs], "rejected_ids": [r for _, r in pairs]})
    steps = config.max_steps or -(-len(pairs) * config.epochs // config.pairs_per_step)
    options = RewardConfig(
        **arguments(steps, order, device(settings.models).type == "cpu", folder or ".", settings.models.dtype),
        per_device_train_batch_size=config.pairs_per_step,
        learning_rate=config.learning_rate,
        activation_checkpointing=settings.models.gradient_checkpointing,
    )
    with quiet():
        trainer = RewardTrainer(model=model, args=options, train_dataset=dataset, processing_class=tokenizer)
        course.run(trainer, "reward model", log, folder, **watch)
    return trained(trainer, settings.models.dtype)


def average(models: Sequence[nn.Module]) -> nn.Module:
    """Weight average of reward models that share an initial trunk (WARM, Rame et al. 2024); the first one is
    overwritten."""
    first, *others = models
    if others:
        states = [m.state_dict() for m in others]
        for name, value in first.state_dict().items():
            if value.is_floating_point():
                value.add_(sum(s[name] - value for s in states) / len(models))
    return first


class Verifiable:
    """The embedded domain's exact utility of every answer and of every prefix of it: a reward with a tail return."""

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        return verifiable(samples)

    def prefix_scores(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Per sample the utility after each token, [len(ids)]."""
        return [verifiable([replace(s, ids=s.ids[: k + 1]) for k in range(s.tokens)]) for s in samples]


def exact(law: Law, cut: str = "score") -> RewardFunction:
    """The exact utility as a reward; also of prefixes, which cost a check per token, where law or credit read them."""
    read = {"tail_return", "useful_length"} & set(law.needs) or cut == "average"
    return Verifiable() if read else verifiable


def verifiable(samples: Sequence[Sample]) -> Tensor:
    """The programmatic reward of the embedded domain (its exact utility), an R1-Zero-style alternative to a learnt
    reward; [B]."""
    if any(s.prompt.problem is None for s in samples):
        raise C2FError("the verifiable reward needs problems with known answers; hub data has none: use a reward model")
    return torch.tensor([check(s.prompt.problem, s.answer).utility for s in samples])
