"""How a model is spread over processes, and in which numbers it computes."""

from enum import StrEnum

from nemo_minitron.config.base import Count, Section


class Precision(StrEnum):
    """Dtype of weights and activations. Master weights, gradient sums and losses are fp32 in every case."""

    FP32 = "fp32"
    BF16 = "bf16"
    AUTO = "auto"
    """A recipe's word only: bf16 on a GPU and on processors that multiply it faster than fp32, else fp32. It is settled
    by a short measurement before work begins, and the run keeps what was chosen (`nemo_minitron.stages.precision`)."""


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
    """Ranks that share each sequence (CP). Above 1 it needs Transformer Engine."""
    sequence_parallel: bool = False
    """Split norms and dropouts over the tensor-parallel ranks. Needs Transformer Engine or Apex."""
    recompute: Recompute = Recompute.NONE
    """Less memory for more time; results are the same."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context
