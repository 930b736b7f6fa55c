"""The one error family that means "bad input", not "a defect in this program"."""


class C2FError(Exception):
    """Raised before work starts; the message names the thing, its value, what was expected and the next step."""


def problems(title: str, found: list[str]) -> C2FError:
    """Build one error out of several problems so that a user mends them in a single round."""
    return C2FError(title + "\n" + "\n".join(f"  - {line}" for line in found))


class Stopped(C2FError):
    """Work ended on request before there was a result; what is finished is kept, and the same call continues."""


class CannotWrite(C2FError):
    """The disk is full or a folder cannot be written: nothing that follows could be kept."""
