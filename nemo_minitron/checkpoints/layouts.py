"""Which of the layouts a folder's weights are in."""

from nemo_minitron.checkpoints.files import Files, read_bytes
from nemo_minitron.checkpoints.megatron_weights import DistributedWeights, Weights
from nemo_minitron.checkpoints.plain_data import read_json
from nemo_minitron.checkpoints.rank_weights import RankWeights, has_rank_files
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
