"""Keys of GGUF files, Megatron's arguments and NeMo's configurations deleted or changed.

Each gives the documented default of the format's own reader, the same model, or an error that names the key.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.megatron_config import megatron_args, spec_from_args, spec_from_transformer_fields
from nemo_minitron.arch.megatron_config import transformer_fields as fields_of
from nemo_minitron.arch.nemo_config import nemo_config, spec_from_nemo_config
from nemo_minitron.arch.spec import Activation, LinearScaling, ModelSpec, Norm, RopeScaling, YarnScaling
from nemo_minitron.checkpoints.gguf import open_gguf
from nemo_minitron.checkpoints.gguf_file import GgufFile
from nemo_minitron.errors import MinitronError

LAYERS, HIDDEN, HEADS, GROUPS, FFN, ROWS = 2, 32, 4, 2, 48, 40
METADATA: dict[str, Any] = {
    "context_length": 512,
    "embedding_length": HIDDEN,
    "block_count": LAYERS,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": GROUPS,
    "attention.key_length": HIDDEN // HEADS,
    "attention.value_length": HIDDEN // HEADS,
    "attention.layer_norm_rms_epsilon": 1e-4,
    "rope.freq_base": 5000.0,
    "rope.dimension_count": HIDDEN // HEADS,
    "rope.scaling.type": "linear",
    "rope.scaling.factor": 2.0,
    "vocab_size": ROWS,
}
GGUF_SPEC = ModelSpec(
    vocab_size=ROWS,
    hidden_size=HIDDEN,
    head_dim=HIDDEN // HEADS,
    layers=(transformer_layer(num_attention_heads=HEADS, num_query_groups=GROUPS, ffn_hidden_size=FFN),) * LAYERS,
    max_position_embeddings=512,
    norm_eps=1e-4,
    rotary_base=5000.0,
    rope_scaling=LinearScaling(factor=2.0),
)
# What llama.cpp takes where a key is absent, as its loader and docs/gguf.md have it; None: it refuses the file.
LLAMA_CPP: dict[str, dict[str, Any] | None] = {
    "attention.key_length": {},  # embedding_length / head_count
    "attention.value_length": {},
    "rope.dimension_count": {},  # key_length
    "vocab_size": {},  # the tokenizer's
    "rope.freq_base": {"rotary_base": 10000.0},
    "rope.scaling.type": {},  # linear
    "rope.scaling.factor": {"rope_scaling": None},  # 1
    **dict.fromkeys(("context_length", "embedding_length", "block_count", "attention.layer_norm_rms_epsilon")),
    **dict.fromkeys(("feed_forward_length", "attention.head_count", "attention.head_count_kv")),
}


def attempt(read: Callable[[], ModelSpec]) -> ModelSpec | MinitronError:
    """What is read, or why not."""
    try:
        return read()
    except MinitronError as error:
        return error


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        name = key if key.startswith(("split.", "general.", "tokenizer.")) else f"llama.{key}"
        match value:
            case bool():
                writer.add_bool(name, value)
            case int() if name in ("split.no", "split.count"):
                writer.add_uint16(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
            case list():
                writer.add_array(name, value)
    for name, data in (gguf_tensors() if tensors is None else tensors).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    narrow = HIDDEN // HEADS * GROUPS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (ROWS, HIDDEN),
        "output.weight": (ROWS, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for index in range(LAYERS):
        shapes |= {
            f"blk.{index}.attn_norm.weight": (HIDDEN,),
            f"blk.{index}.ffn_norm.weight": (HIDDEN,),
            f"blk.{index}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{index}.attn_k.weight": (narrow, HIDDEN),
            f"blk.{index}.attn_v.weight": (narrow, HIDDEN),
            f"blk.{index}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{index}.ffn_gate.weight": (FFN, HIDDEN),
            f"blk.{index}.ffn_up.weight": (FFN, HIDDEN),
            f"blk.{index}.ffn_down.weight": (HIDDEN, FFN),
        }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_keys_of_gguf_files(tmp_path: Path) -> None:
    assert open_gguf(write_gguf(tmp_path / "complete.gguf", METADATA)).spec == GGUF_SPEC
    counts: Counter[str] = Counter()
    for key, value in METADATA.items():
        changes: dict[str, dict[str, Any]] = {"delete": {name: v for name, v in METADATA.items() if name != key}}
        if not isinstance(value, str):
            changes["contradict"] = METADATA | {key: value * 2}
        changes["other type"] = METADATA | {key: "twelve" if not isinstance(value, str) else "some"}
        for kind, metadata in changes.items():
            path = write_gguf(tmp_path / "m.gguf", metadata)
            found = attempt(lambda path=path: open_gguf(path).spec)
            if isinstance(found, MinitronError):
                assert key.rpartition(".")[2] in str(found), f"{kind} {key}: {found}"
                assert kind != "delete" or LLAMA_CPP[key] is None, f"{key}: {found}"
                counts["refused by name"] += 1
                continue
            if kind == "delete":
                default = LLAMA_CPP[key]
                assert default is not None, f"{key} is demanded by llama.cpp"
                assert found == replace(GGUF_SPEC, **default), f"{kind} {key}"
            else:  # what it says is what is read: nothing else in the file contradicts it
                said = {
                    "context_length": {"max_position_embeddings": 1024},
                    "attention.layer_norm_rms_epsilon": {"norm_eps": 2e-4},
                    "rope.freq_base": {"rotary_base": 10000.0},
                    "rope.scaling.factor": {"rope_scaling": LinearScaling(factor=4.0)},
                }
                assert kind == "contradict", f"{kind} {key}"
                assert found == replace(GGUF_SPEC, **said[key]), f"{kind} {key}"
            counts["identical" if found == GGUF_SPEC else "what llama.cpp computes"] += 1
    print(f"GGUF: {sum(counts.values())} mutations: {dict(counts)}, 0 silent differences")
    assert set(counts) == {"refused by name", "identical", "what llama.cpp computes"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention.head_count_kv": [2, 1]}, "attention.head_count_kv"),
        ({"attention.causal": False}, "attention.causal"),
        ({"attention.scale": 0.5}, "attention.scale"),
        ({"expert_count": 8}, "expert_count"),
        ({"attention.sliding_window": 64}, "sliding_window"),
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"rope.scale_linear": 4.0}, "rope.scale_linear"),
        ({"general.type": "adapter"}, "general.type"),
        ({"vocab_size": 39}, "vocab_size = 39"),
        ({"rope.dimension_count": 4}, "rope.dimension_count = 4"),
        ({"split.count": 2, "split.no": 1}, "part 2 of 2"),
        ({"split.count": 2, "split.no": 0}, "part 1 of 2"),
    ],
)
def test_what_a_gguf_file_may_not_say(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(MinitronError, match=words.replace(".", r"\.")):
        open_gguf(write_gguf(tmp_path / "m.gguf", METADATA | change))


def test_a_list_of_equal_sizes_and_an_old_key_are_read(tmp_path: Path) -> None:
    old = {key: value for key, value in METADATA.items() if not key.startswith("rope.scaling")}
    change = {"attention.head_count_kv": [2, 2], "rope.scale_linear": 2.0}
    assert open_gguf(write_gguf(tmp_path / "m.gguf", old | change)).spec == GGUF_SPEC


def test_yarn_of_a_gguf_file(tmp_path: Path) -> None:
    change = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
    spec = open_gguf(write_gguf(tmp_path / "m.gguf", METADATA | change)).spec
    assert spec.rope_scaling == YarnScaling(factor=4.0, original_max_position_embeddings=128)


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", METADATA | {"attention.key_lengtX": 16})
    path.write_bytes(path.read_bytes().replace(b"attention.key_lengtX", b"attention.key_length"))
    with pytest.raises(MinitronError, match=r"llama\.attention\.key_length is there twice"):
        open_gguf(path)


def test_split_files_are_read_whole(tmp_path: Path) -> None:
    tensors = gguf_tensors()
    names = list(tensors)
    first, second = (
        {name: tensors[name] for name in part} for part in (names[:1] + names[2:9], names[1:2] + names[9:])
    )
    split = {"split.count": 2, "split.tensors.count": len(tensors)}
    write_gguf(tmp_path / "m-00001-of-00002.gguf", METADATA | split | {"split.no": 0}, first)
    write_gguf(tmp_path / "m-00002-of-00002.gguf", {"split.no": 1, **split}, second)
    whole = open_gguf(write_gguf(tmp_path / "complete.gguf", METADATA))
    parts = open_gguf(tmp_path / "m-00001-of-00002.gguf")
    assert parts.spec == whole.spec
    for name in whole.names():
        assert torch.equal(parts.get(name), whole.get(name))
    with pytest.raises(MinitronError, match=r"part 2 of 2.*\n.*\n.*m-00001-of-00002\.gguf"):
        open_gguf(tmp_path / "m-00002-of-00002.gguf")
    write_gguf(tmp_path / "m-00002-of-00002.gguf", {"split.no": 1, **split}, {**second, names[0]: tensors[names[0]]})
    with pytest.raises(MinitronError, match="lies in another part too"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")


def test_rope_factors_of_llama_3(tmp_path: Path) -> None:
    """The divisors of `rope_freqs.weight` as the model's authors compute them, wavelength by wavelength."""
    base, factor, low, high, original, width = 500000.0, 32.0, 1.0, 4.0, 8192, 64
    divisors = []
    for index in range(0, width, 2):
        wavelength = 2 * np.pi * base ** (index / width)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {
            "token_embd.weight": (ROWS, 128),
            "output_norm.weight": (128,),
            "blk.0.attn_norm.weight": (128,),
            "blk.0.ffn_norm.weight": (128,),
            "blk.0.attn_q.weight": (128, 128),
            "blk.0.attn_k.weight": (64, 128),
            "blk.0.attn_v.weight": (64, 128),
            "blk.0.attn_output.weight": (128, 128),
            "blk.0.ffn_gate.weight": (FFN, 128),
            "blk.0.ffn_up.weight": (FFN, 128),
            "blk.0.ffn_down.weight": (128, FFN),
        }.items()
    }
    metadata = {
        "context_length": 131072,
        "embedding_length": 128,
        "block_count": 1,
        "feed_forward_length": FFN,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": base,
    }
    stored = {"rope_freqs.weight": np.array(divisors, dtype=np.float32)}
    spec = open_gguf(write_gguf(tmp_path / "m.gguf", metadata, tensors | stored)).spec
    assert spec.rope_scaling == RopeScaling(factor=32.0, original_max_position_embeddings=8192)
    assert spec.tied_embeddings
    stored = {"rope_freqs.weight": np.linspace(1, 3, 32, dtype=np.float32)}
    with pytest.raises(MinitronError, match=r"rope_freqs\.weight"):
        open_gguf(write_gguf(tmp_path / "m.gguf", metadata, tensors | stored))


def test_k_quants_are_expanded(tmp_path: Path) -> None:
    """Q4_K and Q6_K block by block, as ggml's reference code defines them, in float64."""
    rng = np.random.default_rng(0)
    kinds = gguf.GGMLQuantizationType
    blocks = {}
    for kind, size, places in ((kinds.Q4_K, 144, (0, 2)), (kinds.Q6_K, 210, (208,))):
        data = rng.integers(0, 256, (3, 2, size), dtype=np.uint8)
        for at in places:
            data[..., at : at + 2] = rng.uniform(0.01, 0.1, (3, 2, 1)).astype(np.float16).view(np.uint8)
        blocks[kind] = data
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    for kind, data in blocks.items():
        writer.add_tensor(kind.name, data.reshape(3, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "k.gguf")
    for kind, expand in ((kinds.Q4_K, q4_k), (kinds.Q6_K, q6_k)):
        expected = np.array([[value for block in row for value in expand(block)] for row in blocks[kind]])
        np.testing.assert_allclose(file.tensor(kind.name).numpy(), expected, rtol=1e-6)


def q4_k(block: np.ndarray) -> list[float]:
    step, low = (float(block[at : at + 2].view(np.float16)[0]) for at in (0, 2))
    packed, nibbles = [int(byte) for byte in block[4:16]], [int(byte) for byte in block[16:]]
    values = []
    for group in range(8):
        if group < 4:
            scale, minimum = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = packed[group + 4] & 15 | (packed[group - 4] >> 6) << 4
            minimum = packed[group + 4] >> 4 | (packed[group] >> 6) << 4
        for byte in nibbles[group // 2 * 32 : group // 2 * 32 + 32]:
            values.append(step * scale * (byte >> 4 if group % 2 else byte & 15) - low * minimum)
    return values


def q6_k(block: np.ndarray) -> list[float]:
    low, high = [int(byte) for byte in block[:128]], [int(byte) for byte in block[128:192]]
    scales, step = block[192:208].view(np.int8), float(block[208:210].view(np.float16)[0])
    values = []
    for index in range(256):
        half, inner = divmod(index, 128)
        quarter, lane = divmod(inner, 32)
        nibble = low[half * 64 + quarter % 2 * 32 + lane] >> (4 if quarter > 1 else 0) & 15
        bits = high[half * 32 + lane] >> 2 * quarter & 3
        values.append(step * int(scales[half * 8 + quarter * 2 + lane // 16]) * ((bits << 4 | nibble) - 32))
    return values


# -- Megatron and NeMo -----------------------------------------------------------------------------------------------

SPEC = ModelSpec(
    vocab_size=250,
    hidden_size=64,
    head_dim=16,
    layers=(transformer_layer(num_attention_heads=8, num_query_groups=4, ffn_hidden_size=96),) * 3,
    max_position_embeddings=256,
    norm_eps=1e-6,
    rotary_base=500.0,
    rotary_percent=0.5,
    rope_scaling=RopeScaling(factor=32.0),
)
LAYER = SPEC.layers[0]
# Megatron-LM's argument defaults, and what they make of this model; None: an error that names the argument.
MEGATRON: dict[str, dict[str, Any] | None] = {
    **dict.fromkeys(("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")),
    "kv_channels": {"head_dim": 8},  # hidden_size / num_attention_heads
    "norm_epsilon": {"norm_eps": 1e-5},
    "normalization": {"norm": Norm.LAYERNORM},
    "swiglu": {"activation": Activation.GELU},
    "rotary_base": {"rotary_base": 10000.0},
    "rotary_percent": {"rotary_percent": 1.0},
    "add_bias_linear": {"linear_bias": True},
    "add_qkv_bias": {},
    "qk_layernorm": {},
    "untie_embeddings_and_output_weights": {"tied_embeddings": True},
    "group_query_attention": {"layers": (LAYER.with_sizes(num_query_groups=8),) * 3},
    "num_query_groups": {"layers": (LAYER.with_sizes(num_query_groups=1),) * 3},
    "use_rope_scaling": {"rope_scaling": None},
    "rope_scaling_factor": {"rope_scaling": RopeScaling(factor=8.0)},
    "vocab_size": {"vocab_size": 256},  # rows of the embedding
}


def test_arguments_of_megatron() -> None:
    args = megatron_args(SPEC, dtype="float32")
    read = lambda given: spec_from_args(given, vocab_rows=256, where="common.pt")  # noqa: E731
    assert read(args) == SPEC
    counts: Counter[str] = Counter()
    for name in args:
        given = {key: value for key, value in args.items() if key != name}
        default = MEGATRON.get(name, {})
        found = attempt(lambda given=given: read(given))
        if isinstance(found, MinitronError):
            assert default is None, f"{name}: {found}"
            assert name in str(found), found
            counts["refused by name"] += 1
            continue
        assert default is not None, name
        assert found == replace(SPEC, **default), name
        counts["identical" if found == SPEC else "Megatron's default"] += 1
    print(f"Megatron-LM: {len(args)} deletions: {dict(counts)}, 0 silent differences")
    assert counts["Megatron's default"] >= 10


@pytest.mark.parametrize("rows", [249, 250, 256])
def test_more_tokens_than_rows_are_refused(rows: int) -> None:
    args, fields = megatron_args(SPEC, dtype="float32"), fields_of(SPEC)
    config = {key: value for key, value in nemo_config(replace(SPEC, rope_scaling=None)).items() if key != "minitron"}
    reads = (
        lambda: spec_from_args(args, vocab_rows=rows, where="x"),
        lambda: spec_from_transformer_fields(fields, vocab_rows=rows, where="x"),
        lambda: spec_from_nemo_config(config, vocab_size=rows),
    )
    for read in reads:
        if rows < 250:
            with pytest.raises(MinitronError, match=r"vocab_size = 250.*249 rows"):
                read()
        else:
            assert read().vocab_size == 250


def test_fields_of_nemo_2_and_bridge() -> None:
    """Their classes have defaults of their own, so that what decides is written out or refused by name."""
    fields = fields_of(replace(SPEC, rope_scaling=None))
    read = lambda given: spec_from_transformer_fields(given, vocab_rows=256, where="model.yaml")  # noqa: E731
    whole = read(fields)
    counts: Counter[str] = Counter()
    for name in fields:
        given = {key: value for key, value in fields.items() if key != name}
        found = attempt(lambda given=given: read(given))
        if isinstance(found, MinitronError):
            assert name in str(found), found
            counts["refused by name"] += 1
            continue
        assert found == replace(whole, vocab_size=256 if name == "vocab_size" else 250), name
        counts["identical"] += 1
    print(f"NeMo 2: {len(fields)} deletions: {dict(counts)}, 0 silent differences")
    assert counts["refused by name"] >= 15


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("softmax_scale", 0.25, True),  # 1 / sqrt(16)
        ("softmax_scale", 0.0625, False),
        ("softmax_scale", "x", False),
        ("qk_l2_norm", False, True),
        ("qk_l2_norm", True, False),
        ("activation_func_clamp_value", 7.0, False),
        ("experimental_attention_variant", "dsa", False),
        ("heterogeneous_block_specs", True, False),
    ],
)
def test_fields_without_weights_that_change_the_result_are_refused(name: str, value: Any, accepted: bool) -> None:
    fields = fields_of(replace(SPEC, rope_scaling=None))
    expected = spec_from_transformer_fields(fields, vocab_rows=256, where="x")
    found = attempt(lambda: spec_from_transformer_fields({**fields, name: value}, vocab_rows=256, where="x"))
    assert (found == expected) if accepted else name in str(found)


# What NeMo 1 takes where a key is absent.
NEMO_1: dict[str, dict[str, Any] | None] = {
    **dict.fromkeys(("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")),
    "position_embedding_type": None,  # learned positions, which are not supported
    "kv_channels": {"head_dim": 8},
    "num_query_groups": {"layers": (LAYER.with_sizes(num_query_groups=8),) * 3},
    "normalization": {"norm": Norm.LAYERNORM},
    "layernorm_epsilon": {"norm_eps": 1e-5},
    "activation": {"activation": Activation.GELU},
    "bias": {"linear_bias": True},
    "rotary_percentage": {"rotary_percent": 1.0},
    "rotary_base": {"rotary_base": 10000.0},
    "share_embeddings_and_output_weights": {"tied_embeddings": True},
    "override_vocab_size": {"vocab_size": 256},
    "seq_len_interpolation_factor": {"rope_scaling": None},
}


def test_keys_of_nemo_1() -> None:
    spec = replace(SPEC, rope_scaling=LinearScaling(factor=4.0))
    config = {key: value for key, value in nemo_config(spec).items() if key != "minitron"}
    read = lambda given: spec_from_nemo_config(given, vocab_size=256)  # noqa: E731
    assert read(config) == spec
    counts: Counter[str] = Counter()
    for name in config:
        default = NEMO_1.get(name, {})
        given = {key: value for key, value in config.items() if key != name}
        found = attempt(lambda given=given: read(given))
        if isinstance(found, MinitronError):
            assert default is None, f"{name}: {found}"
            assert name in str(found), found
            counts["refused by name"] += 1
            continue
        assert default is not None, name
        assert found == replace(spec, **default), name
        counts["identical" if found == spec else "NeMo's default"] += 1
    print(f"NeMo 1: {len(config)} deletions: {dict(counts)}, 0 silent differences")
    assert counts["NeMo's default"] >= 10


def test_what_is_recorded_may_not_be_contradicted() -> None:
    """Every key that says what is computed, beside the architecture that our writer recorded."""
    config = nemo_config(replace(SPEC, rope_scaling=None))
    for key in NEMO_1:
        value = config[key]
        changed = value + "x" if isinstance(value, str) else not value if isinstance(value, bool) else (value or 1) * 2
        with pytest.raises(MinitronError, match=key):
            spec_from_nemo_config(config | {key: changed})
