"""Tiny notebooks in a folder of the test's own, laid out like the real ones."""

import json
from pathlib import Path

PARAMETERS = """profile: str = "smoke"  # what to run
seed: int = 0
run_id: str = "lab"
overrides: dict = {}
study: bool = False
overwrite: bool = False
"""
START = 'from c2f_utils import notebook\nrun = notebook.start(globals(), "{stage}")'
RESULT = 'run.here.save_results({"value": 1})'
FINISH = "notebook.finish(run)"


def code(source: str, *tags: str) -> dict:
    """A code cell as it stands in a notebook file."""
    metadata = {"tags": list(tags)} if tags else {}
    return {"cell_type": "code", "metadata": metadata, "source": source, "outputs": [], "execution_count": None}


def write(folder: Path, stage: str, *story: str, parameters: str = PARAMETERS) -> Path:
    """A notebook of one stage whose cells between start and finish are `story`."""
    cells = [{"cell_type": "markdown", "metadata": {}, "source": f"# {stage}"}, code(parameters, "parameters")]
    cells += [code(source) for source in (START.format(stage=stage), *story, FINISH)]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = folder / f"{stage}.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    return path
