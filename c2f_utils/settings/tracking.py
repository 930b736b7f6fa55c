"""Settings of trackers: where the rows of `metrics.jsonl` are shown as well. They decide no result."""

import importlib.metadata
from typing import Literal

from pydantic import Field, model_validator

from c2f_utils.settings.kinds import Name, Section


class Tracking(Section):
    """Trackers that show a stage's metrics while it works; keys are taken from the environment alone."""

    to: list[Literal["trackio", "wandb", "mlflow", "tensorboard"]] = Field(
        [], description="packages that are handed every row; they must be installed"
    )
    project: Name = Field("c2f", description="what the runs are listed under there")

    @model_validator(mode="after")
    def _installed(self) -> "Tracking":
        if missing := [name for name in self.to if not _version(name)]:
            raise ValueError(f"to = {self.to}: not installed: {', '.join(missing)}; pip install {' '.join(missing)}")
        return self


def _version(package: str) -> str | None:
    """Of an installed distribution: a folder `wandb` in the project would pass for a module."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
