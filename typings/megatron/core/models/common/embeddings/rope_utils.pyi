from collections.abc import Callable

from torch import Tensor

fused_apply_rotary_pos_emb: Callable[..., Tensor] | None
