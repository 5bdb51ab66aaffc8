"""The student and the teacher: Megatron's GPT with a choice of what its last stage returns."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from nemo_minitron.arch.axes import Axis
from nemo_minitron.arch.spec import LinearScaling, ModelSpec, YarnScaling
from nemo_minitron.arch.weights import LAYER_PREFIX, Weight, weight_named
from nemo_minitron.megatron.experts import experts_of
from nemo_minitron.megatron.layers import canonical_names

_LOCAL_EXPERT = re.compile(r"local_experts\.(\d+)\.(.*)")
_GROUPED_EXPERT = re.compile(r"(?<=mlp\.experts\.)(linear_fc[12]\.weight)(\d+)")
"""Weights of experts that are multiplied together."""
_BUFFER = "router.expert_bias"


class MinitronGPT(GPTModel):
    """One pipeline chunk of a model.

    Attributes:
        spec: Architecture of the complete model.
        from_engine: Whether its attention and MLPs are Transformer Engine's.
        output: What the last stage returns: "logits" `[b, s, V/tp]`, or "hidden" states `[s, b, h]` after the final
            norm, which losses fused with the output layer take. Other stages return their hidden states.
    """

    def __init__(
        self,
        *args: Any,
        spec: ModelSpec,
        from_engine: bool = False,
        output: Literal["logits", "hidden"] = "logits",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.spec = spec
        self.from_engine = from_engine
        self.output = output
        # Megatron knows Llama 3's scaling with one set of constants; the spec may have others.
        self.rotary_pos_emb.inv_freq = rotary_frequencies(spec).to(self.rotary_pos_emb.inv_freq.device)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Megatron's forward pass; in inference mode too, what layers cache can be used by training afterwards."""
        with outside_inference_mode():
            output: Tensor = super().forward(*args, **kwargs)
        return output

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        embedded, *rest = super()._preprocess(*args, **kwargs)
        if not self.pre_process:
            return embedded, *rest
        if self.spec.scaled_embeddings:
            # Rounded to the numbers of the model first, as it was trained.
            embedded = embedded * torch.tensor(self.spec.hidden_size**0.5, dtype=embedded.dtype)
        # A batch of one may come with strides that are not by the book, for which torch.matmul on a CPU copies the next
        # weight once per token.
        embedded = embedded.reshape(-1, embedded.shape[-1]).view(embedded.shape)
        recomputes = self.training and torch.is_grad_enabled() and self.config.recompute_granularity is not None
        if recomputes and not embedded.requires_grad:
            # A frozen embedding: Megatron recomputes only what has an input with a gradient, and drops that of others.
            embedded = embedded.detach().requires_grad_()
        return embedded, *rest

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.post_process or self.output == "logits":
            return super()._postprocess(hidden_states, *args, **kwargs)
        if self.config.sequence_parallel:
            # The loss adds the gradients of all ranks itself, so each rank only takes its own positions back.
            return gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return hidden_states

    def output_weight(self) -> nn.Parameter:
        """The output layer's weight on the last stage, `[V/tp, h]`; the embedding's if the two are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def named_weights(self) -> Iterator[tuple[Weight, nn.Parameter]]:
        """This rank's parameters with the rows of the weight table they belong to.

        The copy of a tied embedding that the last pipeline stage holds comes as the embedding. Weights that training
        leaves as they are (a router's correction bias) come too; they are buffers.
        """
        for name, parameter in self.named_parameters():
            yield weight_named(self.spec, self._canonical_name(name)), parameter
        for name, buffer in self.named_buffers():
            if name.endswith(_BUFFER):
                yield weight_named(self.spec, self._canonical_name(name)), cast("nn.Parameter", buffer)

    def _canonical_name(self, name: str) -> str:
        if name == "output_layer.weight" and self.share_embeddings_and_output_weights:
            return "embedding.word_embeddings.weight"
        if not name.startswith("decoder.layers."):
            return name
        index, _, rest = name.removeprefix("decoder.layers.").partition(".")
        layer: Any = self.decoder.layers[int(index)]
        if (experts := experts_of(layer)) is not None:
            first = experts.first
            # Numbered by rank in Megatron's modules, over the layer in canonical names.
            rest = _GROUPED_EXPERT.sub(r"local_experts.\2.\1", rest)
            rest = _LOCAL_EXPERT.sub(lambda found: f"local_experts.{int(found[1]) + first}.{found[2]}", rest)
        for local, canonical in canonical_names(layer.sizes).items():
            if rest.startswith(local):
                rest = canonical + rest.removeprefix(local)
                break
        return LAYER_PREFIX.format(i=layer.layer_number - 1) + rest


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """A block whose tensors may be kept for training; gradients stay on or off as they were.

    What layers cache in a forward pass (rotary tables, Transformer Engine's sequence lengths) is used by later training
    steps, which refuse tensors made in inference mode.
    """
    with_grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(with_grad):
        yield


def freeze_vocabulary(model: MinitronGPT) -> None:
    """Take embedding and output layer out of training, before the model is wrapped."""
    for weight, parameter in model.named_weights():
        if Axis.VOCAB in weight.row.axes:
            parameter.requires_grad_(False)


def unwrap(chunk: nn.Module) -> MinitronGPT:
    """The model inside its data-parallel wrapper, or itself."""
    while not isinstance(chunk, MinitronGPT):
        inner = chunk.module
        assert isinstance(inner, nn.Module), "wrappers have one"
        chunk = inner
    return chunk


def rotary_frequencies(spec: ModelSpec) -> Tensor:
    """Angle per position of each rotated channel pair, `[rotated / 2]`, fp32.

    Source: Su et al., arXiv:2104.09864, eq. 15. Llama 3.1 (`rope_type: llama3`) stretches wavelengths above
    `original / low_freq_factor` by `factor`, keeps those below `original / high_freq_factor`, and interpolates the ones
    between by how often they fit into the original context. YaRN (arXiv:2309.00071, section 3.2) interpolates by the
    channel instead, between the two that turn `beta_fast` and `beta_slow` times in the original context.
    """
    rotated = int(spec.head_dim * spec.rotary_percent)
    if not rotated:
        return torch.empty(0, device="cpu")
    # The device is explicit, so that they have values in a model that is built on `meta` too.
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device="cpu") / rotated
    frequencies = 1.0 / spec.rotary_base**exponents
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, YarnScaling):
        kept = _kept_by_yarn(scaling, rotated, spec.rotary_base)
        return frequencies * (kept + (1 - kept) / scaling.factor)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _kept_by_yarn(scaling: YarnScaling, rotated: int, base: float) -> Tensor:
    """How much of each channel pair's frequency stays, 1 to 0, `[rotated / 2]`."""

    def channel(turns: float) -> float:
        """The channel pair that turns so often in the original context."""
        return (
            rotated * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))
        )

    first = max(math.floor(channel(scaling.beta_fast)), 0)
    last = min(math.ceil(channel(scaling.beta_slow)), rotated - 1)
    pairs = torch.arange(rotated // 2, dtype=torch.float32, device="cpu")
    return 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
