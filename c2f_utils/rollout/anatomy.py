"""The parts of a causal model, whatever its class calls them, seen through a PEFT wrapper."""

from torch import Tensor, nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, adapters in place; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk_of(model: nn.Module) -> nn.Module:
    """What turns token ids into last hidden states."""
    whole = unwrapped(model)
    trunk = whole.get_decoder()
    return whole.model if trunk is whole else trunk


def layers_of(trunk: nn.Module) -> nn.ModuleList:
    """The decoder layers of a trunk."""
    count = trunk.config.get_text_config().num_hidden_layers
    return next(m for m in trunk.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def output_weight(model: nn.Module) -> Tensor:
    """The output matrix [V, H] of a causal model, without adapters."""
    return unwrapped(model).get_output_embeddings().weight
