"""GGUF files made from Hugging Face folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def _gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{_NAMES[module]}.{kind}"
    _, _, index, rest = module.split(".", 3)
    return f"blk.{index}.{_NAMES[rest]}.{kind}"


def _llama_cpp_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row order of llama.cpp's rotary kernel, a head at a time: first and second halves take turns."""
    halves = [head.reshape(2, -1, *rows.shape[1:]) for head in np.split(rows, heads)]
    return np.concatenate([row[None] for half in halves for pair in zip(*half, strict=True) for row in pair])


def make_gguf(
    folder: Path,
    out: Path,
    *,
    architecture: str = "llama",
    add_bos: bool = False,
    pre: str = "gpt-2",
    experts: int = 0,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    change: Callable[[str, np.ndarray], np.ndarray | None] = lambda name, data: data,
) -> Path:
    """A GGUF file of a Hugging Face folder, as llama.cpp's converter lays it out."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_license("apache-2.0")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if experts:
        writer.add_expert_count(experts)
    _add_tokenizer(writer, folder, add_bos=add_bos, pre=pre)
    for name, parameter in model.named_parameters():
        data: np.ndarray | None = parameter.detach().numpy()
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(name.split("_proj")[0][-1])
        if architecture == "llama" and heads and "self_attn" in name:
            data = _llama_cpp_order(data, heads)
        if (data := change(_gguf_name(name), data)) is None:
            continue
        quantise = data.ndim == 2 and data.shape[1] % 32 == 0
        if quantise and kind is not gguf.GGMLQuantizationType.F32:
            writer.add_tensor(_gguf_name(name), gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_gguf_name(name), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _add_tokenizer(writer: Any, folder: Path, *, add_bos: bool, pre: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if index in special else 1 for _, index in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template("{{ messages[0]['content'] }}")
