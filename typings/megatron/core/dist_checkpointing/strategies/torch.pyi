from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

class TorchDistSaveShardedStrategy:
    backend: str
    version: int
    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> AsyncRequest: ...

class MCoreSavePlanner(DefaultSavePlanner): ...

def _replace_state_dict_keys_with_sharded_keys(
    sharded_state_dict: dict[str, Any], keep_only_main_replica: bool = ...
) -> tuple[dict[str, list[Any]], Any, dict[str, list[str]]]: ...
def mcore_to_pyt_state_dict(state_dict: dict[str, list[Any]], is_loading: bool = ...) -> dict[str, Any]: ...
