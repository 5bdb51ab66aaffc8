"""Which of the layouts a folder's weights are in, and the checkpoint that they make up."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import weight_named
from nemo_minitron.checkpoints.files import Files, read_bytes
from nemo_minitron.checkpoints.megatron_weights import DistributedWeights, Weights
from nemo_minitron.checkpoints.parts import dtype_of
from nemo_minitron.checkpoints.plain_data import read_json
from nemo_minitron.checkpoints.rank_weights import RankWeights, has_rank_files
from nemo_minitron.checkpoints.sidecar import with_tokenizer_json
from nemo_minitron.checkpoints.source import Checkpoint, check_tokenizer_fits
from nemo_minitron.checkpoints.torch_dist import TorchDistReader
from nemo_minitron.checkpoints.zarr_store import ZarrStore


def open_weights(files: Files, folder: str) -> Weights:
    """Weights in a checkpoint's folder of distributed weights, or in one file per rank beside it.

    Raises:
        CheckpointError: There are none, or they are damaged.
    """
    if has_rank_files(files):
        return RankWeights(files)
    marker = f"{folder}/metadata.json" if folder else "metadata.json"
    if marker in files.names():
        label = f"{files.label}/{marker}"
        if read_json(read_bytes(files, marker), where=label).get("sharded_backend") == "zarr":
            return DistributedWeights(ZarrStore(files, folder))
    return DistributedWeights(TorchDistReader(files, folder))


def checkpoint_of(
    weights: Weights,
    spec: ModelSpec,
    *,
    family: str,
    lineage: dict[str, Any],
    format: str,
    read_files: Callable[[], Mapping[str, bytes]],
    where: str,
) -> Checkpoint:
    """A checkpoint of weights in Megatron's names, checked; of a padded vocabulary only the real rows are read.

    Raises:
        CheckpointError: A weight is missing, unknown or of the wrong shape, or the tokenizer does not fit the
            vocabulary.
    """
    weights.check(spec)
    dtype = weights.dtype(spec)
    files = with_tokenizer_json(read_files(), where=where)
    notes = check_tokenizer_fits(files, spec, where=where)

    def get(name: str) -> Tensor:
        weight = weight_named(spec, name)
        return weights.get(weight, spec).to(dtype_of(weight, dtype))

    return Checkpoint(
        spec=spec,
        family=family,
        dtype=dtype,
        lineage=lineage,
        format=format,
        layout=weights.layout,
        files=lambda: files,
        get=get,
        notes=lambda: notes,
    )
