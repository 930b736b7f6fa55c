"""A text file of the user's, cut into documents at empty lines. Needs no torch: it is checked before work starts."""

import re
from pathlib import Path

from c2f_utils.errors import C2FError

_FORMAT = "expected a plain text file in UTF-8 with an empty line between documents"


def read(source: str, setting: str) -> list[str]:
    """The documents of a text file; raises C2FError naming the file, the line where there is one, and the setting."""
    said = f"{setting} = {source!r}"
    try:
        raw = Path(source).read_bytes()
    except FileNotFoundError:
        raise C2FError(f"{said} does not exist; {_FORMAT}: mend the path, or leave it out") from None
    except OSError as error:
        raise C2FError(f"{said} cannot be read ({error.strerror}); {_FORMAT}") from None
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise C2FError(f"{said} is UTF-16; {_FORMAT}: save it as UTF-8")
    if raw[:2] == b"\x1f\x8b":
        raise C2FError(f"{said} is compressed with gzip; {_FORMAT}: unpack it")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise C2FError(
            f"{said}, line {_line(raw, error.start)}: byte 0x{raw[error.start]:02x} is not UTF-8; {_FORMAT}: save it "
            "as UTF-8"
        ) from None
    if (place := raw.find(b"\0")) >= 0:
        raise C2FError(f"{said}, line {_line(raw, place)}: holds a zero byte, so it is no text; {_FORMAT}")
    documents = [part.strip() for part in re.split(r"\r?\n[ \t]*\r?\n", text) if part.strip()]
    if not documents:
        raise C2FError(f"{said} holds no text; {_FORMAT}: fill it, or leave it out")
    return documents


def _line(raw: bytes, place: int) -> int:
    return raw.count(b"\n", 0, place) + 1
