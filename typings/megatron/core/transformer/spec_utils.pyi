from dataclasses import dataclass, field
from typing import Any

@dataclass
class ModuleSpec:
    module: type | tuple[str, type]
    params: dict[str, Any] = field(default_factory=dict)
    submodules: object = ...
