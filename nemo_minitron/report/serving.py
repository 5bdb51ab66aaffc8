"""What stands in the way of serving an exported Hugging Face folder with vLLM or llama.cpp.

A pruned model has sizes that no published one has, and some classes of both engines derive one size from others. What
they ask for was read in their sources (vLLM) or found by running them (llama.cpp): docs/serving.md.
"""

import json
from collections.abc import Callable, Iterator

from nemo_minitron.arch.families.hybrid import first_mamba
from nemo_minitron.arch.layer import Attention, Moe
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.source import TensorSource

VLLM = "vLLM 0.33.0"
LLAMA_CPP = "llama.cpp 0.5.0"

UNTRIED = ("olmoe", "bamba")
"""Families that neither was done for; nor was it for Nemotron-H with experts (Nemotron 3)."""

_Objections = Callable[[TensorSource], Iterator[str]]


def objections(engine: str, source: TensorSource) -> list[str]:
    """Why an engine cannot serve a model, or would compute something else, as clauses; empty if nothing is known.

    Args:
        engine: `VLLM` or `LLAMA_CPP`.
        source: The model as it is exported.
    """
    if source.family in UNTRIED or (source.family == "nemotron_h" and source.spec.has_experts):
        return ["nobody has tried that with this family, or read what the engine asks of it"]
    return list(_ENGINES[engine](source))


def _vllm(source: TensorSource) -> Iterator[str]:
    spec, family = source.spec, source.family
    if family == "dots1":
        yield "it has no class for `dots1` (0.23 was the last one that had)"
    if family in ("qwen2", "qwen2_moe"):
        yield from _derived_head_size(spec)
    if family == "qwen2_moe" and not spec.qkv_bias:
        yield "its class always has biases on queries, keys and values"


def _llama_cpp(source: TensorSource) -> Iterator[str]:
    spec, family = source.spec, source.family
    if family in ("qwen2", "qwen2_moe", "phi3", "nemotron"):
        yield from _derived_head_size(spec)
    if family in ("qwen2_moe", "dots1", "nemotron") and spec.tied_embeddings:
        yield "its class has an output layer of its own, and here the embeddings serve as one"
    if spec.sliding_window is not None and family in ("mistral", "mixtral", "phi3"):
        window = f"the last {spec.sliding_window:,}"
        yield f"its attention sees all positions, not {window}: longer texts come out differently"
    if family in ("gemma", "nemotron", "phi3") and not _has_sentencepiece(source):
        yield "its converter needs the tokenizer as a file `tokenizer.model`, which the base model came without"
    if family == "gemma" and not spec.tied_embeddings:
        yield "it takes the embeddings for the output layer, which is another one here"
    if family == "gemma3":
        yield from _llama_cpp_gemma3(spec)
    if (mamba := first_mamba(spec)) is not None and mamba.inner_size % 64:
        yield f"its converter takes multiples of 64 Mamba channels, not {mamba.inner_size:,}"
    yield from _llama_cpp_experts(spec, family)


def _llama_cpp_gemma3(spec: ModelSpec) -> Iterator[str]:
    local = [isinstance(layer.mixer, Attention) and layer.mixer.local for layer in spec.layers]
    if local != [bool((index + 1) % 6) for index in range(spec.num_layers)]:
        yield "its class lets every sixth layer see all positions, and here other ones do (`layer_types`)"
    attention = _attention(spec)
    if spec.query_scalar is not None and attention is not None:
        of_27b = spec.num_layers == 62 and int(attention.head_size(spec.hidden_size)) == spec.query_scalar
        if not of_27b:
            yield f"it divides attention scores by the root of `head_dim`, not by that of {spec.query_scalar:g}"


def _llama_cpp_experts(spec: ModelSpec, family: str) -> Iterator[str]:
    experts = next((part for layer in spec.layers if isinstance(part := layer.feed_forward, Moe)), None)
    if experts is None:
        return
    if family in ("qwen2_moe", "qwen3_moe"):
        if not all(layer.has_experts for layer in spec.layers):
            yield "its class has experts in every layer"
        if experts.normalize_top_k != (family == "qwen3_moe"):
            always = "always" if family == "qwen3_moe" else "never"
            yield f"it {always} divides the weights of the chosen experts by their sum (`norm_topk_prob`)"
    attention = _attention(spec)
    if family == "dots1" and attention is not None and attention.shares_keys:
        yield "its class has as many keys and values as queries (`num_key_value_heads`)"


def _derived_head_size(spec: ModelSpec) -> Iterator[str]:
    attention = _attention(spec)
    if attention is not None and (derived := attention.head_size(spec.hidden_size)) != spec.head_dim:
        yield (
            f"its class takes the hidden size divided by the number of heads for the size of a head, here {derived:g}, "
            f"and not `head_dim` = {spec.head_dim}"
        )


def _attention(spec: ModelSpec) -> Attention | None:
    return next((layer.mixer for layer in spec.layers if isinstance(layer.mixer, Attention)), None)


def _has_sentencepiece(source: TensorSource) -> bool:
    """Whether there is `tokenizer.model`; Phi-4, of the same class as Phi-3, has byte-level BPE and needs none."""
    files = source.tokenizer_files()
    if "tokenizer.model" in files:
        return True
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    return source.family == "phi3" and settings.get("tokenizer_class") == "GPT2Tokenizer"


_ENGINES: dict[str, _Objections] = {VLLM: _vllm, LLAMA_CPP: _llama_cpp}
