"""A program: load a folder of ours into Megatron-Core's own model, strictly, and save that model as Megatron does.

Arguments: our checkpoint folder, a folder for Megatron's weights, a file for its state dict, "uniform" or "uneven".
It uses megatron.core alone, none of our runtime, so it is a second opinion on the format.
"""

import sys
from pathlib import Path

import torch


def main(folder: Path, saved: Path, state: Path, kind: str) -> None:
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    dist.init_process_group("gloo", init_method=f"file://{state}.rendezvous", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=8,
        ffn_hidden_size=96,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        use_cpu_initialization=True,
        hetereogenous_dist_checkpoint=kind == "uneven",
    )
    layers = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(config, layers, vocab_size=256, max_sequence_length=64, position_embedding_type="rope")
    sharded = model.sharded_state_dict(prefix="model.")
    loaded = dist_checkpointing.load(sharded, str(folder / "model_weights"), strict=StrictHandling.RAISE_ALL)
    model.load_state_dict({name.removeprefix("model."): value for name, value in loaded.items() if name != "common"})
    torch.save({name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}, state)
    dist_checkpointing.save(model.sharded_state_dict(prefix="model."), str(saved))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]), sys.argv[4])
