"""Types of configuration values, and the base class of all sections."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

PATH_ERROR = "path"  # pydantic's type of the error of a path with a variable


class Section(BaseModel):
    """A part of the configuration. Unknown keys are errors, and values are never converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Few = Annotated[int, Field(ge=1, le=4096)]  # channels of a layer, images of a pass
Drawn = Annotated[int, Field(ge=1, le=65536)]  # samples of a class
Size = Annotated[list[Annotated[int, Field(ge=1, le=16384)]], Field(min_length=2, max_length=2)]
Rgb = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]


def _expanded(path: Path) -> Path:
    """The path with ~ as the home folder. Names such as $DATA are refused, unless they exist on the disk."""
    variable = re.search(r"\$(\w+|\{\w+\})", str(path))
    if variable is not None and not os.path.lexists(path):
        raise PydanticCustomError(
            PATH_ERROR,
            "{name} is not replaced in a configuration: write the path itself, or override the key on the "
            "command line, where the shell replaces it",
            {"name": variable[0]},
        )
    return Path(os.path.expanduser(path))


PathString = Annotated[Path, Field(strict=False), AfterValidator(_expanded)]
