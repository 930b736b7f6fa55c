"""Do a prompt and its answer fit into a model's positions? The one place of this rule."""

from collections.abc import Mapping
from functools import partial

UNLIMITED = 1 << 30  # tokens; for models without a limit of their own (ALiBi, recurrent layers)


def positions_of(config: object) -> int:
    """Tokens that a model can tell the places of, prompt and answer together.

    `config` is a model's configuration, as an object or as the content of config.json. A sliding window is no limit:
    whoever computes no windows (`rollout/decoder.py`) says so of itself.
    """
    if isinstance(config, Mapping):
        read = (config.get("text_config") or config).get
    else:
        read = partial(_attribute, config.get_text_config() if hasattr(config, "get_text_config") else config)
    return read("max_position_embeddings") or read("n_positions") or UNLIMITED


def _attribute(config: object, name: str) -> object:
    return getattr(config, name, None)


def beyond(prompt: int, limit: int, positions: int) -> str:
    """What is wrong with a prompt and an answer of up to `limit` tokens in so many positions; "" if nothing is."""
    if (needed := prompt + limit) <= positions:
        return ""
    return f"a prompt of {prompt} tokens with a limit of {limit} needs {needed} positions, the model has {positions}"
