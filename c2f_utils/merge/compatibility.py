"""Do three configs describe the same network? Weights merge only when the functions they parametrise are the same.

Every key counts unless it is known to be harmless: a new architecture's unknown key must not slip through. A key that
one side leaves out means that side's default; where the default is known it is compared, else it is only noted.
"""

from c2f_utils.merge.checkpoint import Checkpoint, token_ids

_HARMLESS = {
    "_name_or_path", "_attn_implementation", "architectures", "attention_dropout", "attn_pdrop", "auto_map",
    "bad_words_ids", "dropout", "dtype", "embd_pdrop", "finetuning_task", "hidden_dropout", "id2label",
    "initializer_range", "label2id", "classifier_dropout", "min_length", "pretraining_tp", "problem_type",
    "quantization_config", "reorder_and_upcast_attn", "resid_pdrop", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "use_cache", "vocab_size", "hidden_dropout_prob", "return_dict",
    "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder", "unsloth_version",
    "use_mambapy",
}  # fmt: skip
_NOTED = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_window_layers",
}
_DEFAULTS = {
    "attention_bias": False, "hidden_act": "silu", "mlp_bias": False, "partial_rotary_factor": 1.0, "rms_norm_eps":
    1e-6, "rope_scaling": None, "rope_theta": 10000.0, "use_sliding_window": False, "tie_encoder_decoder": False,
}  # fmt: skip


def normalised(config: dict) -> dict:
    """Write old and new spellings of the same setting alike: rope tables, sliding windows, head sizes."""
    flat = {key: value for key, value in config.items() if key not in _HARMLESS}
    rope = flat.pop("rope_parameters", None)
    if isinstance(rope, dict):
        rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        kind = rest.get("rope_type", rest.get("type", "default"))
        if flat.get("rope_theta") is None:
            flat["rope_theta"] = rope.get("rope_theta")
        if "partial_rotary_factor" in rope:
            flat.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        flat["rope_scaling"] = None if kind == "default" else rest
    scaling = flat.get("rope_scaling")
    if isinstance(scaling, dict):
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        rest = {key: value for key, value in scaling.items() if key not in ("rope_type", "type", "rope_theta")}
        flat["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **rest}
    mistral = config.get("model_type") == "mistral"
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if heads:
        flat.setdefault("num_key_value_heads", 8 if mistral else heads)
        if width and not flat.get("head_dim"):
            flat["head_dim"] = width // heads
    if flat.get("rope_theta") is None:
        flat.pop("rope_theta", None)
    if config.get("use_sliding_window") is False:
        flat["sliding_window"] = None
    elif "sliding_window" not in flat:
        flat["sliding_window"] = 4096 if mistral else None
    return flat


def compare_configs(
    instruct: Checkpoint, other: Checkpoint, allow: tuple[str, ...], problems: list[str], notes: list[str]
) -> None:
    """Append a problem for every setting that makes the two networks different functions."""
    if not instruct.config or not other.config:
        return
    left, right = normalised(instruct.config), normalised(other.config)
    for key in sorted(set(left) | set(right)):
        a, b = left.get(key, _DEFAULTS.get(key)), right.get(key, _DEFAULTS.get(key))
        if a == b or _close(a, b):
            continue
        text = f"config {key}: instruct has {a!r}, {other.label} has {b!r}"
        unknown_default = (key not in left or key not in right) and key not in _DEFAULTS
        if key in allow or key in _NOTED or unknown_default:
            notes.append(f"{text} ({'allowed' if key in allow else 'instruct counts'})")
        else:
            problems.append(
                f"{text}; the weights mean different functions: use models that agree, or allow: [{key}] if "
                f"you know better"
            )


def compare_tokenizers(instruct: Checkpoint, other: Checkpoint, problems: list[str], notes: list[str]) -> None:
    """Append a problem when a token that both tokenizers know has two ids: the same row would mean two things."""
    paths = [model.folder / "tokenizer.json" for model in (instruct, other)]
    if not all(path.exists() for path in paths) or paths[0].read_bytes() == paths[1].read_bytes():
        return
    left, right = token_ids(instruct.folder), token_ids(other.folder)
    if left is None or right is None:
        notes.append(f"the tokenizers of instruct and {other.label} differ and could not be compared")
        return
    moved = sorted(token for token in set(left) & set(right) if left[token] != right[token])
    if moved:
        first = moved[0]
        problems.append(
            f"tokenizer: {len(moved)} tokens have other ids in {other.label} than in instruct, first "
            f"{first!r} ({right[first]} and {left[first]}); "
            "use models with one tokenizer"
        )
    by_id = {number: token for token, number in left.items()}
    reused = sorted(number for token, number in right.items() if by_id.get(number, token) != token)
    if reused and not moved:
        first = reused[0]
        problems.append(
            f"tokenizer: id {first} is {by_id[first]!r} in instruct and another token in {other.label}; use "
            f"models with one tokenizer"
        )
    extra = len(set(right) - set(left))
    if extra and not reused:
        notes.append(
            f"{other.label} knows {extra} tokens that instruct does not; their rows follow the recipe's vocab rule"
        )


def _close(a: object, b: object) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
    return numbers and abs(a - b) <= 1e-9 * max(abs(a), abs(b))
