"""What a model loses when one of its layers alone takes a smaller form, for many layers and forms at once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_minitron.arch.axes import Axis
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.depth import LM_LOSS
from nemo_minitron.megatron.data import WindowDataset, loader
from nemo_minitron.megatron.depth import LayerSkipper, Part
from nemo_minitron.megatron.depth_metrics import DepthCollector
from nemo_minitron.megatron.runtime import Runtime


@dataclass(frozen=True, kw_only=True, slots=True)
class Replacement:
    """One layer's smaller form.

    Attributes:
        layer: Which layer, from 0.
        kept: Units that stay, by axis; of an axis that is not named, all.
        without: Parts of the layer that go, by their names in `arch.layer.PARTS`.
        dropped: Whether the layer goes altogether.
    """

    layer: int
    kept: Mapping[Axis, tuple[int, ...]] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    dropped: bool = False


class BlockReplacer(LayerSkipper):
    """Runs a model with one layer at a time replaced; states before that layer are computed once.

    Units that go are silenced where they enter the matrix behind them, which is what cutting them does.

    Args:
        chunks: This rank's model chunks, wrapped or not.
        runtime: The running layout.
        spec: Architecture of the complete model.
        replacements: One after the other; the same on every rank.
    """

    def __init__(
        self, chunks: Sequence[nn.Module], runtime: Runtime, spec: ModelSpec, replacements: Sequence[Replacement]
    ) -> None:
        super().__init__(chunks, runtime, spec, blocks_of(replacements))
        self._replacements: tuple[Replacement | None, ...] = (None, *replacements)

    def _run(self, part: Part, index: int, received: Tensor | None, rotary: Tensor) -> Tensor:
        with ExitStack() as stack:
            replacement = self._replacements[index]
            if replacement is not None and replacement.layer in part.layers:
                stack.enter_context(self._silenced(part, replacement))
            return super()._run(part, index, received, rotary)

    @contextmanager
    def _silenced(self, part: Part, replacement: Replacement) -> Iterator[None]:
        layer: Any = part.model.decoder.layers[replacement.layer - part.layers.start]
        sizes, kept = self._spec.layers[replacement.layer].sizes, replacement.kept
        with ExitStack() as stack:
            for module, axis, size, width in (
                (layer.mlp, Axis.FFN, "ffn_hidden_size", 1),
                (layer.self_attention, Axis.HEAD, "num_attention_heads", self._spec.head_dim),
            ):
                if axis in kept:
                    last = module.linear_fc2 if axis is Axis.FFN else module.linear_proj
                    mask = self._mask(kept[axis], sizes[size], width)
                    stack.callback(last.register_forward_pre_hook(_multiplied(mask)).remove)
            for name in replacement.without:
                module = layer.self_attention if name == "mixer" else layer.mlp
                stack.callback(module.register_forward_hook(_nothing).remove)
            yield

    def _mask(self, kept: tuple[int, ...], size: int, width: int) -> Tensor:
        """Ones for this tensor-parallel rank's channels that stay, zeros for the others."""
        mask = torch.zeros(size, dtype=torch.bool)
        mask[list(kept)] = True
        whole = mask.repeat_interleave(width)
        return whole.chunk(self._runtime.parallel.tensor)[self._runtime.tp_rank].to(self._runtime.device)


class BlockLossCollector(DepthCollector):
    """Adds up the loss of every replacement over micro-batches.

    Args:
        chunks: This rank's model chunks, wrapped or not.
        runtime: The running layout.
        spec: Architecture of the complete model.
        replacements: See `BlockReplacer`.
    """

    def __init__(
        self, chunks: Sequence[nn.Module], runtime: Runtime, spec: ModelSpec, replacements: Sequence[Replacement]
    ) -> None:
        super().__init__(chunks, runtime, spec, blocks=blocks_of(replacements), metrics=(LM_LOSS,))
        self._skipper = BlockReplacer(chunks, runtime, spec, replacements)

    def add_all(self, windows: WindowDataset, *, micro_batch_size: int) -> None:
        """Add every window; each data-parallel rank passes over its share of them."""
        runtime = self._runtime
        size = micro_batch_size * runtime.dp_size
        for batch in loader(windows, global_batch_size=size, dp_rank=runtime.dp_rank, dp_size=runtime.dp_size):
            self.add(batch)

    def losses(self) -> list[float]:
        """Nats per token of the unchanged model, and of every replacement, on every rank. Collective.

        Raises:
            ScoresError: A state was NaN or infinite; names the layer.
        """
        count, values = self.sums()
        return [float(value) for value in values / count]

    def sums(self) -> tuple[Tensor, Tensor]:
        """Tokens, and summed nats of the unchanged model and of every replacement, float64 on every rank. Collective.

        Raises:
            ScoresError: A state was NaN or infinite; names the layer.
        """
        self._skipper.check_finite()
        sums = self._sums[LM_LOSS]
        flat = torch.cat([sums.count, sums.values])
        # The last stage has the losses, the same on every tensor-parallel rank.
        if not self._runtime.is_last_stage or self._runtime.tp_rank:
            flat.zero_()
        dist.all_reduce(flat)
        return flat[0], flat[1:]


def blocks_of(replacements: Sequence[Replacement]) -> list[tuple[int, int]]:
    """Where each begins, and how many layers it skips."""
    return [(each.layer, int(each.dropped)) for each in replacements]


def _nothing(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, None]:
    """In the place of what a mixer or a feed-forward adds to the residual stream."""
    return torch.zeros_like(output[0]), None


def _multiplied(mask: Tensor) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        first, *rest = inputs
        return first * mask, *rest

    return hook
