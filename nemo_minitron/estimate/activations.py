"""What a forward pass keeps for the backward pass, counted tensor by tensor, in bytes.

For our own layers, on a CPU (checked against what a real step saves) and on a GPU, where their norms, attention and
Mamba scans are fused kernels, and for Transformer Engine's (after Korthikanti et al., arXiv:2205.05198, sec. 4, with
the fused attention kernel, which keeps no scores).
"""

from dataclasses import dataclass, replace

from nemo_minitron.arch.layer import LayerSpec, Mamba
from nemo_minitron.arch.spec import ModelSpec, Norm
from nemo_minitron.config.parallel import ParallelConfig, Precision, Recompute, mamba_split
from nemo_minitron.megatron.functional import QUERY_BLOCK
from nemo_minitron.megatron.placement import chunk_layers


def bytes_of(precision: Precision) -> int:
    """Bytes of a number."""
    return {Precision.BF16: 2, Precision.FP32: 4}[precision]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """A forward and a backward pass, as far as activations depend on it.

    Attributes:
        parallel: The layout, and what is computed again.
        precision: Numbers of weights and activations.
        micro_batch_size: Samples of a forward pass.
        sequence_length: Tokens of a sample.
        micro_batches: Forward passes of a step on one rank.
        engine: Whether layers are Transformer Engine's; they are ours otherwise.
        gpu: Whether it runs on GPUs, with Triton's kernels and mamba-ssm's.
    """

    parallel: ParallelConfig
    precision: Precision
    micro_batch_size: int
    sequence_length: int
    micro_batches: int
    engine: bool = True
    gpu: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one context-parallel rank."""
        return self.micro_batch_size * self.sequence_length // self.parallel.context

    def recomputing(self, recompute: Recompute) -> "Pass":
        """The same with other activations computed again."""
        return replace(self, parallel=self.parallel.model_copy(update={"recompute": recompute}))


def layer_activations(spec: ModelSpec, sizes: LayerSpec, step: Pass) -> int:
    """Bytes that one layer keeps for the backward pass of one micro-batch.

    Shapes in comments are a token's: H hidden, q query channels, k channels of all keys, F neurons of this rank.
    """
    element = bytes_of(step.precision)
    # Under sequence parallelism a rank keeps its own positions of what is not split by channels.
    outside = spec.hidden_size // (step.parallel.tensor if step.parallel.sequence_parallel else 1)
    if step.parallel.recompute is Recompute.FULL:
        return step.tokens * outside * element
    # A norm keeps its input [H], or what it normalised in fp32, and a number or two.
    normed = element if _norms_keep_input(spec, step) else 4
    norm = outside * normed + (8 if spec.norm.subtracts_mean else 4)
    linear_input = outside * element
    kept = 0
    if sizes.mixer is not None:
        kept += norm + linear_input + _mixer(spec, sizes, step)
    if sizes.feed_forward is not None and step.parallel.recompute is Recompute.SELECTIVE:
        # The checkpoint's input [H]; Transformer Engine's first linear of an MLP has its norm inside the checkpoint.
        kept += linear_input if step.engine and not sizes.has_experts else norm + linear_input
    elif sizes.feed_forward is not None:
        kept += norm + linear_input + _mlp(spec, sizes, step)
    if spec.post_norms:
        kept += len(sizes.parts) * (normed * spec.hidden_size + 4)
    return step.tokens * kept


def _norms_keep_input(spec: ModelSpec, step: Pass) -> bool:
    """Whether norms keep what enters them: Transformer Engine's, and PyTorch's fused RMSNorm, which ours are on a GPU.

    On a CPU ours keep what is normalised, and on a GPU zero-centred ones and LayerNorms their input in fp32.
    """
    return step.engine or (step.gpu and spec.norm is Norm.RMSNORM)


def own_layers(spec: ModelSpec, parallel: ParallelConfig, stage: int) -> frozenset[int]:
    """Layers of all model chunks on a pipeline stage."""
    ranges = chunk_layers(spec.num_layers, parallel)
    return frozenset(layer for layers in ranges[stage :: parallel.pipeline] for layer in layers)


def activations(spec: ModelSpec, step: Pass, stage: int) -> int:
    """Bytes on a rank of a pipeline stage at the peak of a step, without the buffers of the loss."""
    parallel, element = step.parallel, bytes_of(step.precision)
    chunks = parallel.virtual_pipeline or 1
    own = [spec.layers[layer] for layer in sorted(own_layers(spec, parallel, stage))]
    kept = sum(layer_activations(spec, sizes, step) for sizes in own)
    if stage > 0 and not _norms_keep_input(spec, step) and parallel.recompute is not Recompute.FULL:
        kept += step.tokens * spec.hidden_size * element  # what the stage before has sent
    kept = kept * _alive(step, stage) // chunks
    working = max((_working(spec, sizes, step) for sizes in own), default=0)
    # The last norm's [H] in fp32, its output and that one's gradient are gone when the last layer's turn comes.
    final = step.tokens * spec.hidden_size * (4 + 2 * element) if stage == parallel.pipeline - 1 else 0
    return kept + max(working, final)


def _working(spec: ModelSpec, sizes: LayerSpec, step: Pass) -> int:
    """Bytes that the backward pass of a layer takes beside what was kept: what it computes again, and gradients."""
    recompute = step.parallel.recompute
    element = bytes_of(step.precision)
    mlp = step.tokens * _mlp(spec, sizes, step)
    again = {
        Recompute.NONE: 0,
        Recompute.SELECTIVE: mlp,
        Recompute.FULL: layer_activations(spec, sizes, step.recomputing(Recompute.NONE)),
    }[recompute]
    # Gradients of [gate; up] and of what they are made of; those of the residual stream, into the MLP and past it.
    heads, groups, neurons = sizes.on_rank(step.parallel.tensor)
    in_mlp = again + step.tokens * (3 * neurons + 2 * spec.hidden_size) * element
    if step.gpu:
        return in_mlp
    # Attention's weights and their gradients, a block of queries at a time; the MLP's part is free again by then.
    scores = 3 * step.micro_batch_size * heads * min(QUERY_BLOCK, step.sequence_length) * step.sequence_length * element
    of_qkv = step.tokens * (2 * heads + 4 * groups) * spec.head_dim * element
    in_attention = scores + of_qkv + step.tokens * 2 * spec.hidden_size * element
    in_attention += 0 if recompute is Recompute.SELECTIVE else again - mlp
    return max(in_mlp, in_attention)


def _mixer(spec: ModelSpec, sizes: LayerSpec, step: Pass) -> int:
    """Bytes a token."""
    if isinstance(sizes.mixer, Mamba):
        return _mamba(sizes.mixer, step)
    return _attention(spec, sizes, step)


def _mamba(mamba: Mamba, step: Pass) -> int:
    """Bytes a token; `[d]` channels of all heads, `[c]` of the convolution, `[p]` of the projection, on this rank."""
    element, ranks = bytes_of(step.precision), step.parallel.tensor
    rows = {letters: count // ranks for letters, count in mamba.parts().items()}
    # Context-parallel ranks keep all positions of some heads, and those that share a group its maps each.
    copies = mamba_split(mamba.mamba_num_groups // ranks, step.parallel.context)[1]
    rows |= {letters: copies * rows[letters] for letters in ("B", "C")}
    inner, heads, projected = rows["x"], rows["dt"], sum(rows.values())
    convolved = inner + 2 * rows["B"]
    # p as it comes, c convolved, steps before and after softplus and clamp, d of the scan; in the gated norm in fp32
    # its input, the gate's SiLU, their product and what is normalised; the next linear's input [d].
    kept = (projected + convolved + inner + inner) * element + 12 * heads + 4 * 4 * inner
    if step.gpu and step.precision is not Precision.FP32:  # mamba-ssm's kernels, which compute a chunk's decay again
        return kept + 4 * heads
    chunk = min(mamba.chunk_size, step.sequence_length)
    # Of each head: the decay between all positions of a chunk in float64 and fp32, and times the scores.
    between = heads * chunk * (8 + 4 + 4) + rows["B"] // mamba.mamba_state_dim * chunk * 4
    # The convolution's input and sum in fp32; of the scan its input times steps and decay, both maps, and its parts.
    scanned = 4 * (2 * convolved + 4 * inner + 4 * rows["B"]) + 6 * 8 * heads
    states = 3 * 4 * inner * mamba.mamba_state_dim // chunk
    return kept + between + scanned + states


def _attention(spec: ModelSpec, sizes: LayerSpec, step: Pass) -> int:
    """Bytes a token; with `[q]` channels of queries and of the output, `[k]` of keys and of values, on this rank."""
    element = bytes_of(step.precision)
    heads, groups, _ = sizes.on_rank(step.parallel.tensor)
    queries, keys = heads * spec.head_dim, groups * spec.head_dim
    if step.engine:
        # q + 2k as they come, attention's output [q], which is the next linear's input too, one fp32 number per head.
        kept = (queries + 2 * keys + queries) * element + 4 * heads
        normed_heads = (queries + keys) * element + 4 * (heads + groups)
    else:
        # q + 2k as they come, q + k rotated, attention's output [q].
        kept = (queries + 2 * keys + queries + keys + queries) * element
        if step.gpu:
            # PyTorch's fused kernel: the rotated q in one piece, a number per head, and, where samples have to be put
            # side by side for the next linear, its output once more.
            kept += (queries + (queries if step.micro_batch_size > 1 else 0)) * element + 4 * heads
        normed = element if _norms_keep_input(spec, step) else 4
        normed_heads = (queries + keys) * normed + 4 * (heads + groups)
    return kept + (normed_heads if spec.qk_norm else 0)


def _mlp(spec: ModelSpec, sizes: LayerSpec, step: Pass) -> int:
    """Bytes a token, on this rank."""
    neurons = sizes.on_rank(step.parallel.tensor).neurons
    # The first linear's output, [gate; up] or [F], and the next one's input [F]; where gated, ours keeps act(gate) too.
    numbers = 2 if not spec.activation.gated else 3 if step.engine else 4
    return numbers * neurons * bytes_of(step.precision) + _routing(spec, sizes, step)


def _routing(spec: ModelSpec, sizes: LayerSpec, step: Pass) -> int:
    """Bytes a token that experts keep beside their neurons, if all are chosen equally often.

    For each expert that a token is routed to, what enters it [H], what leaves it [H], that times its weight [H], and
    its index; for all experts the router's scores and weights in fp32. Of grouped products this is an upper limit: they
    multiply the weight with the neurons.
    """
    if not sizes.has_experts:
        return 0
    experts = sizes.moe
    return experts.top_k * (3 * spec.hidden_size * bytes_of(step.precision) + 8) + 3 * 4 * experts.num_experts


def micro_batches_alive(step: Pass, stage: int) -> int:
    """Micro-batches whose graph a layer of a stage holds at one time, rounded up; with full recomputation, one."""
    if step.parallel.recompute is Recompute.FULL:
        return 1
    return -(-_alive(step, stage) // (step.parallel.virtual_pipeline or 1))


def _alive(step: Pass, stage: int) -> int:
    """Model chunks whose activations a rank holds at one time, counted over its micro-batches.

    1F1B keeps as many micro-batches alive as there are stages from here to the end; interleaving, of each chunk, some
    more (Narayanan et al., arXiv:2104.04473, sec. 2.2).
    """
    ahead = step.parallel.pipeline - stage
    chunks = step.parallel.virtual_pipeline or 1
    if chunks == 1:
        return min(step.micro_batches, ahead)
    warm_up = 2 * (ahead - 1) + (chunks - 1) * step.parallel.pipeline + 1
    return min(step.micro_batches * chunks, warm_up)
