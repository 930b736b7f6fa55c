"""Finished pieces of a stage's work, kept in its folder under what decided them: a stop or a kill costs one piece.

Settings, inputs and code need not stand in a key: a stage that has others is another stage (`Stage.plan`).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from c2f_utils.errors import C2FError, Stopped
from c2f_utils.files import plain, read_json, write_json
from c2f_utils.runs import provenance
from c2f_utils.runs.stage import Stage


class Pieces:
    """`pieces(key, make)`: what `make` gives, as JSON has it, made now or read from an earlier session."""

    def __init__(self, stage: Stage):
        self.stage = stage

    @property
    def folder(self) -> Path:
        return self.stage.dir / "pieces"

    def __call__(self, key: object, make: Callable[[], object]) -> Any:
        """The piece of this key; raises Stopped instead of making it where a stop was asked for."""
        path = self.folder / f"{provenance.fingerprint(key)}.json"
        if (found := _read(path, key)) is not None:
            return found
        self.refuse_to_go_on()
        write_json(path, {"key": key, "piece": plain(make(), "piece")})
        return _read(path, key)

    def refuse_to_go_on(self) -> None:
        """Raise Stopped where a stop was asked for."""
        if self.stage.stop_requested():
            raise Stopped(f"{self.stage.name}: stopped between two pieces of its work; run again to continue")

    def clear(self) -> None:
        """Forget all pieces: the results hold what they were for."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path, key: object) -> Any:
    """None for a piece that is not there, damaged, or of another key."""
    if not path.exists():
        return None
    try:
        found = read_json(path)
    except C2FError as error:
        print(f"made again: {error}")
        return None
    same = isinstance(found, dict) and found.get("key") == json.loads(json.dumps(key))
    return found.get("piece") if same else None
