"""What stands in the way of vLLM and llama.cpp, as their sources have it, and what a card makes of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_minitron.arch.layer import LayerSpec, Moe
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.hf import open_hf
from nemo_minitron.report.model_card import model_card
from nemo_minitron.report.serving import LLAMA_CPP, VLLM, objections
from tests import tiny
from tests.support.checkpoints import UNIFORM, RandomSource
from tests.support.gguf_files import make_gguf

HEADS = UNIFORM.layer.sizes["num_attention_heads"]
SQUARE = replace(UNIFORM, hidden_size=HEADS * UNIFORM.head_dim)
NARROW = replace(SQUARE, hidden_size=SQUARE.hidden_size // 2)


class Source(RandomSource):
    """A model of any family, with a tokenizer."""

    def __init__(self, family: str, spec: ModelSpec, **files: bytes) -> None:
        super().__init__(spec)
        self.family, self._files = family, files

    def tokenizer_files(self) -> dict[str, bytes]:
        return {name.replace("__", "."): content for name, content in self._files.items()}


def against(engine: str, family: str, spec: ModelSpec, **files: bytes) -> list[str]:
    return objections(engine, Source(family, spec, **({"tokenizer__model": b""} | files)))


def experts(spec: ModelSpec, *, dense: int = 0, **traits: Any) -> ModelSpec:
    part = Moe(num_experts=4, expert_ffn_hidden_size=24, top_k=2, **traits)
    layers = [replace(layer, feed_forward=part) for layer in spec.layers[dense:]]
    return replace(spec, layers=(*spec.layers[:dense], *layers))


def of_groups(spec: ModelSpec, groups: int) -> ModelSpec:
    return replace(spec, layers=tuple(layer.with_sizes(num_query_groups=groups) for layer in spec.layers))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma", "nemotron_h"])
@pytest.mark.parametrize("engine", [VLLM, LLAMA_CPP])
def test_classes_that_read_head_dim_take_any_width(engine: str, family: str) -> None:
    assert against(engine, family, replace(NARROW, tied_embeddings=True)) == []


@pytest.mark.parametrize("engine", [VLLM, LLAMA_CPP])
def test_every_family_is_in_the_table_and_the_card_gives_no_command_that_nobody_looked_at(engine: str) -> None:
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith("| OLMoE, Bamba, Nemotron 3 Nano |"))
    assert row.count("not looked at") == 2
    for family, spec in (("olmoe", SQUARE), ("bamba", SQUARE), ("nemotron_h", experts(SQUARE))):
        assert against(engine, family, spec) == [
            "nobody has tried that with this family, or read what the engine asks of it"
        ]


@pytest.mark.parametrize(
    ("engine", "families"), [(VLLM, {"qwen2", "qwen2_moe"}), (LLAMA_CPP, {"qwen2", "qwen2_moe", "phi3", "nemotron"})]
)
def test_classes_that_derive_the_size_of_heads_ask_for_square_projections(engine: str, families: set[str]) -> None:
    traits = {"qkv_bias": True, "tied_embeddings": False}
    for family in sorted(families):
        assert against(engine, family, replace(SQUARE, **traits)) == []
        (why,) = against(engine, family, replace(NARROW, **traits))
        assert f"here {NARROW.hidden_size // HEADS}, and not `head_dim` = {NARROW.head_dim}" in why


@pytest.mark.parametrize(
    ("engine", "family", "spec", "words"),
    [
        (VLLM, "dots1", experts(SQUARE), "no class"),
        (VLLM, "qwen2_moe", experts(SQUARE), "biases"),
        (LLAMA_CPP, "nemotron", replace(SQUARE, tied_embeddings=True), "output layer of its own"),
        (LLAMA_CPP, "mistral", replace(SQUARE, sliding_window=4096), "4,096"),
        (LLAMA_CPP, "gemma", replace(SQUARE, tied_embeddings=False), "output layer"),
        (LLAMA_CPP, "gemma3", SQUARE, "every sixth"),
        (LLAMA_CPP, "qwen3_moe", experts(SQUARE, dense=1), "every layer"),
        (LLAMA_CPP, "qwen3_moe", experts(SQUARE, normalize_top_k=False), "always"),
        (LLAMA_CPP, "qwen2_moe", experts(replace(SQUARE, tied_embeddings=False)), "never"),
        (LLAMA_CPP, "dots1", experts(replace(of_groups(SQUARE, 1), tied_embeddings=False)), "as many keys"),
    ],
)
def test_what_else_a_class_has_otherwise(engine: str, family: str, spec: ModelSpec, words: str) -> None:
    (why,) = against(engine, family, spec)
    assert words in why


def test_gemma3_goes_where_its_layers_are_as_published() -> None:
    def layers(count: int) -> tuple[LayerSpec, ...]:
        return tuple(SQUARE.layer.looking_back(local=bool((index + 1) % 6)) for index in range(count))

    published = replace(SQUARE, layers=layers(12), sliding_window=8)
    assert against(LLAMA_CPP, "gemma3", published) == []
    (why,) = against(LLAMA_CPP, "gemma3", replace(published, layers=published.layers[1:]))
    assert "every sixth" in why
    (why,) = against(LLAMA_CPP, "gemma3", replace(published, query_scalar=24.0))
    assert "not by that of 24" in why
    # Its 27B is known by 62 layers.
    known = replace(
        published, layers=layers(62), hidden_size=2 * SQUARE.hidden_size, query_scalar=2.0 * SQUARE.head_dim
    )
    assert against(LLAMA_CPP, "gemma3", known) == []


def test_some_converters_ask_for_a_sentencepiece_file() -> None:
    for family in ("gemma", "nemotron", "phi3"):
        spec = replace(SQUARE, tied_embeddings=family == "gemma")
        (why,) = objections(LLAMA_CPP, Source(family, spec))
        assert "tokenizer.model" in why
        assert objections(VLLM, Source(family, spec)) == []
    settings = b'{"tokenizer_class": "GPT2Tokenizer"}'
    assert objections(LLAMA_CPP, Source("phi3", SQUARE, tokenizer_config__json=settings)) == []


def test_the_card_gives_commands_or_says_why_not() -> None:
    llama, qwen2 = (model_card(Source(name, NARROW), name="x", library="transformers") for name in ("llama", "qwen2"))
    for command in ("vllm serve .\n", "convert_hf_to_gguf.py", "from llama_cpp import Llama"):
        assert command in llama
        assert command not in qwen2
    assert f"Not with {VLLM}: its class takes the hidden size divided by the number of heads" in qwen2
    assert f"Not with {LLAMA_CPP}: " in qwen2
    assert qwen2.count("--model-impl transformers") == 1


def test_llama_cpp_computes_what_transformers_does(tmp_path: Path) -> None:
    """GGUF as our tests write it, and as our reader takes it to be, against llama.cpp itself."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; docs/serving.md says how")
    words = len(tiny.write_tokenizer(tmp_path / "hf"))
    tiny.write_llama(tmp_path / "hf", vocab_size=words)
    gguf = make_gguf(tmp_path / "hf", tmp_path / "m.gguf")
    ids = torch.randint(1, words, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    fp32 = 0
    model = llama_cpp.Llama(str(gguf), n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=fp32, type_v=fp32)
    model.eval(ids)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(model.scores[: len(ids)], expected, atol=1e-4 * float(np.sqrt((expected**2).mean())))
    assert objections(LLAMA_CPP, open_hf(tmp_path / "hf")) == []
