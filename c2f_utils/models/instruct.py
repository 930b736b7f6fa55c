"""The instruction model: supervised fine-tuning of the embedded base on concise answers (TRL `SFTTrainer`), or the
user's model.

Question: what does the Coarse Actor's residue get merged into? Two thirds of the examples are bare answers, one
third worked ones: the model must know that worked answers end, or the merge is a mere mixture of its parents.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from c2f_utils.models.generated import generator
from c2f_utils.models.library_trainers import arguments, quiet, trained
from c2f_utils.models.loading import device, disable_dropout, load_causal
from c2f_utils.settings.config import Settings

Example = tuple[list[int], list[int]]  # token ids of a prompt and of its answer


def train(
    source: str | Path,
    tokenizer,
    settings: Settings,
    log=lambda row: None,
    folder: Path | None = None,
    **watch: Callable,
) -> tuple[nn.Module, int]:
    """Fine-tune the base model at `source` on the domain's instructions, once over; returns the model and the number
    of examples. `watch` is that of `fine_tune`."""
    given = examples(settings)
    return fine_tune(
        source, tokenizer, settings, given, settings.instruct.examples_per_step, log, folder, **watch
    ), len(given)


def examples(settings: Settings) -> list[Example]:
    """The concise examples that the embedded instruction model is made from."""
    config = settings.instruct
    return list(generator(settings.data).instructions(config.tokens, config.worked_share, settings.seed))


def fine_tune(
    source: str | Path,
    tokenizer,
    settings: Settings,
    examples: Sequence[Example],
    per_step: int,
    log=lambda row: None,
    folder: Path | None = None,
    *,
    passes: int = 1,
    what: str = "instruction model",
    **watch: Callable,
) -> nn.Module:
    """Fine-tune the model at `source` on examples, `per_step` at a time; the loss counts answer tokens only.

    `folder` holds its checkpoints, from the newest of which it continues; `watch` may hold `stop` and `progress` of
    `course.run`. Raises Stopped on request.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from c2f_utils.models import course

    dataset = Dataset.from_dict(
        {
            "input_ids": [[*prompt, *answer] for prompt, answer in examples],
            "labels": [[-100] * len(prompt) + answer for prompt, answer in examples],
        }
    )
    model = load_causal(source, settings.models.model_copy(update={"dtype": "float32"}))  # no masters: see `arguments`
    steps = passes * -(-len(examples) // per_step)
    options = SFTConfig(
        **arguments(steps, settings.seed, device(settings.models).type == "cpu", folder or ".", settings.models.dtype),
        per_device_train_batch_size=per_step,
        learning_rate=settings.instruct.learning_rate,
        activation_checkpointing=False,
    )
    with quiet():
        trainer = SFTTrainer(model=model, args=options, train_dataset=dataset, processing_class=tokenizer)
        disable_dropout(trainer.model)
        course.run(trainer, what, log, folder, **watch)
    return trained(trainer, settings.models.dtype)
