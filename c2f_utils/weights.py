"""A model on disk: which files hold its weights, what tells them from others, how many there are, and where the hub
keeps them. Needs no torch.

A source is a folder, a hub id `owner/name`, or a hub id with its revision, `owner/name@revision`. The identity of a
folder is `sha256:...` over its weights and configuration, that of a hub model `commit:...`. What the local cache holds
under a revision counts before what the hub holds now: so one machine sees one model, also without a network.
"""

import hashlib
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from c2f_utils.errors import C2FError
from c2f_utils.files import UNPARSABLE, sha256

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEADER_LIMIT = 100_000_000  # bytes; as in the reference implementation: no lying length exhausts the memory
WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
# What a model is read and ended with, beside its weights and configuration.
READ_WITH = frozenset((
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v3",
    "tekken.json", "spiece.model", "sentencepiece.bpe.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "chat_template.jinja", "generation_config.json",
))  # fmt: skip
_PLACES = ("_name_or_path", "base_model_name_or_path")  # where a model once lay says nothing about what it is

_seen: dict[tuple, str] = {}  # SHA-256 by path, size, times and inode: a file is read once per process


def is_hub(source: str) -> bool:
    """Whether a source, with or without `@revision`, names a model of the hub: one slash, and no such path."""
    name = source.partition("@")[0]
    return name.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()


def split(source: str) -> tuple[str, str | None]:
    """A source without its revision, and the revision; a folder has none."""
    name, _, revision = source.partition("@") if is_hub(source) else (source, "", "")
    return name, revision or None


def files(folder: Path) -> list[Path]:
    """The files that a model's weights are read from, in the order of their names: of an index its shards.

    Raises C2FError for shards that are missing, and where one file and an index both claim to be the model.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            raise C2FError(f"{folder} holds both {SINGLE} and {INDEX}; one is stale: remove it")
        try:
            shards = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, LookupError, AttributeError, TypeError, *UNPARSABLE) as error:
            raise C2FError(f"{folder / INDEX} is damaged ({error}); copy it again from the model's source") from None
        if strange := [name for name in shards if not is_shard(name)]:
            raise C2FError(f"{folder / INDEX} names {strange[0]!r} as a shard; expected plain *.safetensors names")
        if missing := [name for name in shards if not (folder / name).is_file()]:
            raise C2FError(f"{folder} lacks {len(missing)} of {len(shards)} shards, first {missing[0]}; copy it again")
        return [folder / name for name in shards]
    whole = [folder / name for name in (SINGLE, ADAPTER) if (folder / name).is_file()]
    return whole[:1] or sorted(folder.glob("*.safetensors"))


def is_shard(name: object) -> bool:
    """Whether an index may name this file: weights in the folder itself, nothing elsewhere and nothing else."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def digest(folder: Path) -> str:
    """SHA-256 over the SHA-256 of every weight file and the configuration, 64 hex digits.

    The files are read whole, several at a time, and once per process while they stay as they are.
    """
    folder = Path(folder)
    if not (found := files(folder)):
        raise C2FError(f"{folder} holds no safetensors weights; copy them again from the model's source")
    with ThreadPoolExecutor(max_workers=4) as pool:
        lines = [f"{path.name} {value}" for path, value in zip(found, pool.map(_digest, found), strict=True)]
    for name in ("config.json", ADAPTER_CONFIG):
        if (folder / name).is_file():
            lines.append(f"{name} {json.dumps(placeless(_read(folder / name)), sort_keys=True)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def record(folder: Path) -> dict[str, object]:
    """What is kept of a model that was written: its `sha256` and the `bytes` of its weight files."""
    return {"sha256": digest(folder), "bytes": _size(folder)}


def altered(folder: Path, known: dict[str, object]) -> str | None:
    """What differs from the record of the model when it was written, in words; None if nothing does."""
    if (there := _size(folder)) != known["bytes"]:
        return f"holds {there} bytes of weights, {known['bytes']} were written"
    if (now := digest(folder)) != known["sha256"]:
        return f"holds other weights than were written ({now[:12]}, not {known['sha256'][:12]})"
    return None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def _digest(path: Path) -> str:
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    if key not in _seen:
        _seen[key] = sha256(path)
    return _seen[key]


def placeless(config: object) -> object:
    """A configuration without places, and lists of names in order: PEFT writes its sets in another order every time."""
    if isinstance(config, dict):
        return {key: placeless(value) for key, value in config.items() if key not in _PLACES}
    names = isinstance(config, list) and all(isinstance(item, str) for item in config)
    return sorted(config) if names else config


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, *UNPARSABLE) as error:
        raise C2FError(f"{path} is damaged ({error}); copy it again from the model's source") from None


def identity(source: str) -> str | None:
    """`sha256:...` of a folder, `commit:...` of a hub model; None for a hub model that this machine does not hold."""
    if is_hub(str(source)):
        found = _cached(*split(str(source)))
        return f"commit:{found.name}" if found else None
    return f"sha256:{digest(Path(source).expanduser())}"


def reading(source: str) -> str | None:
    """SHA-256 over what a local model is read and ended with: tokenizer, chat template, generation settings, 64 hex
    digits; None for a hub model, whose commit says it, and where there is nothing of the kind."""
    folder = Path(source).expanduser()
    if is_hub(str(source)):
        return None
    lines = [f"{name} {sha256(folder / name)}" for name in sorted(READ_WITH) if (folder / name).is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else None


def short(identity: str) -> str:
    """An identity for a message: a commit whole, as the settings may name it, of a digest the first digits."""
    return identity if identity.startswith("commit:") else identity[:19]


def pinned(source: str, revision: str | None, what: str) -> str:
    """The source with the commit that its revision stands for, `owner/name@commit`; a folder stays as it is.

    Asks the hub only for what the local cache lacks. Raises C2FError with the remedy; `what` names the setting.
    """
    if not is_hub(source):
        return source
    name, said = split(source)
    revision = revision or said
    held = _cached(name, revision)
    if held is None:
        from huggingface_hub import hf_hub_download

        try:
            held = Path(hf_hub_download(name, "config.json", revision=revision)).parent
        except Exception as error:  # the client has many error classes; what each means is said in one sentence
            reason = remedy(error, source, revision) or first_line(error)
            raise C2FError(f"{what} = {source!r} cannot be loaded: {reason}") from None
    return f"{name}@{held.name}"


def locate(source: str, label: str) -> Path:
    """Give the local folder of a source; raises C2FError when there is none."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise C2FError(f"{label}: {source} is a file; give the folder that holds it with its config.json")
    if not is_hub(source):
        raise C2FError(f"{label}: folder {source} does not exist; give a folder or a hub id such as organisation/model")
    from huggingface_hub import snapshot_download

    name, revision = split(source)
    for local in (True, False):  # first what the cache holds, if that is the whole model
        try:
            found = snapshot_download(name, revision=revision, allow_patterns=WANTED, local_files_only=local)
            if not local or files(Path(found)):
                return Path(found)
        except Exception as error:  # the client has many error classes; what each means is said in one sentence
            if not local:
                reason = remedy(error, source, revision) or first_line(error)
                raise C2FError(f"{label}: {source} is neither a folder nor available from the hub: {reason}") from None


def _cached(name: str, revision: str | None) -> Path | None:
    """The folder, named by its commit, that the local cache holds under a revision (`main` if none is named)."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no name that the hub could know; loading says so
        return None
    return Path(found).parent if isinstance(found, str) else None


def first_line(error: BaseException) -> str:
    """The first line of a message, without the keys in it."""
    return re.sub(r"hf_\w{4,}", "hf_...", (str(error).splitlines() or [type(error).__name__])[0])[:300]


def remedy(error: BaseException, source: str, revision: str | None = None) -> str | None:
    """What the hub's refusal means and what to do, in one sentence of our own; None where it was not the hub."""
    from huggingface_hub import constants, errors

    token = "give a token of an account that may read it (`hf auth login`, or the variable HF_TOKEN)"
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for found in reversed(chain):  # the innermost is the hub's own
        status = getattr(getattr(found, "response", None), "status_code", None)
        if isinstance(found, errors.GatedRepoError):
            return f"{source} is gated: accept its terms on its page at the hub, then {token}"
        if isinstance(found, errors.RevisionNotFoundError):
            return f"{source} has no revision {revision!r}: name a branch, tag or commit that its page at the hub lists"
        if isinstance(found, errors.RepositoryNotFoundError):
            return (
                f"the hub has no {source} or shows it to its members only, and there is no folder of that name: mend "
                f"the id 'owner/name' or the path, or {token}"
            )
        if isinstance(found, errors.LocalTokenNotFoundError) or status in (401, 403):
            return f"the hub refuses access to {source}{f' ({status})' if status else ''}: {token}"
        if isinstance(found, errors.OfflineModeIsEnabled) or (
            isinstance(found, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
        ):
            return (
                f"{source} is not in the local cache and offline mode is on: unset HF_HUB_OFFLINE to download it once, "
                "set HF_HOME to a cache that has it, or name a local folder"
            )
        if isinstance(found, errors.LocalEntryNotFoundError):
            return (
                f"{source} is not in the local cache and the hub cannot be reached: look at the network (HTTPS_PROXY), "
                "set HF_HOME to a cache that has it, or name a local folder"
            )
        if isinstance(found, errors.HfHubHTTPError):
            return f"the hub answered {status or 'with an error'} for {source}: try again later, or name a local folder"
    return None


def count(source: str) -> int | None:
    """How many weights a model has: from the headers of its files, else from its configuration; None if neither is
    on this machine."""
    folder = _cached(*split(source)) if is_hub(source) else Path(source).expanduser()
    if folder is None:
        return None
    try:
        return sum(map(_in_header, files(folder))) or count_of(_read(folder / "config.json"))
    except (C2FError, OSError, LookupError, TypeError, AttributeError, *UNPARSABLE):  # loading says what is wrong
        return None


def _in_header(path: Path) -> int:
    with open(path, "rb") as handle:
        header = json.loads(handle.read(min(int.from_bytes(handle.read(8), "little"), HEADER_LIMIT)))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def count_of(config: dict) -> int:
    """Weights of a decoder with gated feed-forward layers, as its configuration gives its sizes (norms left out)."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or width // heads
    attention = 2 * width * size * (heads + config.get("num_key_value_heads", heads))
    experts = config.get("num_local_experts") or config.get("num_experts") or 1
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    tables = config["vocab_size"] * width * (1 if config.get("tie_word_embeddings") else 2)
    return tables + config["num_hidden_layers"] * (attention + 3 * width * inner * experts)
