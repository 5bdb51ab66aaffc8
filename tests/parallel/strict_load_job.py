"""What a rank does: Megatron-Core's own model takes our weights, strictly, by Megatron-Core's own loader.

It uses megatron.core alone (with CUDA's answers replaced), none of our runtime or model, so it is a second opinion.
"""

from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {"layers": 4, "hidden": 64, "heads": 8, "groups": 4, "channels": 8, "ffn": 96, "vocab": 256}


def load_strictly(folders: dict[str, str], tensor: int, pipeline: int) -> dict[str, dict[str, Any]]:
    """This rank's parameters by folder and name, as numpy arrays; layers by their number in the complete model.

    Args:
        folders: Prefix of the keys to the folder of the weights.
        tensor: Tensor-parallel size.
        pipeline: Pipeline-parallel size.
    """
    import torch
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.validation import StrictHandling

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
    found: dict[str, dict[str, Any]] = {}
    for prefix, folder in folders.items():
        model = _model(tensor, pipeline)
        sharded = model.sharded_state_dict(prefix=prefix)
        loaded = dist_checkpointing.load(sharded, str(Path(folder)), strict=StrictHandling.RAISE_ALL)
        state = {name.removeprefix(prefix): value for name, value in loaded.items()}
        model.load_state_dict({name: value for name, value in state.items() if name not in _beside(folder)})
        first = model.decoder.layers[0].layer_number - 1
        found[prefix] = {
            _whole_name(name, first): parameter.detach().float().numpy() for name, parameter in model.named_parameters()
        }
    parallel_state.destroy_model_parallel()
    return found


def _beside(folder: str) -> set[str]:
    """Names that `common.pt` adds to what is loaded."""
    return {"args", "checkpoint_version", "iteration"} if "iter_" in folder else set()


def _whole_name(name: str, first: int) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + first)
    return ".".join(parts)


def _model(tensor: int, pipeline: int) -> Any:
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=SIZES["layers"],
        hidden_size=SIZES["hidden"],
        num_attention_heads=SIZES["heads"],
        num_query_groups=SIZES["groups"],
        kv_channels=SIZES["channels"],
        ffn_hidden_size=SIZES["ffn"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=SIZES["vocab"],
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
