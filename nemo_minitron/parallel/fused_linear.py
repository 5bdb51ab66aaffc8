"""What the fused output layers share: chunks of tokens, reused buffers, and the gradient of the matrix product.

An output layer followed by a loss over the vocabulary would hold several `[tokens, vocabulary]` tensors. Here the
logits of one chunk of tokens at a time are formed, turned into their own gradient in place, and multiplied back into
the gradients of hidden states and weight; the backward pass has nothing left to do but scale them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_minitron.kernels.available import kernels_run
from nemo_minitron.ops import autograd
from nemo_minitron.ops.linear import linear, linear_input_gradient, suits_onednn
from nemo_minitron.ops.memory import Workspace
from nemo_minitron.parallel.collectives import gather, group_rank, split_group, sum_over
from nemo_minitron.parallel.vocab import real_columns

# On a CPU the matrix products want tall chunks, the element-wise passes want blocks that stay in a core's cache.
MIN_CHUNK_BYTES = 192 << 20  # 512 tokens of two models with 49,152 words in fp32: below that, products slow down
MAX_CHUNK_BYTES = 256 << 20
CHUNK_FRACTION = 1 / 6
"""Memory of all buffers of logits together: this share of one float32 `[tokens, columns]` tensor, within the bounds.
With the element-wise blocks it stays below a quarter of that tensor wherever that matters."""
# Threads meet after each operation on a block: few large blocks, since a busy machine makes them wait for each other.
_BLOCK_ELEMENTS_PER_THREAD = 1 << 19
_MAX_BLOCK_ELEMENTS = 1 << 22
_BLOCK_ELEMENTS_SPLIT = 1 << 21  # every block costs a collective when the vocabulary is split
_HIDDEN_GRAD_ROWS = 256  # several threads finish oneDNN's long, thin product in half the time in such pieces
_WEIGHT_GRAD_ROWS = 4096

# On a GPU a block is the complete chunk: every block costs launches, every chunk one pass over the weight's gradient.
CHUNK_BYTES_ON_GPU = 2 << 30
"""Memory of a chunk's logits and of the scratch buffers that torch's operations need; Triton's kernels need none."""
_WEIGHT_GRAD_ROWS_ON_GPU = 32768
_ROW_ELEMENTS_ON_GPU = 64  # rows of logits begin where the tensor cores' loads are aligned
_CPU = torch.device("cpu")

EMPTY = -1e30
"""Stands for the maximum of no logits; unlike -inf it can be subtracted from itself."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_rows(tokens: int, columns: int, bytes_per_logit: int, wanted: int | None, device: torch.device = _CPU) -> int:
    """Tokens per chunk: the wanted number, or even shares whose buffers of logits fit the memory given above."""
    if wanted is not None:
        return max(1, min(wanted, tokens))
    budget = min(max(int(CHUNK_FRACTION * 4 * tokens * columns), MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)
    if device.type != "cpu":
        budget = CHUNK_BYTES_ON_GPU
    most = max(1, budget // (bytes_per_logit * max(columns, 1)))
    return max(1, math.ceil(tokens / max(1, math.ceil(tokens / most))))


def block_rows(rows: int, columns: int, device: torch.device, tp: ProcessGroup | None) -> int:
    """Tokens per element-wise block of torch's operations: what fits in cache on a CPU, elsewhere the chunk."""
    if device.type != "cpu":
        return max(1, rows)
    threads_share = min(_BLOCK_ELEMENTS_PER_THREAD * torch.get_num_threads(), _MAX_BLOCK_ELEMENTS)
    elements = threads_share if tp is None else _BLOCK_ELEMENTS_SPLIT
    return max(1, min(rows, elements // max(columns, 1)))


def pieces(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `range(total)`."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


WORKSPACE = Workspace()
"""Buffers of logits that outlive a call."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Which tokens of a micro-batch count."""

    total: int
    kept: Tensor | None
    """Their indices; None if all do."""
    count: Tensor
    """How many, int64."""

    @classmethod
    def select(cls, total: int, keep: Tensor | None, device: torch.device) -> "Tokens":
        """Read the mask. One that lies on the host is read there; reading a GPU's waits for all work queued before."""
        if keep is None:
            return cls(total, None, torch.full((), total, device=device))
        kept = keep.nonzero().flatten()
        count = torch.full((), kept.numel(), device=device)
        return cls(total, None if kept.numel() == total else kept.to(device, non_blocking=True), count)

    def of(self, x: Tensor) -> Tensor:
        """The kept rows."""
        return x if self.kept is None else x.index_select(0, self.kept)

    def spread(self, x: Tensor) -> Tensor:
        """The inverse of `of`: all rows, 0 where masked."""
        return x if self.kept is None else x.new_zeros(self.total, *x.shape[1:]).index_copy_(0, self.kept, x)


@dataclass(slots=True)
class LinearGradient:
    """Gradients of `logits = hidden @ weight.T`, filled chunk by chunk from the gradient of the logits."""

    hidden: Tensor
    weight: Tensor
    """This rank's rows that belong to real tokens, `[columns, h]`."""
    d_hidden: Tensor | None
    d_weight: Tensor | None
    """`[V, h]`: in the weight's dtype when one chunk writes it, in the wide one when several add to it, or the buffer
    that the caller gave."""
    adding: bool
    """Whether chunks add to it instead of writing it."""

    @classmethod
    def begin(cls, hidden: Tensor, weight: Tensor, *, layer: "OutputLayer", several: bool) -> "LinearGradient":
        """Nothing added yet; `several`: chunks will follow."""
        d_hidden = torch.empty_like(hidden) if layer.wanted[0] else None
        d_weight = layer.weight_gradient if layer.wanted[1] else None
        if layer.wanted[1] and d_weight is None:
            dtype = wide_dtype(weight.dtype) if several else weight.dtype
            d_weight = weight.new_zeros(layer.columns, weight.shape[1], dtype=dtype)
        return cls(hidden, weight, d_hidden, d_weight, several or layer.weight_gradient is not None)

    @property
    def wanted(self) -> bool:
        """Whether there is anything to fill."""
        return self.d_hidden is not None or self.d_weight is not None

    def add(self, rows: slice, d_logits: Tensor) -> None:
        """Take in the gradient of one chunk's logits."""
        if self.d_hidden is not None:
            target = self.d_hidden[rows]
            in_pieces = d_logits.device.type == "cpu" and torch.get_num_threads() > 1
            for piece in pieces(d_logits.shape[0], _HIDDEN_GRAD_ROWS if in_pieces else d_logits.shape[0]):
                linear_input_gradient(d_logits[piece], self.weight, out=target[piece])
        if self.d_weight is None:
            return
        d_weight = self.d_weight[: self.weight.shape[0]]
        if not self.adding:
            torch.mm(d_logits.t(), self.hidden[rows], out=d_weight)
        elif d_weight.dtype == d_logits.dtype:
            d_weight.addmm_(d_logits.t(), self.hidden[rows])
        elif product_adds_to_float32(d_logits.device, d_logits.dtype):
            add_product(d_weight, d_logits.t(), self.hidden[rows])
        else:
            on_cpu = d_logits.device.type == "cpu"
            for piece in pieces(d_logits.shape[1], _WEIGHT_GRAD_ROWS if on_cpu else _WEIGHT_GRAD_ROWS_ON_GPU):
                d_weight[piece] += torch.mm(d_logits[:, piece].t(), self.hidden[rows])

    def finish(self, layer: "OutputLayer") -> tuple[Tensor | None, Tensor | None]:
        """Gradients in the shapes and dtypes of the arguments: all tokens, all columns, summed over ranks.

        None for the weight if the caller has its gradient already.
        """
        d_hidden, d_weight = self.d_hidden, self.d_weight
        if d_hidden is not None:
            if layer.tp is not None:
                d_hidden = sum_over(d_hidden.to(wide_dtype(d_hidden.dtype)), layer.tp).to(self.hidden.dtype)
            d_hidden = layer.tokens.spread(d_hidden)
        if d_weight is None or d_weight is layer.weight_gradient:
            return d_hidden, None
        return d_hidden, d_weight.to(self.weight.dtype)


class ChunkLoss(Protocol):
    """A loss over the vocabulary, seen by the output layer."""

    @property
    def logits_held(self) -> int:
        """Buffers of logits that exist at one time, the student's included."""
        ...

    @property
    def scratch_held(self) -> int:
        """Further buffers of a block, in the wide dtype, that torch's operations need; Triton's kernels need none."""
        ...

    @property
    def sums(self) -> int:
        """How many numbers it returns."""
        ...

    def __call__(self, logits: Tensor, chunk: slice, *, want_gradient: bool) -> Tensor:
        """Sums over a chunk's tokens, float64 and the same on every rank; the loss itself comes first.

        `chunk` are its rows among the kept tokens. `logits` `[rows, columns]` are overwritten: with the gradient of the
        loss, if that is wanted.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputLayer:
    """How hidden states become logits: which tokens, which columns, in what pieces, shared with whom."""

    tokens: Tokens
    real: int
    """Columns of this rank's shard that belong to real tokens."""
    columns: int
    chunk_tokens: int | None
    tp: ProcessGroup | None
    wanted: tuple[bool, bool]
    """Whether hidden states and weight need a gradient."""
    weight_gradient: Tensor | None = None
    """`[V, h]`: where the weight's gradient is added, instead of going to autograd."""

    @classmethod
    def of(  # noqa: PLR0917 - the arguments of every fused loss, in their order
        cls,
        hidden: Tensor,
        weight: Tensor,
        keep: Tensor | None,
        vocab_size: int,
        chunk_tokens: int | None,
        tp: ProcessGroup | None,
        weight_gradient: Tensor | None = None,
    ) -> "OutputLayer":
        """The layer of `hidden` `[N, h]` and `weight` `[V, h]`; see `fused_linear_kd` for the arguments."""
        grad = torch.is_grad_enabled()
        return cls(
            tokens=Tokens.select(hidden.shape[0], keep, hidden.device),
            real=real_columns(weight.shape[0], vocab_size=vocab_size, tp=tp),
            columns=weight.shape[0],
            chunk_tokens=chunk_tokens,
            tp=split_group(tp),
            wanted=(grad and hidden.requires_grad, grad and weight.requires_grad),
            weight_gradient=weight_gradient,
        )

    @property
    def first(self) -> int:
        """Global id of this rank's first token."""
        return group_rank(self.tp) * self.columns

    def rows_of_chunk(self, hidden: Tensor, loss: ChunkLoss) -> int:
        """Tokens per chunk of `hidden` `[kept, h]`."""
        bytes_per_logit = loss.logits_held * hidden.dtype.itemsize
        if hidden.device.type != "cpu" and not kernels_run(hidden.device, hidden.dtype):
            bytes_per_logit += loss.scratch_held * wide_dtype(hidden.dtype).itemsize
        return chunk_rows(hidden.shape[0], self.columns, bytes_per_logit, self.chunk_tokens, hidden.device)

    def blocks(self, logits: Tensor) -> Iterator[slice]:
        """Rows of a chunk that are worked on at one time."""
        yield from pieces(logits.shape[0], block_rows(logits.shape[0], self.columns, logits.device, self.tp))

    def apply(self, hidden: Tensor, weight: Tensor, loss: ChunkLoss) -> tuple[Tensor, ...]:
        """The loss's sums in the dtype that sums are taken in; the first has a gradient, the others are detached."""
        result: tuple[Tensor, ...] = autograd.apply(_FusedOutputLayer, hidden, weight, loss, self)
        return result


class _FusedOutputLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, all_hidden: Tensor, all_weight: Tensor, loss: ChunkLoss, layer: OutputLayer
    ) -> tuple[Tensor, ...]:
        hidden, weight = layer.tokens.of(all_hidden), all_weight[: layer.real]
        rows = layer.rows_of_chunk(hidden, loss)
        gradient = LinearGradient.begin(hidden, weight, layer=layer, several=rows < hidden.shape[0])
        sums = torch.zeros(loss.sums, dtype=torch.float64, device=hidden.device)
        for chunk in pieces(hidden.shape[0], rows):
            logits = project("student", hidden[chunk], weight)
            sums += loss(logits, chunk, want_gradient=gradient.wanted)
            gradient.add(chunk, logits)
        ctx.save_for_backward(*gradient.finish(layer))
        ctx.factor_is_one = gradient.d_weight is not None and gradient.d_weight is layer.weight_gradient
        loss_sum, *rest = (value.clone() for value in sums.to(wide_dtype(hidden.dtype)).unbind())
        ctx.mark_non_differentiable(*rest)
        return loss_sum, *rest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if ctx.factor_is_one:
            _check_one(grads[0])
        return scaled(d_hidden, grads[0]), scaled(d_weight, grads[0]), None, None


def project(name: str, hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits of a chunk of tokens `[rows, columns]`, in a reused buffer unless the library brings its own memory.

    A GPU's rows begin at aligned places.
    """
    if suits_onednn(hidden, weight):
        return linear(hidden, weight, wide=True)
    rows, columns = hidden.shape[0], weight.shape[0]
    multiple = 1 if hidden.device.type == "cpu" else _ROW_ELEMENTS_ON_GPU
    buffer = WORKSPACE.take(name, (rows, math.ceil(columns / multiple) * multiple), hidden.dtype, hidden.device)
    return torch.mm(hidden, weight.t(), out=buffer[:, :columns])


@cache
def product_adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch can add a product of 16-bit matrices to a float32 one on this device: it is asked to, once."""
    if device.type == "cpu":
        return False
    try:
        ones = torch.ones(16, 16, dtype=dtype, device=device)
        add_product(torch.zeros(16, 16, device=device), ones, ones)
    except (AttributeError, RuntimeError):
        return False
    return True


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b` with a float32 total and 16-bit operands; nothing is rounded to 16 bits in between."""
    torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)


def widened(name: str, logits: Tensor) -> Tensor:
    """The block itself if its dtype is one to sum in, else a copy in a reused buffer; meant to be overwritten."""
    wide = wide_dtype(logits.dtype)
    if logits.dtype == wide:
        return logits
    return WORKSPACE.take(name, (logits.shape[0], logits.shape[1]), wide, logits.device).copy_(logits)


def label_columns(labels: Tensor, *, columns: int, real: int, tp: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Column of each label in this rank's shard, 0 where it is not among the real ones, and whether it is."""
    local = labels - group_rank(tp) * columns
    mine = (local >= 0) & (local < real)
    return torch.where(mine, local, 0), mine


def label_logits(logits: Tensor, local: Tensor, mine: Tensor) -> Tensor:
    """Logits at columns, one or several of each row, in the wide dtype; 0 where they are another rank's."""
    if not logits.shape[1]:
        return torch.zeros(mine.shape, dtype=wide_dtype(logits.dtype), device=logits.device)
    column = local if local.dim() == 2 else local.unsqueeze(1)
    picked = logits.gather(1, column).view(mine.shape)
    return torch.where(mine, picked.to(wide_dtype(logits.dtype)), 0)


def labelled(values_N: Tensor, found_RN: Tensor) -> Tensor:
    """The values, NaN where a kept token's label is no token of the vocabulary: a wrong label must not pass unseen."""
    return torch.where(found_RN.sum(0) == 1, values_N, torch.nan)


def row_max(x: Tensor, out: Tensor) -> Tensor:
    """Maximum of each row; EMPTY for rows without columns."""
    if x.shape[1]:
        torch.amax(x, -1, out=out)
    else:
        out.fill_(EMPTY)
    return out


def share(peak: Tensor, mass: Tensor, tp: ProcessGroup | None) -> Tensor:
    """What turns a rank's `exp(x - peak)` into probabilities over the complete vocabulary; `mass` is their sum.

    Any shape, the same in and out.
    """
    return mass.reciprocal() if tp is None else log_share(peak, mass, tp).exp()


def log_share(peak: Tensor, mass: Tensor, tp: ProcessGroup | None) -> Tensor:
    """What turns a rank's `x - peak` into log-probabilities: finite where `share` itself would be too small."""
    if tp is None:
        return -mass.log()
    both = gather(torch.stack([peak, mass]).double(), tp)
    return (peak - torch.logsumexp(both[:, 0] + both[:, 1].log(), 0)).to(mass.dtype)


def _check_one(factor: Tensor) -> None:
    """The weight's gradient was added in the forward pass; it is too late for a factor."""
    if factor.device.type != "cpu":
        torch._assert_async(factor == 1)  # fails at the next wait, and costs none
    elif factor.item() != 1:
        raise ValueError(f"weight_gradient was filled for a loss with a factor of 1, not {factor.item()}")


def scaled(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    """The gradient times the incoming scalar. Where looking is free, a factor of 1 costs nothing."""
    if gradient is None or (factor.device.type == "cpu" and factor.item() == 1):
        return gradient
    return gradient * factor.to(gradient.dtype)
