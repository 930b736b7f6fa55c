"""The instruction model: supervised fine-tuning of the embedded base on concise answers (TRL `SFTTrainer`), or the
user's model.

Question: what does the Coarse Actor's residue get merged into? Two thirds of the examples are bare answers, one
third worked ones: the model must know that worked answers end, or the merge is a mere mixture of its parents.
"""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from c2f_utils.models.generated import generator
from c2f_utils.models.library_trainers import arguments, quiet
from c2f_utils.models.loading import device, disable_dropout, load_causal
from c2f_utils.settings.config import Settings


def train(
    source: str | Path,
    tokenizer,
    settings: Settings,
    log=lambda row: None,
    folder: Path | None = None,
    **watch: Callable,
) -> tuple[nn.Module, int]:
    """Fine-tune the base model at `source`; the loss counts answer tokens only. Returns the model and the number of
    examples.

    `folder` holds its checkpoints, from the newest of which it continues; `watch` may hold `stop` and `progress` of
    `course.run`. Raises Stopped on request.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from c2f_utils.models import course

    config = settings.instruct
    examples = list(generator(settings.data).instructions(config.tokens, config.worked_share, settings.seed))
    dataset = Dataset.from_dict(
        {
            "input_ids": [prompt + answer for prompt, answer in examples],
            "labels": [[-100] * len(prompt) + answer for prompt, answer in examples],
        }
    )
    model = load_causal(source, settings.models)
    steps = -(-len(examples) // config.examples_per_step)
    options = SFTConfig(
        **arguments(steps, settings.seed, device(settings.models).type == "cpu", folder or "."),
        per_device_train_batch_size=config.examples_per_step,
        learning_rate=config.learning_rate,
        activation_checkpointing=False,
    )
    with quiet():
        trainer = SFTTrainer(model=model, args=options, train_dataset=dataset, processing_class=tokenizer)
        disable_dropout(trainer.model)
        course.run(trainer, "instruction model", log, folder, **watch)
    return trainer.model.eval(), len(examples)
