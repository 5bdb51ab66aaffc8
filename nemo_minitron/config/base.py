"""The base of every section of a recipe."""

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
DEFAULT_SEED = 1234
"""Of a run, and of a model that is made without one."""


def _number_of_steps(value: Any) -> Any:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not (is_count or (isinstance(value, float) and 0 < value < 1)):
        raise ValueError("an integer of at least 0, or a fraction of all steps between 0 and 1, such as 0.25")
    return value


Steps = Annotated[int | float, BeforeValidator(_number_of_steps)]
"""An integer: this many optimizer steps. A number between 0 and 1: that fraction of all steps of the training."""


def in_steps(value: Steps, total: int) -> int:
    """A `Steps` value as a number of steps, for a training of `total`; a fraction is rounded up.

    So half of 33 steps is 17, and a validation every half is one in the middle and one at the end.
    """
    return value if isinstance(value, int) else math.ceil(round(value * total, 6))


class Section(BaseModel):
    """Frozen; unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
