"""Kernel launches and element-wise memory traffic of the fused distillation loss on a GPU, counted without one.

    python -m benchmarks.kernel_count [--json] [--tokens 8192] [--vocabulary 128256] [--hidden 4096]
        [--divergence forward_kl] [--statistics] [--form triton|torch]
    torch and Triton; no GPU is needed or used, and no memory either.

Forward and backward of both output layers and the loss run on tensors without data (`meta`), which take the branches
of a GPU; every operation that reaches the device is counted:

- `launches`: kernels. An operation is one launch, and so is a Triton kernel; operations that torch's CUDA backend
  composes of several (`logsumexp`) count for as many as it launches.
- `elementwise_bytes`: what all kernels but the matrix products read and write. Each tensor that a kernel is given
  counts once as read, unless it is only overwritten, and once more as written if it is; the Triton kernels' schemas
  say which they overwrite.
- `products` and `product_bytes`: the same of the matrix products; adding to the weight's gradient is part of one.

What it cannot see: how fast a kernel is, what stays in a cache, and what a matrix library launches inside a product.
"""

import argparse
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_minitron.config.objective import DivergenceKind
from nemo_minitron.ops.divergence import Divergence
from nemo_minitron.parallel.fused_linear import product_adds_to_float32
from nemo_minitron.parallel.fused_linear_kd import fused_linear_kd

_aten = torch.ops.aten
_ALLOCATIONS = {_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided, _aten.resize_}
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.addmm_}
_OVERWRITES = {_aten.copy_, _aten.zero_, _aten.fill_}
"""In-place operations that do not read what they change."""
_COMPOSED = {_aten.logsumexp: 9}
"""Launches on CUDA: amax, abs, eq, where, sub, exp, sum, log, add."""


@dataclass
class Traffic(TorchDispatchMode):
    """Counts what reaches `meta` tensors while it is active."""

    launches: Counter[str] = field(default_factory=Counter)
    elementwise_bytes: int = 0
    product_bytes: int = 0
    products: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Its kernel exists on CUDA alone.
        result = kwargs["out"] if func is _aten.addmm.dtype_out else func(*args, **kwargs)
        operation = func.overloadpacket
        schema = func._schema
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if is_view or operation in _ALLOCATIONS or not any(x.is_meta for x in tensors):
            return result
        moved = self._bytes(func, args, kwargs, result)
        launches = _COMPOSED.get(operation, 1)
        self.launches[schema.name.partition("::")[2]] += launches
        if operation in _PRODUCTS:
            self.products += 1
            self.product_bytes += moved
        else:
            self.elementwise_bytes += moved * (2 if launches > 1 else 1)
        return result

    @staticmethod
    def _bytes(func: Any, args: Any, kwargs: Any, result: Any) -> int:
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        total, changed = 0, set()
        for argument in func._schema.arguments:
            values = [x for x in tree_leaves(named.get(argument.name)) if isinstance(x, Tensor)]
            written = argument.alias_info is not None and argument.alias_info.is_write
            read = not (written and (argument.is_out or func.overloadpacket in _OVERWRITES))
            for x in values:
                total += _size(x) * (read + written)
                changed.update([id(x)] if written else [])
        # A new tensor is written once; what was changed in place has been counted.
        return total + sum(_size(x) for x in tree_leaves(result) if isinstance(x, Tensor) and id(x) not in changed)


def _size(x: Tensor) -> int:
    """Bytes of its elements; those that an expanded dimension repeats count once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * x.dtype.itemsize


def count(
    *, tokens: int, vocabulary: int, hidden: int, divergence: Divergence, statistics: bool = False, form: str = "triton"
) -> Traffic:
    """Traffic of one micro-batch in bf16, forward and backward, with Megatron's float32 gradient buffer."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    student, weight = empty(tokens, hidden).requires_grad_(), empty(vocabulary, hidden).requires_grad_()
    teacher, teacher_weight = empty(tokens, hidden), empty(vocabulary, hidden)
    labels, gradient = empty(tokens, dtype=torch.int64), empty(vocabulary, hidden, dtype=torch.float32)
    before = os.environ.get("NEMO_MINITRON_TRITON")
    os.environ["NEMO_MINITRON_TRITON"] = str(int(form == "triton"))
    with Traffic():
        product_adds_to_float32(weight.device, weight.dtype)  # asked of a device once, and no part of a loss
    try:
        with Traffic() as traffic:
            loss = fused_linear_kd(
                student,
                weight,
                teacher,
                teacher_weight,
                None,
                labels if statistics else None,
                divergence=divergence,
                vocab_size=vocabulary,
                weight_gradient=gradient,
                statistics=statistics,
            )
            loss.loss_sum.backward()
    finally:
        os.environ.pop("NEMO_MINITRON_TRITON")
        os.environ.update({} if before is None else {"NEMO_MINITRON_TRITON": before})
    return traffic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 8192), ("vocabulary", 128256), ("hidden", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--divergence", choices=[kind.value for kind in DivergenceKind], default="forward_kl")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--statistics", action="store_true", help="with top-1 agreement and both cross-entropies")
    parser.add_argument("--form", choices=("triton", "torch"), default="triton")
    parser.add_argument("--json", action="store_true", help="one JSON object, and nothing else")
    given = parser.parse_args()
    traffic = count(
        tokens=given.tokens,
        vocabulary=given.vocabulary,
        hidden=given.hidden,
        divergence=Divergence(kind=DivergenceKind(given.divergence), temperature=given.temperature),
        statistics=given.statistics,
        form=given.form,
    )
    row = {
        "launches": traffic.launches.total(),
        "elementwise_bytes": traffic.elementwise_bytes,
        "products": traffic.products,
        "product_bytes": traffic.product_bytes,
        **{name: value for name, value in vars(given).items() if name != "json"},
    }
    if given.json:
        print(json.dumps(row))
        return
    print("  ".join(f"{name} {value}" for name, value in row.items()))
    for name, launches in traffic.launches.most_common():
        print(f"{launches:8d}  {name}")


if __name__ == "__main__":
    main()
