"""What a file must not tell when it leaves this machine: folders, the names of machine and user, keys.

Folders and names are replaced by marks such as ⟨outputs⟩, which are the same in JSON, HTML, Markdown and LaTeX; a key
cannot be replaced by anything true, so it is found and the file refused.
"""

import functools
import getpass
import html
import json
import os
import platform
import re
import sys
import tempfile
import urllib.parse
from collections.abc import Collection, Iterable
from pathlib import Path

from c2f_utils import files

_EVERYBODY = {"root", "user", "users", "admin", "ubuntu", "debian", "jovyan", "home", "localhost", "local", "python"}
_NAMED_KEY = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_SHORTEST_KEY = 8  # letters; a shorter value of such a variable is a switch or a number
_KEYS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"\bgh[opsu]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "an authorization header": r"[Aa]uthorization\W{1,6}(?:Bearer|Basic)\s+[\w.+/=-]{12,}",
    "an address with a password": r"\b[a-z][a-z0-9+]{1,9}://[^\s/:@\"']+:[^\s/:@\"']{3,}@",
}
_PICTURE = re.compile(r"([A-Za-z0-9+/]{256,})")  # in base64, where any short word may stand by chance
_HOST = re.compile(r'("host":\s*")[^"⟨]*"')
# A folder may follow a colour of a terminal (`\x1b[32m`, or as JSON writes that), but no letter of a longer word.
_BEFORE = r"(?:(?<=\[\dm)|(?<=\[\d\dm)|(?<=;\dm)|(?<=;\d\dm)|(?<![\w.~⟩@%+-]))"


class Private:
    """The folders and names of this machine, and of further `hosts` that a run was made on, to be taken out of text."""

    def __init__(self, hosts: Iterable[str] = ()) -> None:
        places = _places()
        self._roots = {text: mark for root, mark in places for text in _spellings(root)}
        # The longest first: the outputs folder may lie in the project, and that in the home folder.
        longest = sorted(self._roots, key=len, reverse=True)
        self._known = re.compile(rf"(?:{'|'.join(map(re.escape, longest))})(?![\w-]|\.\w)")
        tops = sorted(path.name for path in Path("/").iterdir() if path.is_dir())
        below = rf"/(?:{'|'.join(map(re.escape, tops))})((?:/[\w.@%+=~-]+)*)(/[\w.@%+=~-]+)(?![\w])"
        self._anywhere = re.compile(_BEFORE + below)
        host = platform.node()
        named = {name: "⟨host⟩" for name in (host, host.partition(".")[0], *hosts)} | {_user(): "⟨user⟩"}
        names = {name: mark for name, mark in named.items() if len(name) > 2 and name.lower() not in _EVERYBODY}
        self._names = names
        either = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)"
        self._named = re.compile(rf"(?<![\w-])(?:{either})(?![\w-])")

    def without_folders(self, text: str) -> str:
        """The text with every folder known here as its mark; any other absolute path stays, as an answer may have
        one."""
        pieces = _PICTURE.split(text)
        pieces[::2] = [self._known.sub(lambda found: self._roots[found[0]], piece) for piece in pieces[::2]]
        return "".join(pieces)

    def taken_out(self, text: str) -> str:
        """The text without known folders, other paths of this machine, and the names of machine and user."""
        pieces = _PICTURE.split(self.without_folders(text))
        for number in range(0, len(pieces), 2):
            piece = self._anywhere.sub(r"⟨elsewhere⟩\2", pieces[number])
            piece = _HOST.sub(r'\1⟨host⟩"', piece)
            pieces[number] = self._named.sub(lambda found: self._names[found[0]], piece)
        return "".join(pieces)

    def told(self, picture: bytes) -> list[str]:
        """The folders known here that stand in a picture, as their marks; short names stand in any long file."""
        found = set(self._known.findall(picture.decode("utf-8", errors="replace")))
        return sorted({self._roots[text] for text in found if len(text) > 7})


def keys(content: bytes, environment: Collection[tuple[str, str]] | None = None) -> list[str]:
    """In words, without their values, the keys in a file: values of variables of the environment whose names speak of
    one (KEY, TOKEN, SECRET, PASSWORD, ...), and what looks like a key of a known kind."""
    text = content.decode("utf-8", errors="replace")
    variables = os.environ.items() if environment is None else environment
    held = [(name, value) for name, value in variables if _NAMED_KEY.search(name) and len(value) >= _SHORTEST_KEY]
    found = [f"the value of {name}" for name, value in held if any(spelt in text for spelt in _spellings(value))]
    return found + [kind for kind, pattern in _KEYS.items() if re.search(pattern, text)]


def _places() -> list[tuple[str, str]]:
    """Folders of this machine and their marks; of two marks for one folder the first counts."""
    named = [
        (files.outputs(), "⟨outputs⟩"),
        (files.root(), "⟨project⟩"),
        (Path(sys.prefix), "⟨python⟩"),
        (Path(sys.base_prefix), "⟨python⟩"),
        (Path.home(), "⟨home⟩"),
        (Path(tempfile.gettempdir()), "⟨tmp⟩"),
    ]
    marks: dict[str, str] = {}
    for path, mark in named:
        for spelt in (path, path.resolve()):
            if len(spelt.parts) > 1:  # never "/" itself
                marks.setdefault(str(spelt), mark)
    return list(marks.items())


def _spellings(text: str) -> set[str]:
    """A text as it stands in JSON (with and without letters beyond ASCII), HTML and addresses."""
    in_json = {json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)}
    return {text, html.escape(text), urllib.parse.quote(text), *in_json}


@functools.cache
def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return ""
