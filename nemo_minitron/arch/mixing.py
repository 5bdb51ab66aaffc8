"""What mixers have between their projections: channels of queries, and what is remembered of a sequence."""

from nemo_minitron.arch.layer import Attention, Mamba
from nemo_minitron.arch.spec import ModelSpec


def query_channels(spec: ModelSpec) -> int:
    """Channels of all query heads of all layers."""
    return spec.head_dim * sum(mixer.num_attention_heads for mixer in _attentions(spec))


def key_channels(spec: ModelSpec) -> int:
    """Channels of the keys of a position, all layers together; of the values as many."""
    return spec.head_dim * sum(mixer.num_query_groups for mixer in _attentions(spec))


def state_size(spec: ModelSpec) -> int:
    """Numbers that the states of all Mamba layers hold of a sequence: for each channel of a head, the state's.

    Source: arXiv:2405.21060, section 2.
    """
    return sum(mixer.inner_size * mixer.mamba_state_dim for mixer in _mambas(spec))


def convolution_inputs(spec: ModelSpec) -> int:
    """Numbers that the convolutions of all Mamba layers remember of a sequence: of each channel, one for every tap.

    The taps' number less one would do; transformers, mamba-ssm and Megatron keep as many as there are taps.
    """
    return sum((mixer.inner_size + 2 * mixer.map_size) * mixer.conv_kernel for mixer in _mambas(spec))


def _attentions(spec: ModelSpec) -> list[Attention]:
    return [layer.mixer for layer in spec.layers if isinstance(layer.mixer, Attention)]


def _mambas(spec: ModelSpec) -> list[Mamba]:
    return [layer.mixer for layer in spec.layers if isinstance(layer.mixer, Mamba)]
