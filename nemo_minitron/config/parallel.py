"""How a model is spread over processes, and in which numbers it computes."""

from enum import StrEnum
from math import gcd, lcm
from typing import Self

from pydantic import model_validator

from nemo_minitron.config.base import Count, NonNegative, Section
from nemo_minitron.config.dtypes import dtype_name


class Precision(StrEnum):
    """Dtype of weights and activations. Master weights, gradient sums and losses are fp32 in every case."""

    FP32 = "fp32"
    BF16 = "bf16"
    AUTO = "auto"
    """A recipe's word only: bf16 on a GPU and on processors that multiply it faster than fp32, else fp32. It is settled
    by a short measurement before work begins, and the run keeps what was chosen (`nemo_minitron.stages.precision`)."""

    @classmethod
    def _missing_(cls, value: object) -> "Precision | None":
        """Other words for the same dtype, such as `float32`."""
        return {"float32": cls.FP32, "bfloat16": cls.BF16}.get(dtype_name(value) or "")


class Recompute(StrEnum):
    """Activations that a forward pass in training forgets, and the backward pass computes again."""

    NONE = "none"
    SELECTIVE = "selective"
    """Those inside the FFN, the largest part: about a fifth more time."""
    FULL = "full"
    """All but each layer's input: about a third more time."""


class ParallelConfig(Section):
    """Megatron's parallel sizes. The data-parallel size is what is left: world size / (tensor * pipeline * context)."""

    tensor: Count = 1
    """Ranks that share each weight (TP). Divides query heads, KV groups, FFN and the padded vocabulary."""
    pipeline: Count = 1
    """Consecutive groups of layers (PP)."""
    virtual_pipeline: Count | None = None
    """Model chunks a pipeline rank holds (interleaved schedule, VPP); None for one."""
    context: Count = 1
    """Ranks that share each sequence (CP). Above 1 it needs Transformer Engine. They share Mamba heads, too."""
    expert: Count = 1
    """Ranks that share the experts of each layer (EP): data-parallel ranks, of which each holds some experts of all of
    them, split over the tensor-parallel ranks like an MLP. Divides the number of experts and the data-parallel size."""
    sequence_parallel: bool = False
    """Split norms and dropouts over the tensor-parallel ranks. Needs Transformer Engine or Apex."""
    recompute: Recompute = Recompute.NONE
    """Less memory for more time; results are the same."""

    overlap_grad_reduce: bool | None = None
    """Add gradients up over data-parallel ranks while the backward pass goes on. None: on GPUs, where there are several
    data-parallel ranks, and where `overlap_param_gather` is true."""
    grad_bucket_size: Count | None = None
    """Parameters whose gradients are added up together under `overlap_grad_reduce`; None for Megatron's choice, 40
    million or a million a data-parallel rank."""
    overlap_param_gather: bool | None = None
    """Gather what other data-parallel ranks have updated while the next forward pass goes on; needs the distributed
    optimizer and `overlap_grad_reduce`, whose buckets it uses. None: where both are, on GPUs with several data-parallel
    ranks."""
    overlap_p2p_comm: bool | None = None
    """Exchange activations between pipeline stages while they compute; needs `virtual_pipeline` and GPUs. None: where
    that holds."""
    gradient_accumulation_fusion: bool | None = None
    """Let the matrix product add to the fp32 gradient, with Transformer Engine's layers and Apex's extension. None:
    where both are."""
    apply_rope_fusion: bool | None = None
    """Transformer Engine's kernel for rotary positions, in its layers. None: where it is."""
    gc_interval: NonNegative | None = None
    """Optimizer steps between collections of Python's garbage, which all ranks then make at the same step instead of
    each at its own; 0 leaves it to Python. None: 100 on several GPUs, else 0."""

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.overlap_p2p_comm and self.virtual_pipeline is None:
            raise ValueError(
                "overlap_p2p_comm = true without virtual_pipeline: only the interleaved schedule has other work to do "
                "while stages exchange activations"
            )
        if self.grad_bucket_size is not None and self.overlap_grad_reduce is False:
            raise ValueError(
                "grad_bucket_size with overlap_grad_reduce = false: gradients are cut into buckets only to overlap"
            )
        if self.overlap_param_gather and self.overlap_grad_reduce is False:
            raise ValueError(
                "overlap_param_gather = true with overlap_grad_reduce = false: weights are gathered bucket by bucket, "
                "and there are buckets only where gradients overlap"
            )
        return self

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def split_positions(self) -> str:
        """The setting by which a rank has a part of each sequence between layers; "" if none does that."""
        if self.context > 1:
            return f"parallel.context = {self.context}"
        return "parallel.sequence_parallel = true" if self.sequence_parallel and self.tensor > 1 else ""

    @property
    def told(self) -> str:
        """The sizes that multiply, for messages."""
        told = f"parallel.tensor {self.tensor} x pipeline {self.pipeline} x context {self.context}"
        return told if self.expert == 1 else f"{told}, with expert {self.expert}"

    @property
    def ranks(self) -> int:
        """The fewest processes that the sizes fit; any number of them is a multiple of it.

        Expert-parallel ranks are data-parallel ranks, or context-parallel ones.
        """
        return self.tensor * self.pipeline * lcm(self.context, self.expert)


def mamba_split(groups: int, context: int) -> tuple[int, int]:
    """How context-parallel ranks share Mamba heads: into how many sets groups fall, and how many ranks share a group.

    The sets are as many as divide both numbers, so that as few ranks as can be need the maps of one group. Rank
    `i * shares + j` has share `j` of the heads of each group of set `i`.

    Args:
        groups: Groups of heads on a tensor-parallel rank.
        context: Context-parallel ranks.
    """
    sets = gcd(groups, context)
    return sets, context // sets
