"""Where the project and its runs are, and small files: written so that a kill or a full disk never leaves half of one
under its final name, read with errors that say what was expected."""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml

from c2f_utils.errors import C2FError, CannotWrite, short

UNPARSABLE = (ValueError, RecursionError)  # what parsing text may raise: broken, not UTF-8, too long a number, too deep
_FULL = re.compile(r"No space left on device|File too large|Disk quota exceeded")
_LONGEST_MAPPING, _MOST_VALUES = 2**18, 10_000  # bytes of a file of settings or a recipe, values in it
PACKED = "pack.json"  # in the folder of a run that came as one file: what was in it
DEEPEST = 64  # levels of nesting; nothing here needs more, and code that walks a value may rely on it


def root() -> Path:
    """The project folder: the nearest above the working directory that holds `c2f_utils/`, else the installed one."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "c2f_utils" / "__init__.py").is_file():
            return folder
    return Path(__file__).resolve().parent.parent


def outputs() -> Path:
    """Folder of all runs: `C2F_OUTPUTS`, else `outputs/` of the project."""
    return Path(os.environ.get("C2F_OUTPUTS") or root() / "outputs").absolute()


@contextlib.contextmanager
def room(path: Path) -> Iterator[None]:
    """Turn what Python and libraries raise where a disk is full, or a folder cannot be written, into CannotWrite."""
    try:
        yield
    except C2FError:
        raise
    except Exception as error:
        full = _FULL.search(str(error))  # safetensors has an error class of its own
        elsewhere = isinstance(error, ConnectionError | TimeoutError | ChildProcessError)
        if not (full or isinstance(error, OSError)) or elsewhere:
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else full and full[0] or error
        advice = "free space or choose another C2F_OUTPUTS; the same command then continues"
        raise CannotWrite(f"cannot write {path}: {reason}; {advice}") from error


@contextlib.contextmanager
def replacing(path: Path, mark: str = "") -> Iterator[Path]:
    """A place beside `path` for a new file or folder, which takes its place in one step when the block ends well.

    Otherwise nothing of it is left, and `path` is as it was. `mark` tells writers apart that do not know of each
    other. Raises CannotWrite as `room` does.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}{mark}.partial")
    try:
        with room(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(partial)
            yield partial
            if path.is_dir() and partial.is_dir():
                _remove(path)
            os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            _remove(partial)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file atomically: written beside it, flushed to the disk, then renamed.

    Raises CannotWrite when the disk is full or the folder cannot be written; the old content is then still there.
    """
    with replacing(path, f".{os.getpid()}") as partial, open(partial, "xb") as handle:  # through no link left there
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically, as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically; NaN and infinities are refused (ValueError) because they are not JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> object:
    """Read one JSON file; raises C2FError that names the file when it is missing, unreadable or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise C2FError(f"{path} does not exist") from None
    except OSError as error:
        raise C2FError(f"{path} cannot be read: {error.strerror}") from None
    except UNPARSABLE as error:
        raise C2FError(f"{path} is not valid JSON ({error}); delete it and run its stage again") from None


def plain(value: object, where: str = "results") -> object:
    """JSON-able copy with numpy and torch values as Python ones; raises C2FError naming the first NaN or infinity."""
    if isinstance(value, dict):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), where)
    if isinstance(value, float) and not math.isfinite(value):
        raise C2FError(f"{where} is {value}; results must be finite: null stands for a metric that does not exist here")
    return value


def or_null(value: object) -> object:
    """A JSON-able copy, or None where a number in it is not finite."""
    try:
        return plain(value)
    except C2FError:
        return None


def flat(settings: dict, prefix: str = "") -> dict[str, object]:
    """Nested mappings with dotted keys, e.g. `coarse.law.start`."""
    pairs: dict[str, object] = {}
    for key, value in settings.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return pairs


def too_deep(value: object) -> bool:
    """Whether lists and dictionaries lie in each other more than `DEEPEST` levels deep (or in themselves)."""
    level = [value]
    for _ in range(DEEPEST):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = list({id(item): item for items in inner for item in items}.values())  # YAML may name one item often
        if not level:
            return False
    return True


def append_jsonl(path: Path, row: object) -> None:
    """Append one JSON line with a single write, so that readers see whole lines; raises CannotWrite, and then the file
    is as it was."""
    line = json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"
    path = Path(path)
    with room(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as handle:
            before = handle.tell()
            try:
                left = memoryview(line.encode("utf-8"))
                while left:
                    left = left[handle.write(left) :]
            except OSError:
                os.truncate(path, before)
                raise


def read_jsonl(path: Path) -> list:
    """Read JSON lines; a last line cut by a kill is dropped, any other damaged line raises C2FError."""
    return list(_lines(Path(path)))


def _lines(path: Path) -> Iterator[object]:
    if not path.exists():
        return
    rows = path.read_bytes().split(b"\n")
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            yield json.loads(row.decode("utf-8"))
        except UNPARSABLE as error:
            if number == len(rows):
                return
            raise C2FError(f"{path}, line {number}: not valid JSON ({error})") from None


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hex digits, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(value: object) -> str:
    """16 hex digits of the SHA-256 of a JSON-able value; the order of dictionary keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def identity(settings: object, results: object, models: object) -> str:
    """Fingerprint of a stage as an input of others: its settings, results and models, not its times or its name."""
    return fingerprint({"settings": settings, "results": results} | ({"models": models} if models else {}))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-6` as text; people who write learning rates mean a number. A key given twice is refused, and
    so are aliases that stand for far more than is written."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._values: dict[yaml.Node, int] = {}
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} levels deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        self._values[node] = 1 + sum(self._values.get(part, 1) for part in parts)
        if self._values[node] > _MOST_VALUES:
            raise yaml.YAMLError(f"it stands for more than {_MOST_VALUES} values")
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        _refuse_twice([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return node


def _refuse_twice(keys: list[str]) -> None:
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise ValueError(f"{short(twice[0])} is given twice; keep one")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    _refuse_twice([key for key, _ in pairs])
    return dict(pairs)


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_mapping(path: str | Path, what: str = "overrides file", example: str = "coarse: {iterations: 5}") -> dict:
    """Read a mapping from YAML, with `1e-6` as a number, or from a .json file.

    Raises C2FError, naming the file as `what`, when it cannot be read or holds something else than a mapping.
    """
    path = Path(path)
    try:
        with open(path, "rb") as handle:
            raw = handle.read(_LONGEST_MAPPING + 1)
        if len(raw) > _LONGEST_MAPPING:
            raise C2FError(f"{what} {path} is longer than {_LONGEST_MAPPING} bytes; expected a YAML or JSON file")
        text, from_json = raw.decode("utf-8-sig"), path.suffix == ".json"
        content = json.loads(text, object_pairs_hook=_unique) if from_json else yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise C2FError(f"{what} {path}: {error.strerror}; expected a readable YAML or JSON file") from None
    except UnicodeDecodeError:
        raise C2FError(f"{what} {path} is not UTF-8 text; expected a YAML or JSON file") from None
    except (yaml.YAMLError, OverflowError, *UNPARSABLE) as error:
        raise C2FError(f"{what} {path} cannot be parsed: {' '.join(str(error).split())}") from None
    if too_deep(content):
        raise C2FError(f"{what} {path} is nested more than {DEEPEST} levels deep; expected '{example}' or the like")
    if not isinstance(content, dict | None):
        raise C2FError(f"{what} {path} holds a {type(content).__name__}; expected a mapping such as '{example}'")
    return content or {}
