"""Loading, saving and wrapping of models: the causal language model, the actor-critic, the frozen reference.

Inputs: local folders or hub ids in Hugging Face format, safetensors only, no remote code. What is simplified: the
actor is a Llama-layout causal model; encoder-decoders are refused by the decoder.
"""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from c2f_utils.config import Lora, Models
from c2f_utils.errors import C2FError
from c2f_utils.packing import Batch
from c2f_utils.preflight import check_folder, not_found
from c2f_utils.training_log import quiet

CHUNKED_ABOVE = 4096  # vocabularies above this size never see full logits
CHUNK = 1024  # words whose logits exist at a time


def device(models: Models) -> torch.device:
    """The device to work on; raises C2FError when CUDA is asked for and absent.

    On CUDA beside bfloat16 weights, products of float32 matrices (heads, adapters) may use TF32 from here on: it
    holds every bfloat16 number exactly and sums in float32, and plain float32 is about ten times slower.
    """
    if models.device == "cuda" and not torch.cuda.is_available():
        raise C2FError(
            "models.device is 'cuda', but torch sees no GPU; install a CUDA build or set models.device to 'cpu'"
        )
    found = torch.device("cuda" if models.device != "cpu" and torch.cuda.is_available() else "cpu")
    if found.type == "cuda" and models.dtype == "bfloat16":
        torch.set_float32_matmul_precision("high")
    return found


def load_causal(source: str | Path, models: Models, revision: str | None = None) -> nn.Module:
    """A causal language model in evaluation mode, dropout off, in `models.dtype` on the chosen device; C2FError when
    it cannot be loaded."""
    from transformers import AutoModelForCausalLM

    check_folder(str(source), "model")
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                str(source),
                revision=revision,
                dtype=getattr(torch, models.dtype),
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise C2FError(
            f"model {source} cannot be loaded: {str(error).splitlines()[0]}; expected safetensors weights in "
            f"Hugging Face format{not_found(source)}"
        ) from error
    disable_dropout(model)
    return fuse_norms(model.to(device(models)).eval())


def load_tokenizer(source: str | Path, revision: str | None = None):
    """The tokenizer of a model, with EOS and with a PAD that is not EOS; embeddings are never resized.

    Without a PAD of its own the tokenizer borrows an existing id (`<unk>`, else BOS, else the first other id):
    padding is never read, it only must not look like the end of an answer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise C2FError(
            f"tokenizer of {source} cannot be loaded: {str(error).splitlines()[0]}{not_found(source)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise C2FError(
            f"the tokenizer of {source} has no EOS token; answers could never end. Set eos_token in its "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        candidates = (tokenizer.unk_token_id, tokenizer.bos_token_id, *range(4))
        tokenizer.pad_token_id = next(i for i in candidates if i is not None and i != tokenizer.eos_token_id)
    tokenizer.padding_side = "right"
    return tokenizer


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, or the first ratio would not be 1 and the KL would be noise."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def fuse_norms(model: nn.Module) -> nn.Module:
    """On a GPU, replace the library's RMS norms, half a dozen passes over the states each, by torch's single kernel.

    The weights are the same parameters under the same names; on the CPU nothing changes.
    """
    if _fusible(model):
        for parent in list(model.modules()):
            for name, norm in list(parent.named_children()):
                if type(norm).__name__ in ("MistralRMSNorm", "LlamaRMSNorm"):
                    fused = nn.RMSNorm(len(norm.weight), norm.variance_epsilon, device="meta")
                    fused.weight = norm.weight
                    setattr(parent, name, fused.train(norm.training))
    return model


def _fusible(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cuda"


def add_lora(
    model: nn.Module, lora: Lora, task: str = "CAUSAL_LM", also: list[str] | None = None, alike: bool = False
) -> nn.Module:
    """Wrap a model with fresh adapters, float32 or (`alike`) of the model's type; `also` names modules that are
    trained in full."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.targets,
        lora_dropout=0.0,
        task_type=task,
        modules_to_save=also,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=not alike)


def save_model(model: nn.Module, tokenizer, folder: Path) -> None:
    """Save to `folder` atomically; adapters are saved as adapters (`adapter_model.safetensors`), full models as
    models."""
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, safe_serialization=True)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def load_actor(folder: Path, models: Models) -> nn.Module:
    """Load a trained actor as one ordinary causal model: a folder with adapters is merged onto the base it names."""
    folder = Path(folder)
    if not (folder / "adapter_config.json").exists():
        return load_causal(folder, models)
    from peft import PeftConfig, PeftModel

    base = load_causal(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path, models)
    return PeftModel.from_pretrained(base, str(folder)).merge_and_unload().eval()


def trunk_and_head(model: nn.Module) -> tuple[nn.Module, Tensor]:
    """The decoder stack and the output matrix [V, H] of a causal model, seen through a PEFT wrapper."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.model, causal.lm_head.weight


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [N] (nats, float32) of `targets` under softmax(hidden W^T / temperature).

    The head computes in float32 whatever the trunk does. Large vocabularies go through TRL's chunked kernel, so that
    no [N, V] array exists in forward or backward.
    """
    if weight.shape[0] > CHUNKED_ABOVE:
        from trl.kernels import ChunkedLogProbFunction

        logps, entropy, *_ = ChunkedLogProbFunction.apply(
            hidden.float(), weight, None, targets, temperature, CHUNK, None, 1.0, ("entropy",)
        )
        return logps.float(), entropy.float()
    full = (F.linear(hidden.float(), weight.float()) / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(full.exp() * full).sum(-1)
    return full.gather(-1, targets[:, None])[:, 0], entropy


class Critic(nn.Module):
    """A value function: its own trunk (or none, when it reads the actor's) and a linear head in float32."""

    def __init__(self, hidden_size: int, trunk: nn.Module | None = None):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_reward(cls, reward_model: nn.Module, mean: float, std: float) -> "Critic":
        """Start as the normalised reward model: V(s) = (R(s) - mean) / std at every prefix s."""
        critic = cls(reward_model.config.hidden_size, copy.deepcopy(reward_model.model))
        with torch.no_grad():
            critic.head.weight.copy_(reward_model.score.weight.float() / std)
            critic.head.bias.fill_(-mean / std)
        return critic

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden.float())[..., 0]


class ActorCritic(nn.Module):
    """Actor and critic behind one trainable entry point, so that wrappers for distributed training always see the
    call."""

    def __init__(self, actor: nn.Module, critic: Critic):
        super().__init__()
        self.actor, self.critic = actor, critic
        # With adapters the reference is the actor itself with the adapters off; otherwise a frozen copy.
        adapters = hasattr(actor, "disable_adapter")
        self._frozen = (
            [] if adapters else [copy.deepcopy(actor).requires_grad_(False)]
        )  # a list hides it from parameters()

    @property
    def dtype(self) -> torch.dtype:
        """The type in which actor and reference compute."""
        return trunk_and_head(self.actor)[1].dtype

    def forward(
        self, batch: Batch, temperature: float = 1.0, actor: bool = True
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Log-probability, entropy and value of every answer token, each [N] float32; no [B, T, V] array is made.

        With `actor=False` only values are computed (critic warm-up and scoring).
        """
        shared = self.critic.trunk is None
        hidden = None
        if actor or shared:
            trunk, head = trunk_and_head(self.actor)
            hidden = trunk(input_ids=batch.ids, use_cache=False).last_hidden_state[batch.rows, batch.columns]
        states = hidden if shared else self._states(batch)[batch.rows, batch.columns]
        # While only the critic learns, a shared trunk must not: its weights are the actor's.
        values = self.critic(states if actor or not shared else states.detach())
        if not actor:
            return None, None, values
        return *token_logps(hidden, head, batch.targets, temperature), values

    @torch.no_grad()
    def final_values(self, batch: Batch) -> Tensor:
        """V after the last token of each row, [B]: what a cut answer is worth to the critic."""
        shared = self.critic.trunk is None
        states = (
            trunk_and_head(self.actor)[0](input_ids=batch.ids, use_cache=False).last_hidden_state
            if shared
            else self._states(batch)
        )
        return self.critic(states[torch.arange(len(batch.last)), batch.last])

    def _states(self, batch: Batch) -> Tensor:
        return self.critic.trunk(input_ids=batch.ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def reference_logps(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """Log-probabilities [N] under the frozen base policy, at the same temperature."""
        with self._reference() as reference:
            trunk, head = trunk_and_head(reference)
            hidden = trunk(input_ids=batch.ids, use_cache=False).last_hidden_state[batch.rows, batch.columns]
            return token_logps(hidden, head, batch.targets, temperature)[0]

    @contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        if self._frozen:
            yield self._frozen[0]
        else:
            with self.actor.disable_adapter():
                yield self.actor

    def recompute_activations(self) -> None:
        """Keep only layer inputs for the backward pass, in the trunks of actor and critic (gradient checkpointing).

        The library does so in training mode only; that mode changes nothing else, because dropout is off
        (`disable_dropout`).
        """
        for trunk in (self.actor, self.critic.trunk):
            if trunk is not None:
                trunk.gradient_checkpointing_enable({"use_reentrant": False})
                trunk.train()

    def compile_layers(self) -> None:
        """Compile the decoder layers that scoring and updates run through, one by one: they share their code.

        Fused kernels round at other places, and differently with and without gradients: a bfloat16 policy's first
        ratio is then near one, not exactly one.
        """
        # Variants of one layer: adapters on and off, with gradients and without, fixed and varying shapes.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for model in (self.actor, *self._frozen):
            for layer in trunk_and_head(model)[0].layers:
                layer.compile()
        for layer in self.critic.trunk.layers if self.critic.trunk is not None else ():
            layer.compile()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Named parameters that training changes; a checkpoint holds these and nothing else."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}
