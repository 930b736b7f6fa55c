"""Pretraining of the embedded base model: a real `MistralForCausalLM` checkpoint in about two minutes of one CPU core,
or a larger one on a GPU.

Inputs: `settings.pretrain`, the document generator. Outputs: `model/` (safetensors, config, tokenizer) and the loss
curve. Step-by-step arithmetic appears as a phase transition that depends on the number of updates more than on
tokens, hence small steps (about 2,000 tokens) and Muon (momentum orthogonalised by Newton-Schulz iterations; Jordan
et al. 2024) on the layer matrices, AdamW on the rest. Simplified: no packing across documents (a batch holds
documents of similar length).
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from c2f_utils.domain import stories
from c2f_utils.domain.problems import BOS, EOS, PAD
from c2f_utils.errors import Stopped
from c2f_utils.files import UNPARSABLE, replacing
from c2f_utils.models.generated import generator
from c2f_utils.models.loading import device, fuse_norms
from c2f_utils.settings.config import Pretrain, Settings


def new_model(config: Pretrain, seed: int, words: int = len(stories.VOCABULARY)) -> nn.Module:
    """A randomly initialised Mistral-layout model of a vocabulary of so many words, float32, on the CPU."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    return MistralForCausalLM(MistralConfig(
        vocab_size=words, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.key_value_heads,
        max_position_embeddings=config.max_positions, sliding_window=None, tie_word_embeddings=False,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    ))  # fmt: skip


def batches(documents: Iterable[list[int]], tokens_per_step: int, seed: int) -> Iterator[Tensor]:
    """Right-padded token batches [B, T] of about `tokens_per_step` tokens, documents of similar length together."""
    rng = random.Random(f"batches-{seed}")
    pool: list[list[int]] = []
    for document in documents:
        pool.append(document)
        if len(pool) == 512:
            yield from _bucket(pool, tokens_per_step, rng)
            pool = []
    yield from _bucket(pool, tokens_per_step, rng)


def _bucket(pool: list[list[int]], budget: int, rng: random.Random) -> list[Tensor]:
    pool.sort(key=len)
    groups: list[list[list[int]]] = [[]]
    for document in pool:
        if groups[-1] and (len(groups[-1]) + 1) * len(document) > budget:
            groups.append([])
        groups[-1].append(document)
    rng.shuffle(groups)
    return [
        nn.utils.rnn.pad_sequence([torch.tensor(d) for d in group], batch_first=True, padding_value=PAD)
        for group in groups
        if group
    ]


def optimisers(model: nn.Module, config: Pretrain) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, head and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    return [
        torch.optim.Muon(
            matrices,
            lr=config.learning_rate_matrices,
            momentum=0.95,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=config.learning_rate_other, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def schedule(progress: float) -> float:
    """Learning-rate factor: constant for the first half, then linear to 5 %."""
    return 1.0 if progress < 0.5 else 1.0 - 0.95 * (progress - 0.5) / 0.5


def precision(place: torch.device) -> AbstractContextManager:
    """On a GPU products in bfloat16 beside float32 weights; on a CPU plain float32."""
    # Not TF32: that switch is the whole process's, and RLHF's self-check compares log-probabilities to 1e-4 nats.
    return torch.autocast("cuda", torch.bfloat16) if place.type == "cuda" else nullcontext()


def pretrain(
    settings: Settings,
    log=lambda row: None,
    checkpoint: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> nn.Module:
    """Train a new base model; `log` receives {"step", "tokens", "loss" (nats per token), "lr"} about 100 times,
    `progress` the tokens seen and all tokens.

    Continues from the file `checkpoint`, if given, as `train` does.
    """
    config = settings.pretrain
    made = generator(settings.data)
    documents = made.documents(config.tokens, settings.seed)
    model = new_model(config, settings.seed, len(made.vocabulary.words))
    model = fuse_norms(model.to(device(settings.models)))
    return train(model, documents, config, settings.seed, log, checkpoint, stop, progress)


@dataclass
class _Course:
    """Where training stands, besides weights and optimisers."""

    step: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)  # since the last row
    rows: list[dict] = field(default_factory=list)

    def save(self, path: Path, model: nn.Module, groups: list[torch.optim.Optimizer]) -> None:
        """One file, so that it is there whole or not at all."""
        arrays = {f"model/{name}": value for name, value in model.state_dict().items()}
        for number, optimiser in enumerate(groups):
            for index, values in optimiser.state_dict()["state"].items():
                arrays |= {f"{number}/{index}/{name}": value for name, value in values.items()}
        arrays = {name: value.detach().contiguous() for name, value in arrays.items()}
        with replacing(path) as partial:
            save_file(arrays, partial, {"course": json.dumps(vars(self))})

    @classmethod
    def load(cls, path: Path, model: nn.Module, groups: list[torch.optim.Optimizer]) -> "_Course":
        """What was saved, put into model and optimisers; the beginning where there is none, or a damaged one."""
        if not path.exists():
            return cls()
        try:
            with safe_open(path, "pt") as stored:
                course = cls(**json.loads(stored.metadata()["course"]))
                arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, LookupError, TypeError, *UNPARSABLE) as error:
            print(f"checkpoint {path} is passed over: {error}")
            return cls()
        model.load_state_dict(
            {name.removeprefix("model/"): v for name, v in arrays.items() if name.startswith("model/")}
        )
        for number, optimiser in enumerate(groups):
            whole = optimiser.state_dict()
            for key in [name for name in arrays if name.startswith(f"{number}/")]:
                _, index, name = key.split("/")
                whole["state"].setdefault(int(index), {})[name] = arrays[key]
            optimiser.load_state_dict(whole)
        return course


def train(
    model: nn.Module,
    documents: Iterable[list[int]],
    config: Pretrain,
    seed: int,
    log=lambda row: None,
    checkpoint: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> nn.Module:
    """Train `model` where it is on `documents` (token ids, about `config.tokens` in all, which sets the learning rates'
    decay).

    With a file `checkpoint` it is written every minute and continued from. Raises Stopped, with a checkpoint written,
    when `stop` says so before the last step.
    """
    from c2f_utils.models.course import EVERY  # imports the library's trainer

    model.train()
    place = next(model.parameters()).device
    groups = optimisers(model, config)
    initial = [[g["lr"] for g in o.param_groups] for o in groups]
    every = max(1, config.tokens // config.tokens_per_step // 100)
    course = _Course.load(checkpoint, model, groups) if checkpoint else _Course()
    for row in course.rows:
        log(row)
    done, tokens, saved = course.step, course.tokens, monotonic()
    losses: list[Tensor] = [torch.tensor(loss, device=place) for loss in course.losses]
    for step, batch in enumerate(batches(documents, config.tokens_per_step, seed), start=1):
        if step <= done:
            continue
        stopping = stop()
        if checkpoint and (stopping or monotonic() - saved >= EVERY):
            _Course(step - 1, tokens, [loss.item() for loss in losses], course.rows).save(checkpoint, model, groups)
            saved = monotonic()
        if stopping:
            raise Stopped(f"pretraining: stopped after step {step - 1}; run again to continue")
        factor = schedule(tokens / config.tokens) * min(1.0, step / max(1, config.warmup_steps))
        for optimiser, rates in zip(groups, initial, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        tokens += int((batch != PAD).sum())  # on the CPU: counted there, a GPU would be waited for
        batch = batch.to(place)
        with precision(place):
            # Right padding needs no mask in a causal model: no real token ever sees it.
            logits = model(batch[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=PAD)
        loss.backward()
        for optimiser in groups:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step % every == 0:
            loss = round(torch.stack(losses).mean().item(), 5)
            course.rows.append({"step": step, "tokens": tokens, "loss": loss, "lr": groups[0].param_groups[0]["lr"]})
            log(course.rows[-1])
            losses = []
        progress(min(tokens, config.tokens - 1), config.tokens)  # documents may be a little more
    progress(config.tokens, config.tokens)
    return model.eval()
