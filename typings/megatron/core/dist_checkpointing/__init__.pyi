from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

def load(sharded_state_dict: dict[str, Any], checkpoint_dir: str) -> dict[str, Any]: ...
def load_common_state_dict(checkpoint_dir: str) -> dict[str, Any]: ...
def save(
    sharded_state_dict: dict[str, Any],
    checkpoint_dir: str,
    *,
    sharded_strategy: object = ...,
    async_sharded_save: bool = ...,
) -> AsyncRequest: ...
