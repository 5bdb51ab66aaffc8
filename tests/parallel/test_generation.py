"""Texts with a cache of keys and values are those without, and those of transformers, for unequal prompts too."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig
from tests.ranks import run_on_ranks
from tests.tiny import write_bamba, write_family

PROMPTS = [[5, 17, 200, 3, 90, 7, 8, 9, 41], [12], [30, 31, 32, 33]]
COUNT = 10
FAMILIES = ("llama 3.2", "mistral, window", "qwen3", "nemotron", "phi4 mini", "gemma3")
"""Together: scaled and partial rotary angles, windows, head norms, layers with angles of their own, LayerNorm."""
LAYOUTS = {"tp2": (2, ParallelConfig(tensor=2)), "pp2 vpp2": (2, ParallelConfig(pipeline=2, virtual_pipeline=2))}


def generate_at(folder: Path, parallel: ParallelConfig) -> dict[str, Any]:
    from nemo_minitron.config.evaluation import SpeedConfig
    from nemo_minitron.config.model_settings import ModelSettings
    from nemo_minitron.evaluation import speed
    from nemo_minitron.evaluation.generate import generate
    from nemo_minitron.models.gpt import MegatronGPTModel

    model = MegatronGPTModel.restore_from(folder, settings=ModelSettings(parallel=parallel, seed=0))
    read: list[int] = []
    hooks = [
        layer.self_attention.register_forward_pre_hook(
            lambda module, args, kwargs: read.append(args[0].shape[0] if args else kwargs["hidden_states"].shape[0]),
            with_kwargs=True,
        )
        for layer in list(model.chunks[0].decoder.layers)[:1]
    ]
    texts = generate(model.chunks, model.runtime, PROMPTS, COUNT)
    cached = list(read)
    read.clear()
    plain = generate(model.chunks, model.runtime, PROMPTS, COUNT, use_cache=False)
    uncached = list(read)
    for hook in hooks:
        hook.remove()
    early = generate(
        model.chunks, model.runtime, PROMPTS, COUNT, finished=lambda sample, new: len(new) == 2 + 3 * sample
    )
    settings = SpeedConfig(prompt_tokens=4, new_tokens=3, batch_size=2, rounds=2)
    speeds = speed.measure(
        {"teacher": model.chunks, "student": model.chunks}, model.runtime, [[1, 2, 3, 4]] * 2, settings
    )
    caches = [layer.self_attention.cache for chunk in model.chunks for layer in chunk.decoder.layers]
    return {
        "texts": texts,
        "plain": plain,
        "early": early,
        "cached": cached,
        "uncached": uncached,
        "speed": speeds,
        "left": [cache for cache in caches if cache is not None],
    }


def expected(folder: Path) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    how = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": None}
    return [model.generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist() for prompt in PROMPTS]


def generate_each(folders: list[Path], parallel: ParallelConfig) -> list[dict[str, Any]]:
    """One process for all models: to start one takes longer than to write with it."""
    return [generate_at(folder, parallel) for folder in folders]


def test_families_write_what_transformers_writes(tmp_path):
    models = {family: write_family(tmp_path / family, family) for family in FAMILIES}
    [results] = run_on_ranks(1, generate_each, [tmp_path / family for family in FAMILIES], ParallelConfig())
    each = dict(zip(FAMILIES, results, strict=True))
    longest = len(PROMPTS[0])
    for family, found in each.items():
        assert found["texts"] == found["plain"] == expected(tmp_path / family), family
        assert found["early"] == [text[: 2 + 3 * sample] for sample, text in enumerate(found["texts"])]
        assert found["cached"] == [longest] + [1] * (COUNT - 1), "each further token costs one position"
        assert found["uncached"] == list(range(longest, longest + COUNT))
        assert found["left"] == [], "no layer keeps a cache"
    check_speed(each["qwen3"]["speed"], models["qwen3"].num_parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_write_what_transformers_writes(layout, tmp_path):
    """Of attention, and of a hybrid, whose states are not moved on by a token that is passed twice."""
    folders = [tmp_path / "qwen3", tmp_path / "bamba"]
    write_family(folders[0], "qwen3")
    write_bamba(folders[1])
    wanted = [expected(folder) for folder in folders]
    world_size, parallel = LAYOUTS[layout]
    for rank in run_on_ranks(world_size, generate_each, folders, parallel):
        assert [found["texts"] for found in rank] == [found["plain"] for found in rank] == wanted
        assert [found["early"] for found in rank] == [
            [text[: 2 + 3 * sample] for sample, text in enumerate(texts)] for texts in wanted
        ]


def check_speed(speed: dict[str, Any], parameters: int) -> None:
    """What was counted, and that figures fit each other."""
    for row in speed["models"].values():
        assert row["prefill_tokens_per_second"] == pytest.approx(8 / row["time_to_first_token"], rel=0.5)
        assert row["decode_tokens_per_second"] > 0
        assert row["weights_bytes"] == 4 * parameters
        # keys and values of 4 layers, 2 samples, 4 + 3 positions, 4 groups of 16 channels, in fp32
        assert row["cache_bytes"] == 2 * 4 * 2 * 7 * 4 * 16 * 4
    assert set(speed["ratio"]) == {"student"}
    assert all(row["least"] <= row["median"] <= row["most"] for row in speed["ratio"]["student"].values())
    assert speed["kv_cache"]
