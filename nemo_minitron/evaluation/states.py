"""What a model computes, layer by layer, with one layer's weights in memory at a time.

So two checkpoints of a model can be compared where neither fits into memory: 8 billion parameters in fp32 take 32 GB, a
layer of them 0.9 GB and an embedding 2.1 GB.
"""

import ctypes
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemo_minitron.arch.layer import LayerSpec
from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.config.parallel import Precision
from nemo_minitron.evaluation import expert_parameters
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.model import MinitronGPT
from nemo_minitron.megatron.runtime import Runtime

States = dict[str, Tensor]
"""In order: "embedding", "layer 0", ..., each `[b, s, h]`, then "logits" `[b, s, V]`; fp32, on the CPU."""

_EMBEDDING = "embedding.word_embeddings.weight"
_CORRECTION = "e_score_correction_bias"


@torch.no_grad()
def megatron_states(source: TensorSource, tokens_BS: Tensor, runtime: Runtime) -> States:
    """States of a checkpoint under Megatron's layers, in fp32, on this rank alone.

    Args:
        source: The checkpoint.
        tokens_BS: Token ids `[b, s]`.
        runtime: A layout without tensor, pipeline or context parallelism.
    """
    spec, device = source.spec, runtime.device
    embedding = source.get(_EMBEDDING).to(device)
    # Megatron's order: positions first.
    x_SBH = embedding[tokens_BS.to(device)].float().transpose(0, 1).contiguous()
    del embedding
    if spec.scaled_embeddings:
        x_SBH = x_SBH * spec.hidden_size**0.5
    found = {"embedding": x_SBH.transpose(0, 1).cpu()}
    models: dict[LayerSpec, MinitronGPT] = {}
    for index, layer in enumerate(spec.layers):
        if layer not in models:
            models = {layer: _one_layer(source, layer, runtime)}  # the ones before are let go
        model = models[layer]
        _fill(model, source, index)
        angles = model.rotary_pos_emb(tokens_BS.shape[1])
        x_SBH, _ = model.decoder.layers[0](hidden_states=x_SBH.clone(), attention_mask=None, rotary_pos_emb=angles)
        found[f"layer {index}"] = x_SBH.transpose(0, 1).cpu()
        _give_back_memory()
    model = next(iter(models.values()))
    normed = model.decoder.final_layernorm(x_SBH).transpose(0, 1)
    head = _EMBEDDING if spec.tied_embeddings else "output_layer.weight"
    found["logits"] = _product(normed, source.get(head)).cpu()
    del model, models
    _give_back_memory()
    return found


def _product(x: Tensor, weight: Tensor, rows: int = 16384) -> Tensor:
    """`x @ weight.T` in fp32, some rows of the weight widened at a time."""
    return torch.cat([x @ part.to(x.device).float().T for part in torch.split(weight, rows)], dim=-1)


def _one_layer(source: TensorSource, layer: LayerSpec, runtime: Runtime) -> MinitronGPT:
    """A model of one layer, the final norm and hardly any vocabulary, in evaluation mode."""
    small = replace(source.spec, layers=(layer,), vocab_size=1)
    (model,) = build_chunks(small, runtime, Precision.FP32, trainable=False)
    evaluated: MinitronGPT = model.eval()
    return evaluated


def _fill(model: MinitronGPT, source: TensorSource, index: int) -> None:
    """Give a one-layer model the weights of layer `index`, and the final norm."""
    for weight, parameter in model.named_weights():
        if weight.layer is not None:
            parameter.copy_(source.get(weight.row.name.format(i=index, e=weight.expert)))
        elif weight.name.startswith("decoder.final_layernorm"):
            parameter.copy_(source.get(weight.name))


@torch.no_grad()
def transformers_states(folder: Path, tokens_BS: Tensor) -> States:
    """States of a Hugging Face folder as `transformers` computes them, in fp32 on the CPU.

    The model is built without its weights. Each module's are read when it is called, by the `safetensors` library, and
    dropped when it returns. Nothing of this package's readers takes part.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _parameters_without_memory():
        config = AutoConfig.from_pretrained(folder)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"  # grouped products want sizes that are multiples of 16 bytes
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    _read_when_called(model, _reader(folder, model))
    layers = model.get_decoder().layers
    found: States = {}

    def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found["embedding"] = (args[0] if args else kwargs["hidden_states"]).detach().clone()

    def keep_output(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()
            _give_back_memory()

        return keep

    layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)
    for index, layer in enumerate(layers):
        layer.register_forward_hook(keep_output(f"layer {index}"))
    found["logits"] = model(tokens_BS, use_cache=False).logits.float()
    return found


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Parameters are made on the device "meta"; buffers (rotary frequencies, scales) are real."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _read_when_called(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    for prefix, module in model.named_modules():
        names = [name for name, parameter in module.named_parameters(recurse=False) if parameter is not None]
        if not names:
            continue
        if isinstance(bias := getattr(module, _CORRECTION, None), Tensor):  # a buffer, and trained all the same
            bias.copy_(read(f"{prefix}.{_CORRECTION}"))
        # Mamba mixers take the weights out of their convolution, and never call it.
        is_read = isinstance(module, nn.Conv1d)
        caller = model.get_submodule(prefix.rpartition(".")[0]) if is_read else module
        caller.register_forward_pre_hook(_filler(module, names, f"{prefix}.", read))
        caller.register_forward_hook(_dropper(module, names), always_call=True)


def _filler(module: nn.Module, names: list[str], prefix: str, read: Callable[[str], Tensor]) -> Callable[..., None]:
    def fill(*_: Any) -> None:
        for name in names:
            module._parameters[name] = nn.Parameter(read(prefix + name).float(), requires_grad=False)

    return fill


def _dropper(module: nn.Module, names: list[str]) -> Callable[..., None]:
    def drop(*_: Any) -> None:
        for name in names:
            parameter = module._parameters[name]
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    return drop


def _give_back_memory() -> None:
    """Return freed memory to the system, where the C library can.

    Training tells glibc to keep it (`megatron/runtime.py`); between layers of a model that does not fit, it must not.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # not glibc


def _reader(folder: Path, model: Any) -> Callable[[str], Tensor]:
    """Reads a parameter by name; a tied output layer's from the embedding's place."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    else:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            files = dict.fromkeys(file.keys(), "model.safetensors")
    inputs = model.get_input_embeddings()
    embedding = next(f"{name}.weight" for name, module in model.named_modules() if module is inputs)
    renamed = any(name.startswith("backbone.") for name in files)  # Nemotron-H's, whose class has other names

    def read(name: str) -> Tensor:
        if model.config.tie_word_embeddings and name == "lm_head.weight":
            name = embedding
        if renamed and name.startswith("model."):
            name = "backbone." + name.removeprefix("model.")
        return expert_parameters.parameter(name, files, stored)

    def stored(name: str) -> Tensor:
        with safe_open(folder / files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    return read
