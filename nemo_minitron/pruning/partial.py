"""Scores on the way: what a calibration that was cut off had summed up, and how far it had come."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.checkpoints.files import staged_file
from nemo_minitron.checkpoints.safetensors_file import Entry, SafetensorsFile, SafetensorsWriter
from nemo_minitron.errors import MinitronError

FORMAT = "nemo_minitron.partial_scores"


@dataclass(frozen=True, slots=True)
class PartialScores:
    """Sums over the first samples of a calibration set, layout-free."""

    sums: Mapping[str, Tensor]
    """As `pruning.scores` names them."""
    consumed: int
    """How many samples they rest on."""
    identity: Mapping[str, Any]
    """JSON data: what is being measured. Sums of something else are of no use."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """What validation summed up alongside: `ce`, `tokens`."""

    def save(self, path: Path) -> None:
        """Write under a temporary name, then put in place: a kill leaves the file before complete."""
        metadata = {
            "format": FORMAT,
            "consumed": json.dumps(self.consumed),
            "identity": json.dumps(dict(self.identity), sort_keys=True),
            "losses": json.dumps(dict(self.losses), sort_keys=True),
        }
        entries = {name: Entry(torch.float64, tuple(tensor.shape)) for name, tensor in self.sums.items()}
        with staged_file(path) as partial, SafetensorsWriter(partial, entries, metadata) as writer:
            for name, tensor in self.sums.items():
                writer.write(name, tensor)

    @classmethod
    def load(cls, path: Path, identity: Mapping[str, Any]) -> "PartialScores | None":
        """What `save` left; None for a file that is not there, cannot be read, or measures something else."""
        try:
            file = SafetensorsFile(path)
            if file.metadata.get("format") != FORMAT or json.loads(file.metadata["identity"]) != dict(identity):
                return None
            return cls(
                sums={name: file.get(name) for name in file.entries},
                consumed=int(json.loads(file.metadata["consumed"])),
                identity=dict(identity),
                losses=json.loads(file.metadata["losses"]),
            )
        except (MinitronError, KeyError, TypeError, ValueError):
            return None
