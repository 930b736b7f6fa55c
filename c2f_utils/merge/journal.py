"""What of a merge is done, one JSON line each, so that a killed merge continues and ends with the same bytes.

A line is written after its bytes are. A line cut by a kill is dropped. Against power loss, where the system may have
kept the line and lost the bytes, every span's checksum is compared when a merge resumes, and spans that fail are
merged again.
"""

import fcntl
import json
import os
from pathlib import Path

from c2f_utils.errors import C2FError
from c2f_utils.files import UNPARSABLE


class Journal:
    """An append-only file, locked while a merge runs; `lines` are those found when it was opened."""

    def __init__(self, path: Path, key: str, fresh: bool) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._handle)
            raise C2FError(f"{path}: another merge is writing this output; wait for it or stop it") from None
        except OSError:
            pass  # a file system without locks: merge unprotected rather than not at all
        self.lines = [] if fresh else self._read(key)
        if not self.lines:
            os.ftruncate(self._handle, 0)
        os.lseek(self._handle, 0, os.SEEK_END)

    def begin(self, key: str) -> None:
        """Write the first line: from here on the output files exist with their headers."""
        self.append({"key": key})

    def append(self, line: dict) -> None:
        os.write(self._handle, (json.dumps(line, allow_nan=True) + "\n").encode())

    def close(self) -> None:
        os.close(self._handle)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _read(self, key: str) -> list[dict]:
        content = os.pread(self._handle, os.fstat(self._handle).st_size, 0)
        lines, end = [], 0
        for raw in content.splitlines(keepends=True):
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except UNPARSABLE:
                line = None
            if not isinstance(line, dict):
                break  # cut by a kill, or damaged by power loss: what follows cannot be trusted either
            lines.append(line)
            end += len(raw)
        os.ftruncate(self._handle, end)
        return lines if lines and lines[0].get("key") == key else []
