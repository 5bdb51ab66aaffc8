"""Linears: tensor and sequence parallel, with a norm in front, and several side by side for experts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from transformer_engine.pytorch.communication import AllReduce, Copy, Gather, ReduceScatter
from transformer_engine.pytorch.module.base import get_dummy_wgrad
from transformer_engine.pytorch.norms import first_weight, normalised
from transformer_engine.pytorch.state import ExtraState


class _Product(torch.autograd.Function):
    """`x W^T + b`. With fused accumulation the weight's gradient is added to `main_grad`, and a dummy is returned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fused: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.with_bias, ctx.fused = bias is not None, fused
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_bias = rows.sum(0) if ctx.with_bias else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, grad_bias, None
        if not ctx.fused:
            return grad_x, rows.t() @ x.flatten(0, -2), grad_bias, None
        weight.main_grad.add_(rows.t().float() @ x.flatten(0, -2).float())
        weight.grad_added_to_main_grad = True
        return grad_x, get_dummy_wgrad(weight.shape, weight.dtype), grad_bias, None


class _Weighted(ExtraState):
    """Sizes and switches that all linears share."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: ProcessGroup | None = None,
        tp_size: int = 1,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: object = "cuda",
    ) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.tp_size = tp_group.size() if tp_group is not None else tp_size
        self.parallel_mode = parallel_mode
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.use_bias, self.return_bias = bias, return_bias
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        self._kind = {"device": device, "dtype": params_dtype}

    def _make(self, name: str, init_method: Callable[[Tensor], Any], suffix: str = "") -> None:
        """One weight and its bias; uninitialised memory is NaN, as a reminder."""
        weight = nn.Parameter(torch.full((self.out_features, self.in_features), torch.nan, **self._kind))
        init_method(weight)
        weight.tensor_model_parallel = self.parallel_mode is not None
        weight.partition_dim = 1 if self.parallel_mode == "row" else 0
        weight.partition_stride = 1
        self.register_parameter(name + suffix, weight)
        if self.use_bias:
            bias = nn.Parameter(torch.zeros(self.out_features, **self._kind))
            if self.parallel_mode == "row":
                bias.sequence_parallel = self.sequence_parallel
            self.register_parameter("bias" + suffix, bias)
        else:
            setattr(self, "bias" + suffix, torch.empty(0, **self._kind))

    def _times(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        added = bias if self.use_bias and not self.return_bias else None
        fused = self.fuse_wgrad_accumulation and getattr(weight, "main_grad", None) is not None
        return _Product.apply(x, weight, added, fused)


class Linear(_Weighted):
    """A linear whose weight is split by rows ("column"), by columns ("row"), or not at all."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        init_method: Callable[[Tensor], Any],
        get_rng_state_tracker: object = None,
        rng_tracker_name: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(in_features, out_features, **settings)
        self._make("weight", init_method)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        split = self.tp_size > 1
        if self.parallel_mode == "column" and split:
            x = (Gather if self.sequence_parallel else Copy).apply(x, self.tp_group)
        out = self._times(x, self.weight, self.bias)
        if self.parallel_mode == "row" and split:
            out = (ReduceScatter if self.sequence_parallel else AllReduce).apply(out, self.tp_group)
        return (out, self.bias) if self.return_bias else out


class LayerNormLinear(Linear):
    """A norm of the full hidden size on this rank's positions, and a linear behind it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        return_layernorm_output: bool = False,
        **settings: Any,
    ) -> None:
        if return_layernorm_output:
            raise RuntimeError("the output of the norm")
        super().__init__(in_features, out_features, **settings)
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.layer_norm_weight = first_weight(in_features, zero_centred=zero_centered_gamma, **self._kind)
        self.layer_norm_bias = None
        if normalization != "RMSNorm":
            self.layer_norm_bias = nn.Parameter(torch.zeros(in_features, **self._kind))
        for parameter in (self.layer_norm_weight, self.layer_norm_bias):
            if parameter is not None:
                parameter.sequence_parallel = self.sequence_parallel

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        normed = normalised(
            x,
            self.layer_norm_weight,
            self.layer_norm_bias,
            kind=self.normalization,
            eps=self.eps,
            zero_centred=self.zero_centered_gamma,
        )
        return super().forward(normed)


class GroupedLinear(_Weighted):
    """`num_gemms` linears, each for its own share of the rows. Communication is left to the caller, as in the original.

    Weights are `weight0`, `weight1`, ..., biases `bias0`, ...
    """

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        init_method: Callable[[Tensor], Any],
        get_rng_state_tracker: object = None,
        rng_tracker_name: str | None = None,
        ub_name: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(in_features, out_features, **settings)
        self.num_gemms = num_gemms
        for index in range(num_gemms):
            self._make("weight", init_method, suffix=str(index))

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Called before a state is loaded; there is nothing of fp8."""

    def forward(self, x: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Any:
        parts = x.split(m_splits)
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        biases = [getattr(self, f"bias{index}") for index in range(self.num_gemms)]
        out = torch.cat([self._times(*pieces) for pieces in zip(parts, weights, biases, strict=True)])
        return (out, biases) if self.return_bias else out
