"""Latency tables: interpolation against closed forms, files against the device they are for."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from nemo_minitron.arch.layer import Attention, LayerSpec, Mamba, Mlp
from nemo_minitron.arch.spec import Activation, ModelSpec
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.search import SearchConfig
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import SearchError
from nemo_minitron.search.latency import Conditions, LatencyTable, interpolate
from nemo_minitron.search.space import make_space
from nemo_minitron.search.timing import device_name, grid_of, heldout_error, time_table
from tests.unit.search_specs import smollm2

GRID = {"hidden": [256, 384, 576], "ffn": [512, 1024], "groups": [1, 3], "ratio": [1, 2, 3]}
CONDITIONS = Conditions(
    device="some GPU", dtype="bf16", batch_size=1, sequence_length=64, head_dim=64, vocab_size=49152, gated=True
)


def attention(hidden, groups, ratio):
    return 0.1 + hidden * groups * (ratio + 2) * 1e-4


def mlp(hidden, ffn):
    return 0.05 + hidden * ffn * 1e-6


def table() -> LatencyTable:
    points = {"attention": (attention, ("hidden", "groups", "ratio")), "mlp": (mlp, ("hidden", "ffn"))}
    timed = {
        part: np.array([function(*point) for point in itertools.product(*(GRID[axis] for axis in axes))])
        .reshape([len(GRID[axis]) for axis in axes])
        .tolist()
        for part, (function, axes) in points.items()
    }
    timed["head"] = [2.0 * hidden for hidden in GRID["hidden"]]
    return LatencyTable(conditions=CONDITIONS, grid=GRID, milliseconds={"prefill": timed, "decode": timed}, error={})


def test_interpolation_is_exact_for_what_is_linear_in_each_size():
    rng = np.random.default_rng(0)
    grids = [[1, 4, 9], [2, 3, 10, 11], [5]]
    coefficients = rng.normal(size=(2, 2))

    def exact(x, y, z):
        return coefficients[0, 0] + coefficients[1, 0] * x + coefficients[0, 1] * y + coefficients[1, 1] * x * y

    values = exact(*np.meshgrid(*grids, indexing="ij"))
    x, y = rng.uniform(1, 9, (20, 1)), rng.uniform(2, 11, (1, 30))
    np.testing.assert_allclose(interpolate(values, grids, (x, y, 5)), exact(x, y, 5), rtol=1e-12)


def test_a_model_is_its_layers_and_its_output_layer():
    found = table().model_ms("decode", smollm2(), (np.array([10, 20]), 500, 700, 4, 2))
    layer = attention(500, 2, 2) + mlp(500, 700)
    np.testing.assert_allclose(found, [10 * layer + 1000, 20 * layer + 1000])


def test_a_size_outside_the_table_is_an_error():
    with pytest.raises(SearchError, match="hidden from 600 to 600, timed from 256 to 576"):
        table().model_ms("prefill", smollm2(), (10, 600, 700, 4, 2))


def test_a_table_of_another_device_is_refused(tmp_path):
    path = tmp_path / "latency.json"
    table().save(path)
    assert LatencyTable.load(path, CONDITIONS) == table()
    other = dataclasses.replace(CONDITIONS, device="another GPU", batch_size=8)
    with pytest.raises(SearchError) as caught:
        LatencyTable.load(path, other)
    assert "device is some GPU, the search has another GPU" in str(caught.value)
    assert "batch_size is 1, the search has 8" in str(caught.value)
    assert "target.deployment.device" in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "nemo_minitron.latency", "version": 2}'])
def test_a_damaged_table_is_an_error(tmp_path, content):
    path = tmp_path / "latency.json"
    path.write_text(content)
    with pytest.raises(SearchError, match="cannot be read"):
        LatencyTable.load(path, CONDITIONS)


def test_the_error_is_measured_on_shapes_between_the_points():
    asked = []

    def timed(phase, part, point):
        asked.append((phase, part, tuple(point)))
        return {"attention": attention, "mlp": mlp}[part](*point) / 1.1

    error = heldout_error(table(), timed, 10)
    assert error["median"] == pytest.approx(0.1, rel=1e-6)
    assert error["shapes"] == 20
    points = [point for _, part, point in asked if part == "mlp"]
    on_grid = [point for point in points if point[0] in GRID["hidden"] and point[1] in GRID["ffn"]]
    assert not on_grid


def test_this_machine_can_be_timed():
    target = TargetConfig(decode_ms=5.0, deployment={"sequence_length": 16, "dtype": "fp32", "latency_table": "t"})
    space = {"hidden_size": [448, 576], "ffn_hidden_size": [1024, 1536]}
    made = make_space(SearchConfig(space=space), target, smollm2(), ParallelConfig())
    grid = {name: [points[0], points[-1]] for name, points in grid_of(made).items()}
    assert grid == {"hidden": [448, 576], "ffn": [1024, 1536], "groups": [3, 3], "ratio": [3, 3]}
    grid = {name: sorted(set(points)) for name, points in grid.items()}
    conditions = Conditions.of(smollm2(), target.deployment, device_name())
    with torch.random.fork_rng():
        found = time_table(conditions, grid, heldout=1)
    parts = found.milliseconds["decode"]
    assert [len(parts["attention"]), len(parts["mlp"]), len(parts["mlp"][0]), len(parts["head"])] == [2, 2, 2, 2]
    layer = parts["attention"][1][0][0] + parts["mlp"][1][1]
    assert layer > 0
    assert found.model_ms("decode", smollm2(), (30, 576, 1536, 9, 3)) == pytest.approx(30 * layer + parts["head"][1])
    assert 0 <= found.error["median"] <= found.error["max"]


def hybrid() -> ModelSpec:
    mixer = Mamba(mamba_num_heads=8, mamba_head_dim=8, mamba_state_dim=16, mamba_num_groups=4)
    attention = LayerSpec(mixer=Attention(num_attention_heads=4, num_query_groups=2), feed_forward=None)
    mamba, mlp = LayerSpec(mixer=mixer, feed_forward=None), LayerSpec(mixer=None, feed_forward=Mlp(ffn_hidden_size=96))
    return ModelSpec(
        vocab_size=64,
        hidden_size=32,
        head_dim=8,
        layers=(mamba, mlp, attention, mamba, mlp),
        max_position_embeddings=64,
        activation=Activation.SQUARED_RELU,
    )


def test_a_hybrid_is_timed_and_its_layers_add_up_by_kind():
    teacher = hybrid()
    target = TargetConfig(decode_ms=5.0, deployment={"sequence_length": 16, "dtype": "fp32", "latency_table": "t"})
    space = {"hidden_size": [16, 32], "ffn_hidden_size": [96], "mamba_num_heads": [8]}
    made = make_space(SearchConfig(space=space), target, teacher, ParallelConfig())
    grid = {name: sorted({points[0], points[-1]}) for name, points in grid_of(made).items()}
    assert grid == {
        **{"hidden": [16, 32], "ffn": [96], "groups": [2], "ratio": [2]},
        **{"mamba_groups": [4], "mamba_ratio": [2], "mamba_channels": [8]},
    }
    conditions = Conditions.of(teacher, target.deployment, device_name())
    assert (conditions.state_size, conditions.conv_kernel) == (16, 4)
    with torch.random.fork_rng():
        found = time_table(conditions, grid, heldout=1)
    for phase in ("prefill", "decode"):
        parts = {part: np.array(values)[-1].item() for part, values in found.milliseconds[phase].items()}
        assert set(parts) == {"attention", "mamba", "mlp", "head"}
        assert min(parts.values()) > 0
        expected = 3 * parts["mamba"] + 1 * parts["attention"] + 2 * parts["mlp"] + parts["head"]
        assert found.model_ms(phase, teacher, (3, 1, 2, 32, 96, 4, 2, 8, 8, 4)) == pytest.approx(expected)
