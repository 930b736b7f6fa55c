"""A run as one file that can be read elsewhere: `c2f pack RUN`, and `c2f pack --open FILE` on the other machine.

In it: settings, results, metrics, kept answers, executed notebooks, logs, figures, the report, provenance, and
`pack.json` with the SHA-256 of every file. Not in it: weights, checkpoints and the user's data. Folders, host and user
of this machine are taken out of every file (`private.py`); a file with a key in it is refused. The same run gives the
same bytes. What is opened is untrusted: nothing is written before all of it has been checked.
"""

import argparse
import hashlib
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from c2f_utils.errors import C2FError, problems, short
from c2f_utils.files import PACKED, UNPARSABLE, outputs, replacing, too_deep, write_bytes
from c2f_utils.report import private
from c2f_utils.runs import registry
from c2f_utils.runs.stage import Stage, run_folder

FORMAT = 1
MOST_FILES, LARGEST, MOST_BYTES = 5_000, 2**28, 2**30  # files of a pack, bytes of one of them, of all together
# Where files lie in a run: beside a stage's records, or one folder further down.
_FOLDERS = ("figures", "laws", "tables")
_KINDS = (".json", ".jsonl", ".ipynb", ".txt", ".md", ".html", ".tex", ".csv", ".yaml", ".png", ".pdf", ".svg")
_PICTURES = (".png", ".pdf")
# What models and data said: an absolute path or a name in there is theirs, not this machine's.
_ANSWERS = ("results.json", "metrics.jsonl", "samples.jsonl")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,127}")
_END = struct.Struct("<4s4H2LH")  # the record that ends an archive: PKWARE's APPNOTE.TXT, 4.3.16
_ENTRY = 46 + 256  # bytes of the list of files that one file may take


def pack(run_id: str, file: Path | None = None) -> Path:
    """Write a run to `file` (`<run_id>.c2f.zip` here), replaced in one step, and return its path.

    Raises C2FError for a run that is not there or at work, a file with a key in it, and one with a folder of this
    machine where it cannot be taken out.
    """
    folder, file = run_folder(run_id), Path(file or f"{run_id}.c2f.zip")
    if file.suffix != ".zip":
        raise C2FError(f"--out {file}: expected a name that ends with .zip")
    stages = sorted(registry.stages(run_id=run_id), key=lambda stage: stage.name)
    if not stages:
        raise C2FError(f"there is no run {short(run_id)} in {outputs()}; c2f table lists what is there")
    if working := [stage.name for stage in stages if stage.state() == "running"]:
        raise C2FError(f"{', '.join(working)} in run {run_id!r} is at work; pack it when it has ended")
    hidden = private.Private(str(stage.status().get("host")) for stage in stages)
    contents, rewritten, wrong = {}, [], []
    for path in _files(folder):
        name, raw = path.relative_to(folder).as_posix(), path.read_bytes()
        contents[name] = raw if path.suffix in _PICTURES else _told_nothing(hidden, path, raw)
        rewritten += [name] * (contents[name] != raw)
        wrong += [f"{name} holds {kind}: take it out, or delete the file" for kind in private.keys(raw)]
        told = hidden.told(raw) if path.suffix in _PICTURES else []
        wrong += [f"{name} tells the folder {mark} of this machine: draw it anew without" for mark in told]
    size = sum(map(len, contents.values()))
    if len(contents) >= MOST_FILES or size > MOST_BYTES or max(map(len, contents.values())) > LARGEST:
        wrong.append(f"{len(contents)} files of {size / 2**20:.0f} MiB are more than a pack may hold")
    if wrong:
        raise problems(f"run {run_id!r} cannot be packed:", wrong)
    write_bytes(file, _archive(run_id, contents | {PACKED: _manifest(run_id, stages, contents, rewritten)}))
    return file


def unpack(file: Path, into: Path | None = None) -> Path:
    """Check a pack and lay its run into the folder `into` (that of all runs), whole or not at all; returns its folder.

    Raises C2FError for what is no pack, is damaged, or names anything but plain files of the run's own, and for a run
    whose id is taken.
    """
    run_id, contents = _read(Path(file))
    folder = Path(into) / run_id if into else run_folder(run_id)
    if folder.exists():
        raise C2FError(
            f"{folder} exists already; open the pack elsewhere (--into DIR, then C2F_OUTPUTS=DIR for other commands)"
        )
    with replacing(folder) as partial:
        for name, content in contents.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `c2f pack` to the commands of `c2f`."""
    parser = commands.add_parser(
        "pack", help="put a run into one file that can be read elsewhere", description=(
            "Put a run (settings, results, executed notebooks, report; no weights, no data) into one file without this "
            "machine's folders and names, or open such a file."
        ),
    )  # fmt: skip
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("run", metavar="RUN", nargs="?", help="a run's folder under outputs/")
    which.add_argument("--open", metavar="FILE", type=Path, help="a pack to open here")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the pack to write (default: RUN.c2f.zip)")
    parser.add_argument("--into", metavar="DIR", type=Path, help="with --open: folder of runs (default: outputs/)")
    parser.set_defaults(action=_command)


def _command(options: argparse.Namespace) -> int:
    if options.open:
        folder = unpack(options.open, options.into)
        print(f"opened as {folder}; it has no weights, so that stages built on them need those of the original")
        return 0
    file = pack(options.run, options.out)
    print(f"packed into {file} ({file.stat().st_size / 2**20:.1f} MiB); open it with c2f pack --open {file.name}")
    lent = {lender for stage in registry.stages(run_id=options.run) for lender in _lenders(stage)} - {options.run}
    for lender in sorted(lent):
        print(f"it builds on stages of run {lender!r}, which is not in it; pack that run, too")
    return 0


def _lenders(stage: Stage) -> Iterable[str]:
    return stage.provenance().get("parents", {}).values()


# Writing


def _files(folder: Path) -> list[Path]:
    """The files of a run that a pack holds; never through a link."""
    stages = [stage.dir for stage in registry.stages(run_id=folder.name)]
    places = [place for part in [*stages, folder / "report"] for place in (part, *(part / name for name in _FOLDERS))]
    places = [place for place in places if place.is_dir() and not place.is_symlink()]
    found = [path for place in places for path in place.iterdir()]
    found += [path for path in folder.glob("*.json") if path.name != PACKED]  # of the whole run, as what was asked for
    found = [path for path in found if path.is_file() and not path.is_symlink()]
    return sorted(path for path in found if path.suffix in _KINDS and _NAME.fullmatch(path.name))


def _told_nothing(hidden: private.Private, path: Path, raw: bytes) -> bytes:
    text = raw.decode("utf-8", errors="surrogateescape")
    answers = path.name in _ANSWERS or path.parent.name == "laws"
    text = hidden.without_folders(text) if answers else hidden.taken_out(text)
    return text.encode("utf-8", errors="surrogateescape")


def _manifest(run_id: str, stages: list[Stage], contents: dict[str, bytes], rewritten: list[str]) -> bytes:
    """`pack.json`: the stages with their state and fingerprint, which rewriting a path in a record would change, and
    every file."""
    about = {stage.name: {"state": stage.state(), "fingerprint": stage.fingerprint()} for stage in stages}
    listed = {name: {"sha256": _sha256(raw), "bytes": len(raw)} for name, raw in contents.items()}
    found = {"format": FORMAT, "run": run_id, "stages": about, "rewritten": rewritten, "files": listed}
    return (json.dumps(found, indent=1) + "\n").encode()


def _archive(run_id: str, contents: dict[str, bytes]) -> bytes:
    """The bytes of a ZIP archive that depend on names and contents alone."""
    with io.BytesIO() as memory:
        with zipfile.ZipFile(memory, "w") as archive:
            for name in sorted(contents, key=lambda name: (name != PACKED, name)):
                entry = zipfile.ZipInfo(f"{run_id}/{name}", (1980, 1, 1, 0, 0, 0))
                entry.compress_type, entry.create_system = zipfile.ZIP_DEFLATED, 3
                entry.external_attr = 0o100644 << 16
                archive.writestr(entry, contents[name], compresslevel=6)
        return memory.getvalue()


# Reading


def _read(file: Path) -> tuple[str, dict[str, bytes]]:
    """The run's id and its files by name, all checked."""
    try:
        with open(file, "rb") as handle:
            _refuse_long_lists(file, handle)
            with zipfile.ZipFile(handle) as archive:
                return _checked(file, archive)
    except OSError as error:
        raise C2FError(f"{file} cannot be read: {error.strerror or error}; expected a pack") from None
    except (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, EOFError, *UNPARSABLE) as error:
        raise C2FError(f"{file} is no whole pack ({error}); expected what c2f pack wrote, copied in full") from None


def _refuse_long_lists(file: Path, handle: io.BufferedReader) -> None:
    """The list of files is read as a whole: its length is checked first, as the last record tells it."""
    length = handle.seek(0, io.SEEK_END)
    handle.seek(max(0, length - _END.size - 20))
    tail = handle.read()
    last = tail[-_END.size :]
    plain = len(last) == _END.size and last[:4] == b"PK\x05\x06" and b"PK\x06\x07" not in tail[: -_END.size]
    _, _, _, _, count, size, _, comment = _END.unpack(last) if plain else (0,) * 8
    if not plain or comment or count > MOST_FILES or size > MOST_FILES * _ENTRY:
        raise C2FError(f"{file} is no pack; expected a .zip of at most {MOST_FILES} files that c2f pack wrote")


def _checked(file: Path, archive: zipfile.ZipFile) -> tuple[str, dict[str, bytes]]:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    run_id = names[0].partition("/")[0] if names else ""
    if not names or names[0] != f"{run_id}/{PACKED}" or entries[0].file_size > 2**22:
        raise C2FError(f"{file} is no pack: its first file is not {PACKED}; expected what c2f pack wrote")
    run_folder(run_id)  # refuses what is no run id
    wrong = [reason for entry in entries if (reason := _hostile(entry, run_id))]
    if len({name.lower() for name in names}) < len(names):
        wrong.append("two files have one name")
    if sum(entry.file_size for entry in entries) > MOST_BYTES:
        wrong.append(f"it would take more than {MOST_BYTES >> 20} MiB")
    if wrong:
        raise problems(f"{file} is not opened:", wrong[:5])
    contents = {entry.filename.partition("/")[2]: archive.read(entry) for entry in entries}
    listed = _listed(file, run_id, contents.pop(PACKED))
    differ = [name for name in {*listed, *contents} if listed.get(name) != _sha256(contents.get(name, b""))]
    if differ:
        raise C2FError(f"{file} is damaged: {short(min(differ))} is not as {PACKED} lists it; copy the pack again")
    return run_id, contents | {PACKED: archive.read(entries[0])}


def _hostile(entry: zipfile.ZipInfo, run_id: str) -> str | None:
    """Why an entry is none that `pack` writes, or None."""
    first, *parts = entry.filename.split("/")
    if first != run_id or not 1 <= len(parts) <= 3 or not all(map(_NAME.fullmatch, parts)):
        return f"{short(entry.filename)} is no name of a file in run {run_id!r}"
    if entry.external_attr >> 16 != 0o100644 or entry.flag_bits & 1:
        return f"{short(entry.filename)} is no plain file"
    if not entry.filename.endswith(_KINDS):
        return f"{short(entry.filename)} is of a kind that no pack holds"
    return f"{short(entry.filename)} is too large" if entry.file_size > LARGEST else None


def _listed(file: Path, run_id: str, raw: bytes) -> dict[str, str]:
    """SHA-256 by name, as the manifest tells it; every stage must have its fingerprint there."""
    found = json.loads(raw)
    if not isinstance(found, dict) or too_deep(found) or found.get("run") != run_id or found.get("format") != FORMAT:
        raise C2FError(f"{file}: {PACKED} is not of run {run_id!r} in format {FORMAT}; update c2f_utils, or pack again")
    try:
        files = {name: about["sha256"] for name, about in found["files"].items()}
    except (KeyError, TypeError, AttributeError):
        raise C2FError(f"{file}: {PACKED} lists no files; expected what c2f pack wrote") from None
    try:
        told = {name for name, about in found["stages"].items() if isinstance(about["fingerprint"], str)}
    except (KeyError, TypeError, AttributeError):
        told = set()
    if lacking := sorted({name.partition("/")[0] for name in files if name.endswith("/config.json")} - told):
        raise C2FError(f"{file}: {PACKED} has no fingerprint of {short(lacking[0])}; expected what c2f pack wrote")
    return files


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
