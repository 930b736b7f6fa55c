"""Text that somebody else wrote (a model, a data set, the name of a file), shown letter by letter.

In HTML and in Markdown it can become neither markup nor mathematics: Jupyter typesets whatever stands between dollar
signs or after `\\(`, escaped or not. Letters that are not seen but reorder or hide others are named instead.
"""

import html
import re
import unicodedata

# MathJax 3 (JupyterLab) and MathJax 2 (nbconvert) leave elements of these classes, and what is in them, alone.
NO_MATHEMATICS = "mathjax_ignore tex2jax_ignore"

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (bidirectional marks), surrogates, line and paragraph ends
_NEEDED = "\n\t\u200c\u200d"  # layout, and the joiners without which some scripts and emoji are misspelt


def visible(text: object) -> str:
    """The text with every letter that is not seen named by its code point, as in ⟨U+202E⟩."""
    return "".join(_code(letter) if _hidden(letter) else letter for letter in _lines(text))


def in_html(text: object) -> str:
    """The text for the inside of an element; the code point of a hidden letter carries its name as a title.

    In a notebook the element, or one around it, needs the class NO_MATHEMATICS.
    """
    return "".join(
        f"<span title='{unicodedata.name(letter, 'control character')}'>{_code(letter)}</span>"
        if _hidden(letter)
        else html.escape(letter)
        for letter in _lines(text)
    )


def in_markdown(text: object) -> str:
    """The text on one line of Markdown: no emphasis, no HTML, no mathematics, no table borders.

    A dollar sign and a backslash stand in an element of their own, since JupyterLab looks for mathematics before and
    after it reads Markdown, and an escaped one counts.
    """
    escaped = re.sub(r"([\\`*\[\]<>|$#~]|&(?=#?\w+;))", r"\\\1", " ".join(visible(text).split()))
    escaped = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", escaped)
    return re.sub(r"\\[\\$]", r"<span>\g<0></span>", escaped)


def without_mathematics(markup: str) -> str:
    """HTML in which nothing is typeset as mathematics."""
    return f"<div class='{NO_MATHEMATICS}'>{markup}</div>"


def _lines(text: object) -> str:
    return str(text).replace("\r\n", "\n")


def _hidden(letter: str) -> bool:
    return unicodedata.category(letter) in _HIDDEN and letter not in _NEEDED


def _code(letter: str) -> str:
    return f"⟨U+{ord(letter):04X}⟩"
