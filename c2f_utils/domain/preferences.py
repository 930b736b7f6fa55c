r"""Preference pairs in the HH-RLHF format, from a local file or a hub data set. Needs no torch: files are checked
before work starts.

A set may have folders, as HH-RLHF has `harmless-base` and `helpful-base`: naming some of them reads those pairs alone,
so that a reward for harmlessness can be trained without one for helpfulness.

A row is {"chosen": transcript, "rejected": transcript}; both share the dialogue up to the last `\n\nAssistant:`, which
is the prompt. Rows that do not share it, or hold an empty answer or twice the same, are counted and left out; a source
without any usable row is refused.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from c2f_utils.errors import C2FError
from c2f_utils.files import UNPARSABLE

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
_LONGEST, _BLANK = 2**24, 10_000  # characters of a line, empty lines in a row
_FORMAT = "expected one JSON object per line, {'chosen': dialogue, 'rejected': dialogue}"


@dataclass(frozen=True)
class Preference:
    """One comparison: the dialogue so far (ending in the assistant's header) and two answers."""

    prompt: str
    chosen: str
    rejected: str


def read(source: str, split: str = "train", subsets: Sequence[str] = ()) -> tuple[list[Preference], int]:
    """The usable pairs of a `.jsonl` or `.jsonl.gz` file, a folder of such or a hub data set, and the number of rows
    left out.

    `split` and `subsets` choose within a folder or a hub set; a file is read whole. Raises C2FError naming the file and
    line for missing fields, for a source without usable pairs, and for subsets that the source does not have. An
    unchanged source is read once in a process.
    """
    stats = [path.stat() for path in files(source, split, subsets)]
    pairs, left_out = _read(source, split, tuple(subsets), tuple((s.st_size, s.st_mtime_ns, s.st_ino) for s in stats))
    return list(pairs), left_out


@lru_cache(maxsize=1)
def _read(source: str, split: str, subsets: tuple[str, ...], _seen: tuple) -> tuple[list[Preference], int]:
    rows = [_split_pair(row) for row in _rows(source, split, subsets)]
    pairs = [pair for pair in rows if pair is not None]
    if not pairs:
        raise C2FError(
            f"data.preferences = {source!r} holds no usable pair among {len(rows)} rows; "
            "expected rows with 'chosen' and 'rejected' dialogues "
            "that share all but the last answer: choose another file"
        )
    return pairs, len(rows) - len(pairs)


def is_local(source: str) -> bool:
    """Whether a source means a file of this machine rather than a hub data set."""
    path = Path(source)
    return path.suffix in (".jsonl", ".json", ".gz") or path.is_absolute() or source.startswith(".") or path.exists()


def files(source: str, split: str = "train", subsets: Sequence[str] = ()) -> list[Path]:
    """The local files that `read` opens; none for a hub data set.

    A folder is laid out as the published set is: `<subset>/<split>.jsonl.gz` (or `.jsonl`), without subsets
    `<split>.jsonl.gz`. Raises C2FError for what does not exist, and for subsets of a single file.
    """
    if not is_local(source):
        return []
    path = Path(source)
    if path.is_file():
        if subsets:
            raise C2FError(
                f"data.preference_subsets = {list(subsets)} names folders of a set, and data.preferences = {source!r} "
                "is one file, which is read whole; name its folder or a hub set, or leave the subsets out"
            )
        return [path]
    if not path.is_dir():
        raise C2FError(
            f"data.preferences = {source!r} does not exist; "
            "expected a .jsonl or .jsonl.gz file in the HH-RLHF format, or a folder of such"
        )
    return [_split_file(path, subset, split) for subset in subsets or [""]]


def _split_file(folder: Path, subset: str, split: str) -> Path:
    for ending in (".jsonl.gz", ".jsonl"):
        if (file := folder / subset / f"{split}{ending}").is_file():
            return file
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    raise C2FError(
        f"data.preferences = {str(folder)!r} has no {Path(subset) / split}.jsonl.gz; its subsets are "
        f"{', '.join(there) or 'none'}; expected a .jsonl or .jsonl.gz file, or subsets chosen with "
        "data.preference_subsets"
    )


def _rows(source: str, split: str, subsets: Sequence[str]) -> Iterator[dict]:
    for path in files(source, split, subsets):
        yield from _file_rows(source, path)
    if not is_local(source):
        for subset in subsets or [None]:
            yield from _hub_rows(source, split, subset)


def _file_rows(source: str, path: Path) -> Iterator[dict]:
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as handle
        ):
            blank = 0
            for number, line in enumerate(iter(lambda: handle.readline(_LONGEST), ""), start=1):
                blank = 0 if line.strip() else blank + 1
                if len(line) == _LONGEST or blank > _BLANK:  # a small .gz may hold a disk full of nothing
                    what = f"more than {_BLANK} empty lines" if blank > _BLANK else f"over {_LONGEST} characters"
                    raise C2FError(f"data.preferences: {path}, line {number}: {what}; {_FORMAT}")
                if not blank:
                    yield _row(path, number, line)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise C2FError(
            f"data.preferences = {source!r} cannot be read ({error}); {_FORMAT}, as UTF-8 text or gzip"
        ) from None


def _row(path: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except UNPARSABLE as error:
        raise C2FError(f"data.preferences: {path}, line {number}: not valid JSON ({error}); {_FORMAT}") from None
    missing = [key for key in ("chosen", "rejected") if not isinstance(row, dict) or not isinstance(row.get(key), str)]
    if missing:
        raise C2FError(
            f"data.preferences: {path}, line {number}: text field(s) {', '.join(missing)} missing; {_FORMAT}"
        )
    return row


def _hub_rows(source: str, split: str, subset: str | None) -> Iterator[dict]:
    from datasets import load_dataset

    where = {"data_dir": subset} if subset else {}
    try:
        dataset = load_dataset(source, split=split, **where)
    except Exception as error:  # the library raises many kinds; all mean the same to the user
        raise C2FError(
            f"data.preferences = {source!r}{f' (subset {subset!r})' if subset else ''} is no local file and cannot be "
            "loaded from the hub "
            f"({str(error).splitlines()[0]}); "
            "name a .jsonl file or a data set that can be reached from here"
        ) from error
    if not {"chosen", "rejected"} <= set(dataset.column_names):
        raise C2FError(
            f"data.preferences = {source!r} has columns {dataset.column_names}; expected 'chosen' and 'rejected'"
        )
    for number, row in enumerate(dataset):
        if not (isinstance(row["chosen"], str) and isinstance(row["rejected"], str)):
            raise C2FError(f"data.preferences: {source}, row {number}: 'chosen' and 'rejected' are no texts; {_FORMAT}")
        yield row


def _split_pair(row: dict) -> Preference | None:
    """Cut both transcripts at the last assistant header of `chosen`; None unless they share the dialogue before."""
    cut = row["chosen"].rfind(ASSISTANT)
    prompt = row["chosen"][: cut + len(ASSISTANT)]
    # More turns on the rejected side only would make a whole dialogue into one answer.
    if cut < 0 or not row["rejected"].startswith(prompt) or row["rejected"].rfind(ASSISTANT) != cut:
        return None
    chosen, rejected = row["chosen"][len(prompt) :], row["rejected"][len(prompt) :]
    return Preference(prompt, chosen, rejected) if chosen.strip() and rejected.strip() and chosen != rejected else None
