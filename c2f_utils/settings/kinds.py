"""Kinds of settings: a strict section, and the numbers that fields may hold."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_LARGEST = 2**31 - 1  # what the libraries below count and seed with
Positive = Annotated[int, Field(gt=0, le=_LARGEST)]
Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Items = Annotated[int, Field(gt=0, le=10_000_000)]  # prompts and pairs: all of them are held in memory
Few = Annotated[int, Field(gt=0, le=1024)]  # models, processes
Rate = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]  # becomes the name of a folder


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
