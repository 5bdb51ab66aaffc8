"""Qwen3 (dense): Llama's shape with an RMSNorm on each query and key head."""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.arch.families.base import LLAMA_LIKE_NAMES, QK_NORM_NAMES, Family
from nemo_minitron.arch.families.common import read_common, write_common
from nemo_minitron.arch.spec import ModelSpec

_HEAD_DIM = 128  # what Qwen3Config assumes


def _read(config: Mapping[str, Any]) -> ModelSpec:
    return read_common(config, family="qwen3", default_head_dim=_HEAD_DIM, qk_norm=True)


def _write(spec: ModelSpec) -> dict[str, Any]:
    extra = {"attention_bias": False, "use_sliding_window": False}
    return write_common(spec, model_type="qwen3", architecture="Qwen3ForCausalLM") | extra


QWEN3 = Family(
    name="qwen3",
    hf_model_type="qwen3",
    hf_architecture="Qwen3ForCausalLM",
    hf_names=LLAMA_LIKE_NAMES | QK_NORM_NAMES,
    read=_read,
    write=_write,
    settings=("sliding_window",),
    fixed={"qk_norm": True},
    free=("tied_embeddings", "rope_scaling"),
)
