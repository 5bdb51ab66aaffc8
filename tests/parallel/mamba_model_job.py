"""What a rank does: Megatron-Core's own MambaModel saves itself, as Megatron-LM and NeMo 2 save hybrids.

It uses megatron.core alone (with CUDA's answers replaced), none of our runtime or model. Modules that it cannot be
built without are stand-ins: Transformer Engine (`tests/support/engine`) and mamba-ssm, of which the gated norm's weight
is all that a checkpoint sees.
"""

import argparse
import hashlib
import importlib.util
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

PATTERN = "M-E*ME*-"
SIZES: dict[str, Any] = {
    "num_layers": len(PATTERN),
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 6,
    "mamba_num_groups": 4,
    "mamba_state_dim": 5,
}
EXPERTS: dict[str, Any] = {
    "moe_ffn_hidden_size": 12,
    "moe_router_topk": 2,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_dtype": "fp32",
    "moe_router_num_groups": 1,
    "moe_router_group_topk": 1,
    "moe_router_load_balancing_type": "none",
    "moe_shared_expert_intermediate_size": 20,
}
NUM_EXPERTS = 3
_GROUPED = re.compile(r"\.experts\.(linear_fc\d)\.weight(\d+)$")
"""How grouped products of Transformer Engine call the weights of each expert."""
VOCAB, ROWS = 40, 64
ENGINE = Path(__file__).parents[1] / "support" / "engine"
REPLICATED = ("layer_norm_weight", "final_norm.weight", "pre_mlp_layernorm.weight", "router.weight", "expert_bias")


def save_hybrids(folder: str) -> dict[str, dict[str, Any]]:
    """Save at tensor parallel 2 as both formats, and at pipeline parallel 2 as Megatron-LM's.

    Returns:
        This rank's parameters by layout ("tensor", "pipeline") and name, as numpy arrays; layers by their number in the
        complete model, experts by theirs.
    """
    _stand_ins()
    import torch
    from megatron.core import parallel_state

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    found = {}
    for layout, (tensor, pipeline) in {"tensor": (2, 1), "pipeline": (1, 2)}.items():
        parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
        model = _model(tensor, pipeline)
        found[layout] = _fill(model)
        _save(model, Path(folder) / layout / "iter_0000100", prefix="", common=_common())
        if layout == "tensor":
            _save(model, Path(folder) / "nemo2" / "weights", prefix="module.", common={})
        parallel_state.destroy_model_parallel()
    return found


def _stand_ins() -> None:
    sys.path.insert(0, str(ENGINE))
    triton = "mamba_ssm.ops.triton"
    names = {
        f"{triton}.selective_state_update": ("selective_state_update",),
        f"{triton}.ssd_combined": ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
        f"{triton}.layernorm_gated": (),
    }
    for name in ("mamba_ssm", "mamba_ssm.ops", triton, *names):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__spec__ = importlib.util.spec_from_loader(name, None)
        for kernel in names.get(name, ()):
            setattr(sys.modules[name], kernel, None)
    sys.modules[f"{triton}.layernorm_gated"].RMSNorm = _gated_norm()


def _gated_norm() -> type:
    import torch

    class RMSNorm(torch.nn.Module):
        """The parameter of mamba-ssm's."""

        def __init__(self, size: int, *, eps: float, group_size: int, device: Any, dtype: Any, **_: Any) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(size, device=device, dtype=dtype))

    return RMSNorm


def _model(tensor: int, pipeline: int) -> Any:
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.mamba import MambaModel
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
    from megatron.core.ssm import mamba_mixer
    from megatron.core.transformer import TransformerConfig

    class Generators:
        """In place of those of CUDA."""

        def fork(self, *_: Any) -> Any:
            return nullcontext()

    mamba_mixer.get_cuda_rng_tracker = Generators
    config = TransformerConfig(
        **SIZES,
        **EXPERTS,
        num_moe_experts=NUM_EXPERTS,
        moe_grouped_gemm=True,
        moe_token_dispatcher_type="allgather",
        is_hybrid_model=True,
        activation_func=lambda x: torch.relu(x).square(),
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
    )
    return MambaModel(
        config,
        mamba_stack_spec,
        vocab_size=ROWS,
        max_sequence_length=64,
        hybrid_override_pattern=PATTERN,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def _fill(model: Any) -> dict[str, Any]:
    import torch
    from torch import distributed

    first = model.decoder.layers[0].layer_number - 1
    found = {}
    biases = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("expert_bias")]
    for local, parameter in (*model.named_parameters(), *biases):
        name = _whole_name(local, first)
        part = "" if name.endswith(REPLICATED) else distributed.get_rank()
        seed = int.from_bytes(hashlib.sha256(f"{name} {part}".encode()).digest()[:4])
        with torch.no_grad():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
        found[name] = parameter.detach().numpy()
    return found


def _whole_name(name: str, first: int) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + first)
    return _GROUPED.sub(r".experts.local_experts.\2.\1.weight", ".".join(parts))


def _save(model: Any, folder: Path, *, prefix: str, common: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing
    from torch import distributed

    if distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(prefix=prefix) | common, str(folder), _strategy())
    distributed.barrier()


def _strategy() -> Any:
    """Megatron's torch_dist form by torch's own writer: Megatron's starts processes, which a test's process cannot."""
    from megatron.core.dist_checkpointing.strategies import torch as torch_dist
    from torch.distributed import checkpoint

    class InProcess(torch_dist.TorchDistSaveShardedStrategy):
        def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
            state, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
            planner = torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
            checkpoint.save(
                torch_dist.mcore_to_pyt_state_dict(state, False),
                storage_writer=checkpoint.FileSystemWriter(checkpoint_dir, thread_count=1),
                planner=planner,
            )

    return InProcess("torch_dist", 1)


def _common() -> dict[str, Any]:
    """What Megatron-LM saves beside the weights."""
    arguments = argparse.Namespace(
        **SIZES,
        group_query_attention=True,
        hybrid_override_pattern=PATTERN,
        hybrid_attention_ratio=0.0,
        hybrid_mlp_ratio=0.0,
        is_hybrid_model=True,
        position_embedding_type="none",
        max_position_embeddings=64,
        normalization="RMSNorm",
        norm_epsilon=1e-5,
        squared_relu=True,
        swiglu=False,
        add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
        vocab_size=VOCAB,
        padded_vocab_size=ROWS,
        **EXPERTS,
        num_experts=NUM_EXPERTS,
    )
    return {"args": arguments, "checkpoint_version": 3.0, "iteration": 100}
