"""Do a prompt and its answer fit into a model's positions? The one place of this rule."""

from collections.abc import Mapping


def positions_of(config: object) -> int | None:
    """How many positions a model may use at once: its limit or its sliding window, whichever is smaller.

    `config` is a model's configuration, as an object or as the content of config.json; None where it names no limit.
    """

    def read(name: str) -> object:
        return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)

    positions = read("max_position_embeddings") or read("n_positions")
    window = read("sliding_window") if read("use_sliding_window") is not False else None
    return min(positions, window or positions) if isinstance(positions, int) else None


def beyond(prompt: int, limit: int, config: object) -> str:
    """What is wrong with a prompt and an answer of up to `limit`, in tokens, under this configuration; else ""."""
    positions, needed = positions_of(config), prompt + limit
    if positions is None or needed <= positions:
        return ""
    return f"a prompt of {prompt} tokens with a limit of {limit} needs {needed} positions, the model has {positions}"
