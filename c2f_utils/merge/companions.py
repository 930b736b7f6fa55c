"""The small files that a merged model takes along from instruct: tokenizer, generation settings, licence.

A model folder may come from anywhere. Only files of known names are taken, none through a link that leads out of the
model, and no reference to code, which is not copied and would be looked up elsewhere.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from c2f_utils.errors import C2FError
from c2f_utils.files import UNPARSABLE
from c2f_utils.weights import READ_WITH

COPIED = READ_WITH | {"LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md"}
CODE = "auto_map"  # names Python code that belongs to a model


def companions(folders: Iterable[Path]) -> tuple[Path, ...]:
    """The files to copy, by name; of two of one name that of the later folder."""
    chosen = {
        path.name: path
        for folder in dict.fromkeys(folders)
        for path in sorted(folder.iterdir())
        if path.name in COPIED and path.is_file() and _inside(path, folder)
    }
    return tuple(chosen[name] for name in sorted(chosen))


def content(path: Path) -> bytes:
    """What is copied of a file; raises C2FError for JSON that is damaged."""
    raw = path.read_bytes()
    if path.suffix != ".json" or CODE.encode() not in raw:
        return raw
    try:
        found = json.loads(raw)
    except UNPARSABLE as error:
        raise C2FError(f"{path} is damaged ({error}); copy it again from the model's source") from None
    if isinstance(found, dict):
        found.pop(CODE, None)
    return json.dumps(found, indent=1, ensure_ascii=False).encode()


def _inside(path: Path, folder: Path) -> bool:
    """Whether a file lies in the model's folder, or, for one of the hub's cache, among the model's own blobs."""
    target, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return target.is_relative_to(home) or target.is_relative_to(blobs)
