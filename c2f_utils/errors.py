"""The one error family that means "bad input", not "a defect in this program"."""


class C2FError(Exception):
    """Raised before work starts; the message names the thing, its value, what was expected and the next step."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows below the cell (IPython asks for it): the message, and no way through our code."""
        return str(self).splitlines()


def problems(title: str, found: list[str]) -> C2FError:
    """Build one error out of several problems so that a user mends them in a single round; a single one is one line."""
    if len(found) == 1:
        return C2FError(f"{title} {found[0]}")
    return C2FError(title + "\n" + "\n".join(f"  - {line}" for line in found))


class Stopped(C2FError):
    """Work ended on request before there was a result; what is finished is kept, and the same call continues."""


def short(value: object) -> str:
    """A value as it is written, cut to what fits into a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list in itself
        text = f"(of type {type(value).__name__}, too long to show)"
    return text if len(text) <= 200 else f"{text[:200]} ..."


class CannotWrite(C2FError):
    """The disk is full or a folder cannot be written: nothing that follows could be kept."""
