"""A made-up run in the shapes of SmolLM2-135M, for the tests of the report."""

import math

import numpy as np

from nemo_minitron.arch.axes import Axis
from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.report.content import Importance, ReportContent

TEACHER = ModelSpec(
    vocab_size=49152,
    hidden_size=576,
    head_dim=64,
    layers=(transformer_layer(num_attention_heads=9, num_query_groups=3, ffn_hidden_size=1536),) * 30,
    max_position_embeddings=8192,
    tied_embeddings=True,
)
STUDENT = TEACHER.with_sizes(num_layers=26, ffn_hidden_size=1152, num_attention_heads=6)
DROPPED = (3, 5, 14, 17)


def importance() -> Importance:
    draw = np.random.default_rng(0)
    kept = [layer for layer in range(30) if layer not in DROPPED]
    influence = 0.02 + 0.06 * draw.random(30)
    influence[[0, 1, 29]] = 0.62, 0.4, 0.3
    influence[list(DROPPED)] = 0.011
    ffn = tuple(draw.lognormal(0, 0.8, 1536) for _ in range(30))
    heads = tuple(draw.uniform(0.5, 2, 9) for _ in range(30))
    return Importance(
        block_influence=influence,
        hidden=draw.lognormal(0, 0.7, 576),
        units={Axis.HEAD: heads, Axis.FFN: ffn},
        kept_hidden=tuple(range(576)),
        kept={layer: {Axis.HEAD: _best(heads[layer], 6), Axis.FFN: _best(ffn[layer], 1152)} for layer in kept},
    )


def _best(units: np.ndarray, count: int) -> tuple[int, ...]:
    return tuple(sorted(np.argsort(units)[::-1][:count].tolist()))


def metrics() -> list[dict]:
    rows = []
    for step in range(0, 201):
        kl = 0.35 + 2.4 * math.exp(-step / 35)
        row = {"stage": "distill", "step": step, "tokens": step * 1024}
        if step:
            rows.append({**row, "train/loss": kl, "train/kl": kl * (1 + 0.1 * math.sin(step)), "train/lr": 1e-4})
        if step % 25 == 0:
            rows.append({**row, "val/kl": kl, "val/ce": 3.4 + kl, "val/teacher_ce": 3.4, "val/agreement": 0.6})
    return rows


def content(**changes) -> ReportContent:
    nats = {"teacher": 3.4, "pruned": 6.1, "distilled": 3.75}
    results = {
        "import": {"seconds": 3.2, "peak_memory_gb": 1.1},
        "data": {"seconds": 8.4, "peak_memory_gb": 0.9},
        "score": {"seconds": 41.0, "peak_memory_gb": 2.2, "samples": 64, "tokens": 32768},
        "prune": {"seconds": 2.0, "peak_memory_gb": 1.0},
        "distill": {
            "seconds": 410.2,
            "peak_memory_gb": 4.4,
            "tokens": 204_800,
            "tokens_per_second": 512.3,
            "validation": {"step": 200, "kl": 0.358},
        },
        "evaluate": {
            "seconds": 64.3,
            "peak_memory_gb": 2.0,
            "tokens": 20_000,
            "nats": nats,
            "perplexity": {name: math.exp(value) for name, value in nats.items()},
            "samples": {
                "prompt": "The history of the city begins",
                "teacher": "The history of the city begins in the 12th century, when it was a small town.",
                "pruned": "The history of the city begins the the <b>of</b> & the",
                "distilled": "The history of the city begins in the 19th century with the first settlers.",
            },
        },
        "export": {"seconds": 12.1, "files": {"nemo": "small.nemo", "hf": "small_hf"}},
    }
    manifest = {
        "seed": 1234,
        "version": "0.1.0",
        "git": "0123abcd",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": {"processor": "A processor", "cores": 2, "memory_gb": 24.0, "gpus": []},
        "commands": [{"command": "nemo-minitron demo", "start": "2026-11-23T10:00:00+00:00"}],
    }
    values = {
        "name": "small",
        "source": "SmolLM2-135M-Instruct",
        "teacher": TEACHER,
        "student": STUDENT,
        "results": results,
        "manifest": manifest,
        "recipe": "name: small\nseed: 1234\n",
        "importance": importance(),
        "metrics": metrics(),
    }
    return ReportContent(**{**values, **changes})
