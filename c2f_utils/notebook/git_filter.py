"""A git filter: a notebook from standard input as it is committed, without outputs, to standard output.

`make lab` sets it up, so that running a notebook changes nothing that git sees. Needs nothing but Python.
"""

import json
import sys

KEPT = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}}  # fmt: skip


def clean(text: str) -> str:
    """The notebook without outputs, counts and what an editor remembers of it; any other text as it is."""
    try:
        notebook = json.loads(text)
        cells = notebook["cells"]
        for cell in cells:
            tags = cell.get("metadata", {}).get("tags")
            cell["metadata"] = {"tags": tags} if tags else {}
            if cell["cell_type"] == "code":
                cell["execution_count"], cell["outputs"] = None, []
    except (ValueError, KeyError, TypeError, AttributeError):
        return text
    notebook["metadata"] = KEPT
    return json.dumps(_sorted(notebook), indent=1, ensure_ascii=False) + "\n"


def _sorted(notebook: dict) -> dict:
    """Keys in the order in which notebooks are written."""
    cells = [dict(sorted(cell.items())) for cell in notebook["cells"]]
    return dict(sorted((notebook | {"cells": cells}).items()))


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8", newline="")
    sys.stdout.reconfigure(encoding="utf-8", newline="")
    sys.stdout.write(clean(sys.stdin.read()))
