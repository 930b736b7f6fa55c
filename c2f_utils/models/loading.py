"""Loading, saving and wrapping of models: the causal language model, the actor-critic, the frozen reference.

Inputs: local folders or hub ids in Hugging Face format, safetensors only, no remote code. Which
classes can be sampled and trained is measured on the loaded model (`rollout/check.py`).
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from c2f_utils import weights
from c2f_utils.errors import C2FError
from c2f_utils.files import replacing
from c2f_utils.models.library_trainers import quiet
from c2f_utils.rollout.sampler import eos_ids
from c2f_utils.settings.config import Lora, Models
from c2f_utils.settings.preflight import check_folder, not_found


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


def pretrained(kind: type, source: str | Path, what: str, **options: object):
    """`kind.from_pretrained` of a folder or of a hub id with its revision (`owner/name@revision`), no remote code.

    Raises C2FError with the remedy when it cannot be loaded.
    """
    name, revision = weights.split(str(source))
    try:
        with quiet():
            return kind.from_pretrained(name, revision=revision, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if said := weights.remedy(error, str(source), revision):
            raise C2FError(f"{what} {source} cannot be loaded: {said}") from None
        raise C2FError(f"{what} {source} cannot be loaded: {weights.first_line(error)}{not_found(name)}") from error


def load_causal(source: str | Path, models: Models) -> nn.Module:
    """A causal language model in evaluation mode, dropout off, in `models.dtype` on the chosen device; C2FError when
    it cannot be loaded."""
    from transformers import AutoModelForCausalLM

    check_folder(str(source), "model")
    model = pretrained(AutoModelForCausalLM, source, "model", dtype=getattr(torch, models.dtype), use_safetensors=True)
    model.revision = weights.split(str(source))[1]
    disable_dropout(model)
    return fuse_norms(model.to(device(models)).eval())


def load_tokenizer(source: str | Path):
    """The tokenizer of a model, with EOS and with a PAD that is not EOS; embeddings are never resized.

    Without a PAD of its own the tokenizer borrows an existing id (`<unk>`, else BOS, else the first other id):
    padding is never read, it only must not look like the end of an answer.
    """
    from transformers import AutoTokenizer

    tokenizer = pretrained(AutoTokenizer, source, "tokenizer of")
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


def ends(source: str | Path, tokenizer) -> frozenset[int]:
    """Ids that end an answer of a model that is not loaded, as `sampler.eos_ids` has them of one that is."""
    from transformers import AutoConfig, GenerationConfig

    name, revision = weights.split(str(source))
    try:
        generation = GenerationConfig.from_pretrained(name, revision=revision)
    except OSError:  # it has none
        generation = None
    config = pretrained(AutoConfig, source, "configuration of")
    return eos_ids(tokenizer, SimpleNamespace(config=config, generation_config=generation))


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
    trained in full. Raises C2FError for targets that the model does not have: PEFT would leave them out, and with
    them, where projections are fused or experts are one tensor, most of the model."""
    from peft import LoraConfig, get_peft_model

    modules = dict(model.named_modules())
    if missing := [t for t in lora.targets if not any(f".{name}".endswith(f".{t}") for name in modules)]:
        linear = sorted({n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, nn.Linear)})
        raise C2FError(
            f"models.lora.targets names {', '.join(missing)}, which {type(model).__name__} does not have; its linear "
            f"layers are {', '.join(linear)}: set models.lora.targets to those that are to be adapted"
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.targets,
        lora_dropout=0.0,
        task_type=task,
        modules_to_save=also,
    )
    # With its commit, an adapter's base is found again where the hub's `main` has moved on.
    revision = getattr(model, "revision", None)
    return get_peft_model(model, config, autocast_adapter_dtype=not alike, revision=revision)


def save_model(model: nn.Module, tokenizer, folder: Path) -> None:
    """Save to `folder` atomically; adapters are saved as adapters (`adapter_model.safetensors`), full models as
    models. Raises CannotWrite when the disk is full."""
    with replacing(folder) as partial, quiet():
        model.save_pretrained(partial, safe_serialization=True)
        tokenizer.save_pretrained(partial)


def load_actor(folder: Path, models: Models, base: str | None = None) -> nn.Module:
    """Load a trained actor as one ordinary causal model: adapters are merged onto `base`, else onto the model and
    revision that they name."""
    folder = Path(folder)
    if not (folder / weights.ADAPTER_CONFIG).exists():
        return load_causal(folder, models)
    from peft import PeftConfig, PeftModel

    if base is None:
        said = PeftConfig.from_pretrained(str(folder))
        base = "@".join(filter(None, (said.base_model_name_or_path, said.revision)))
    return PeftModel.from_pretrained(load_causal(base, models), str(folder)).merge_and_unload().eval()


def digest(model: nn.Module) -> str:
    """SHA-256 of what a loaded model computes with: its weights by name, type and shape, and its configuration.

    Says of a model in memory, merged or adapted as it may be, whether it is another one; `weights.digest` is of files.
    """
    found = hashlib.sha256(json.dumps(weights.placeless(model.config.to_dict()), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model by name, as they are on disk, one after another, from one file or from shards; raises
    C2FError."""
    for path in weights.files(folder):
        with safe_open(path, framework="pt") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys())


def refuse_other_tokenizer(source: str, tokenizer) -> None:
    """Raise C2FError unless the reward model in `source` was trained with the actor's tokenizer.

    Two vocabularies of equal size would pass every shape check and score nonsense. A model saved without its
    tokenizer passes: nothing is known about it.
    """
    from transformers import AutoTokenizer

    try:
        other = pretrained(AutoTokenizer, source, "tokenizer of")
    except (C2FError, KeyError):
        return
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    token = next(t for t, _ in sorted((ours | theirs).items()) if ours.get(t) != theirs.get(t))
    raise C2FError(
        f"models.reward = {source!r} has another tokenizer than the base model: token {token!r} is "
        f"{theirs.get(token)} there and {ours.get(token)} here ({len(theirs)} and {len(ours)} tokens in all); name "
        "a reward model trained from the same base, or leave models.reward null to train one in notebook 02"
    )
