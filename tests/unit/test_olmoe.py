"""OLMoE: norms over all queries and over all keys of a token; published sizes, cuts along each axis, refusals."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import OlmoeConfig, PreTrainedModel
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM, OlmoeRMSNorm

from nemo_minitron.arch.axes import Axis
from nemo_minitron.arch.families import family_of_hf_config
from nemo_minitron.arch.spec import Norm
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.checkpoints.hf import open_hf, write_hf
from nemo_minitron.checkpoints.megatron_dist import write_megatron
from nemo_minitron.checkpoints.nemo1 import write_folder
from nemo_minitron.checkpoints.nemo2 import write_nemo2
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import TensorSource, stream
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import MinitronError, SpecError
from nemo_minitron.megatron import runtime
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import random_plan
from tests.support.expert_models import write_experts
from tests.support.loaded import megatron_model

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def here() -> Iterator[Runtime]:
    yield runtime.start(ParallelConfig(), seed=0)
    runtime.stop()


@torch.no_grad()
def megatron_logits(source: TensorSource, here: Runtime) -> Tensor:
    micro = MicroBatch.of(TOKENS, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    return megatron_model(source, here)(micro.tokens, micro.position_ids, None)


def test_published_sizes() -> None:
    """The paper (arXiv:2409.02060, table 1): 6.9B parameters, 1.3B active; the model's page: 6.92B and 1.28B."""
    published = OlmoeConfig(intermediate_size=1024)  # what allenai/OLMoE-1B-7B-0924 says besides the class's defaults
    spec = family_of_hf_config(published.to_dict()).read_config(published.to_dict())
    assert parameter_count(spec) / 1e9 == pytest.approx(6.92, abs=0.005)
    assert parameter_count(spec, active=True) / 1e9 == pytest.approx(1.28, abs=0.005)
    with torch.device("meta"):
        theirs = OlmoeForCausalLM(published)
    assert parameter_count(spec) == sum(parameter.numel() for parameter in theirs.parameters())


def as_transformers_computes_it(source: TensorSource) -> PreTrainedModel:
    """A student of any number of heads in transformers' class.

    Its norm over queries is as wide as the hidden size, whatever the heads are: both norms are made anew.
    """
    spec = source.spec
    experts, attention = spec.layers[0].moe, spec.layers[0].attention
    config = OlmoeConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=experts.expert_ffn_hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=attention.num_attention_heads,
        num_key_value_heads=attention.num_query_groups,
        head_dim=spec.head_dim,
        num_experts=experts.num_experts,
        num_experts_per_tok=experts.top_k,
        rms_norm_eps=spec.norm_eps,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = OlmoeForCausalLM(config)
    for layer in model.model.layers:
        for name, heads in (("q_norm", attention.num_attention_heads), ("k_norm", attention.num_query_groups)):
            setattr(layer.self_attn, name, OlmoeRMSNorm(heads * spec.head_dim, eps=spec.norm_eps))
    model.load_state_dict(_hugging_face_names(source))
    return model.eval()


def _hugging_face_names(source: TensorSource) -> dict[str, Tensor]:
    """Weights as the class holds them: a tensor for all experts of a layer."""
    found: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    head_dim, groups = source.spec.head_dim, source.spec.layers[0].attention.num_query_groups
    for name, tensor in stream(source):
        layer = name.removeprefix("decoder.layers.").partition(".")
        prefix, kind = f"model.layers.{layer[0]}.", layer[2]
        if ".local_experts." in name:
            key = "gate_up_proj" if kind.endswith("linear_fc1.weight") else "down_proj"
            experts.setdefault(f"{prefix}mlp.experts.{key}", []).append(tensor)
        elif kind == "self_attention.linear_qkv.weight":
            by_group = tensor.view(groups, -1, head_dim, tensor.shape[1])
            parts = {"q": by_group[:, :-2], "k": by_group[:, -2], "v": by_group[:, -1]}
            for letter, part in parts.items():
                found[f"{prefix}self_attn.{letter}_proj.weight"] = part.reshape(-1, tensor.shape[1])
        else:
            found[prefix + _PLAIN[kind] if kind in _PLAIN else _OUTSIDE[name]] = tensor
    return found | {key: torch.stack(tensors) for key, tensors in experts.items()}


_PLAIN = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.gate.weight",
}
_OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"hidden_size": 40},
        {"num_attention_heads": 2},
        {"num_query_groups": 1, "num_attention_heads": 2},
        {"num_layers": 2, "num_experts": 4, "expert_ffn_hidden_size": 16},
    ],
    ids=["nothing", "hidden size", "heads", "KV groups", "experts"],
)
def test_students_of_any_heads_are_what_the_class_would_compute(
    sizes: dict[str, int], tmp_path: Path, here: Runtime
) -> None:
    """Also those that it cannot hold, since hidden size and heads do not fit: with norms as wide as the heads are."""
    write_experts(tmp_path / "teacher", "olmoe")
    source = open_hf(tmp_path / "teacher")
    pruned = PrunedSource(source, random_plan(TargetConfig(**sizes), source.spec, seed=3))
    with torch.no_grad():
        expected = as_transformers_computes_it(pruned)(TOKENS, use_cache=False).logits
    torch.testing.assert_close(megatron_logits(pruned, here), expected, rtol=1e-4, atol=1e-4)
    if {"hidden_size", "num_attention_heads"} & set(sizes):
        with pytest.raises(SpecError, match=r"hidden_size = \d+ with \d heads of 12 channels"):
            write_hf(pruned, tmp_path / "student")
        return
    write_hf(pruned, tmp_path / "student")


def test_weights_of_the_norms_follow_their_heads(tmp_path: Path) -> None:
    write_experts(tmp_path / "teacher", "olmoe")
    source = open_hf(tmp_path / "teacher")
    sizes = {"num_attention_heads": 2, "num_query_groups": 1, "hidden_size": 24}
    plan = random_plan(TargetConfig(**sizes), source.spec, seed=3)
    write_hf(PrunedSource(source, plan), tmp_path / "student")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("teacher", "student"))
    for number, layer in enumerate(plan.layers):
        where = f"model.layers.{number}.self_attn."
        kept = {"q": layer.kept[Axis.HEAD], "k": layer.kept[Axis.KV_GROUP]}
        for part, heads in kept.items():
            norms, rows = (before[f"{where}{part}_{kind}.weight"].view(-1, 12, *more) for kind, more in _KINDS)
            assert torch.equal(after[f"{where}{part}_norm.weight"], norms[list(heads)].flatten())
            found = after[f"{where}{part}_proj.weight"]
            assert torch.equal(found, rows[list(heads)].flatten(0, 1)[:, list(plan.hidden)])


_KINDS = (("norm", ()), ("proj", (48,)))


@pytest.mark.parametrize("kind", ["nemo", "nemo2", "megatron"])
def test_every_format_holds_it(kind: str, tmp_path: Path) -> None:
    """Sizes that its class cannot hold too. Megatron's settings have no word for such norms: without ours, refused."""
    write_experts(tmp_path / "first", "olmoe", dtype=torch.bfloat16)
    source = open_hf(tmp_path / "first")
    pruned = PrunedSource(source, random_plan(TargetConfig(hidden_size=40), source.spec, seed=3))
    write = {"nemo": write_folder, "nemo2": write_nemo2, "megatron": write_megatron}[kind]
    for name, model in {"teacher": source, "student": pruned}.items():
        write(model, tmp_path / name)
        again = open_checkpoint(tmp_path / name)
        assert (again.spec, again.family) == (model.spec, "olmoe")
        for (key, tensor), (_, other) in zip(stream(model), stream(again), strict=True):
            assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), key
    if kind != "nemo":
        (ours,) = (tmp_path / "teacher").rglob("minitron.json")
        ours.unlink()
        with pytest.raises(MinitronError, match=re.escape("layernorm.weight")):
            open_checkpoint(tmp_path / "teacher")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"head_dim": 64}, "hidden_size = 2048 with 16 heads of 64 channels"),
        ({"num_local_experts": 8}, "num_experts = 64, but num_local_experts = 8"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change: dict[str, object], words: str) -> None:
    config = OlmoeConfig().to_dict()
    family_of_hf_config(config).read_config(config)
    with pytest.raises(SpecError, match=re.escape(words)):
        family_of_hf_config(config).read_config(config | change)


def test_norms_over_all_heads_are_of_one_kind() -> None:
    spec = family_of_hf_config({"model_type": "olmoe"}).read_config({"model_type": "olmoe"})
    assert type(spec).from_dict(spec.to_dict()) == spec
    with pytest.raises(SpecError, match="full_width_qk_norm = True with qk_norm = False"):
        replace(spec, qk_norm=False)
    with pytest.raises(SpecError, match="it is an RMSNorm"):
        replace(spec, norm=Norm.LAYERNORM)
