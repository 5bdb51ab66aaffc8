"""Finding one's place among processes, and splitting a model over them."""

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import weight_named
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.errors import LayoutError
from nemo_minitron.megatron import runtime
from nemo_minitron.megatron.placement import check_layout, chunk_layers, local_shard, padded_vocab

SPEC = ModelSpec(
    vocab_size=128256,
    hidden_size=64,
    head_dim=16,
    layers=(transformer_layer(num_attention_heads=12, num_query_groups=4, ffn_hidden_size=96),) * 8,
    max_position_embeddings=128,
)
PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID", "SLURM_JOB_NAME", "SLURM_JOB_ID")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (*PLACES, *SLURM):
        monkeypatch.delenv(name, raising=False)
    runtime.stop()
    yield
    runtime.stop()


def test_one_process() -> None:
    here = runtime.start(ParallelConfig(), seed=3)
    assert (here.rank, here.world_size, here.dp_size) == (0, 1, 1)
    assert here.is_first_stage
    assert here.is_last_stage
    runtime.barrier()
    assert runtime.broadcast_object({"a": 1}) == {"a": 1}
    assert runtime.agree(True)
    assert not runtime.agree(False)
    assert runtime.current() is here


def test_starting_twice_gives_the_same_and_another_layout_is_refused() -> None:
    here = runtime.start(ParallelConfig(), seed=3)
    assert runtime.start(ParallelConfig(), seed=3) is here
    with pytest.raises(LayoutError, match="another parallel layout"):
        runtime.start(ParallelConfig(), seed=4)


def test_stop_gives_everything_back() -> None:
    runtime.start(ParallelConfig(), seed=3)
    runtime.stop()
    runtime.stop()
    assert not torch.distributed.is_initialized()
    with pytest.raises(LayoutError, match="no parallel layout"):
        runtime.current()


def test_the_seed_decides_the_generators() -> None:
    drawn = []
    for seed in (1, 1, 2):
        runtime.start(ParallelConfig(), seed=seed)
        drawn.append(torch.rand(1).item())
        runtime.stop()
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelConfig(tensor=2), "1 process"),
        (ParallelConfig(virtual_pipeline=2), "virtual_pipeline = 2 without a pipeline"),
        (ParallelConfig(sequence_parallel=True), "sequence_parallel"),
    ],
)
def test_sizes_that_do_not_fit(parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        runtime.start(parallel, seed=0)
    assert not torch.distributed.is_initialized()


def test_place_from_torchrun_and_from_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert runtime._find_place() == runtime._Place(9, 16, 1)
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")  # a name says nothing
    assert runtime._find_place() == runtime._Place(9, 16, 1)
    monkeypatch.setenv("SLURM_STEP_ID", "4294967290")  # the shell of salloc
    assert runtime._find_place() == runtime._Place(0, 1, 0)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    assert runtime._find_place() == runtime._Place(3, 4, 3)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a1", "a1"), ("a1,b2", "a1"), ("gpu[003-007,9],x1", "gpu003"), ("gpu[12]", "gpu12"), ("a,b[1-2]", "a")],
)
def test_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert runtime._first_slurm_host(nodes) == first


def test_layers_over_stages() -> None:
    def sizes(layers: int, pipeline: int, virtual: int | None = None) -> list[int]:
        ranges = chunk_layers(layers, ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual))
        assert [index for chunk in ranges for index in chunk] == list(range(layers))
        return [len(chunk) for chunk in ranges]

    assert sizes(8, 2) == [4, 4]
    assert sizes(8, 2, 2) == [2, 2, 2, 2]
    assert sizes(7, 2) == [4, 3]
    assert sizes(27, 4) == [7, 7, 7, 6]


@pytest.mark.parametrize(
    ("vocab", "tensor", "padded"),
    [
        (128256, 1, 128256),
        (128256, 8, 129024),
        (49152, 2, 49152),
        (151936, 4, 152064),
        (50257, 1, 50257),
        (50257, 2, 50258),
    ],
)
def test_padded_vocabularies(vocab: int, tensor: int, padded: int) -> None:
    spec = replace(SPEC, vocab_size=vocab)
    assert padded_vocab(spec, tensor) == padded
    assert padded % tensor == 0


def test_every_size_that_does_not_fit_is_named() -> None:
    check_layout(SPEC, ParallelConfig(tensor=4, pipeline=2, virtual_pipeline=4))
    with pytest.raises(LayoutError) as caught:
        check_layout(SPEC, ParallelConfig(tensor=8, pipeline=9))
    text = str(caught.value)
    assert "num_query_groups = 4 is not a multiple of parallel.tensor = 8" in text
    assert "num_attention_heads = 12" in text
    assert "ffn_hidden_size" not in text
    assert "8 layer(s) cannot fill 9 pipeline stages" in text
    uneven = replace(SPEC, layers=(*SPEC.layers[:3], SPEC.layers[0].with_sizes(ffn_hidden_size=95)))
    with pytest.raises(LayoutError, match="ffn_hidden_size = 95 of layer 3"):
        check_layout(uneven, ParallelConfig(tensor=2))
    with pytest.raises(LayoutError, match="vocab_size = 5 is too small"):
        check_layout(replace(SPEC, vocab_size=5), ParallelConfig(tensor=4))


def test_shards_of_each_packing() -> None:
    spec = replace(SPEC, vocab_size=6)
    fc1 = weight_named(spec, "decoder.layers.0.mlp.linear_fc1.weight")
    rows = torch.arange(192)[:, None]
    shard = local_shard(fc1, rows, spec, rank=1, size=2)[:, 0]
    assert shard.tolist() == [*range(48, 96), *range(144, 192)]
    table = weight_named(spec, "embedding.word_embeddings.weight")
    padded = local_shard(table, torch.arange(1, 7)[:, None], spec, rank=1, size=2)
    assert padded[:, 0].tolist() == [5, 6, 0, 0]
    proj = weight_named(spec, "decoder.layers.0.self_attention.linear_proj.weight")
    assert local_shard(proj, torch.arange(8).reshape(2, 4), spec, rank=0, size=2).tolist() == [[0, 1], [4, 5]]
    norm = weight_named(spec, "decoder.final_layernorm.weight")
    assert local_shard(norm, torch.arange(4), spec, rank=1, size=2).tolist() == [0, 1, 2, 3]


class TestDevices:
    """Which GPU a process takes, on a machine that is told to have some."""

    @pytest.fixture
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
        """The devices that were made current."""
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        current: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        return current

    def test_the_one_of_its_local_rank(self, machine: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        assert runtime._claim_device(runtime._Place(7, 8, 3)) == torch.device("cuda", 3)
        assert machine == [3]

    @pytest.mark.parametrize(
        "shown",
        [{"CUDA_VISIBLE_DEVICES": "2"}, {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}],
        ids=["variable", "slurm"],
    )
    def test_the_only_one_that_it_is_shown(
        self, machine: list[int], shown: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in shown.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert runtime._claim_device(runtime._Place(3, 4, 3)) == torch.device("cuda", 0)
        assert machine == [0]

    @pytest.mark.parametrize("count", [1, 2])
    def test_more_processes_than_gpus(self, machine: list[int], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        with pytest.raises(LayoutError, match=rf"local rank 2 on a machine with {count} GPU"):
            runtime._claim_device(runtime._Place(2, 4, 2))
        assert machine == []


def test_a_lost_rank_ends_the_others_on_nccl_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_PROPAGATE_ERROR", "0")
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "")  # so that it is taken back at the end
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    seen = []
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **how: seen.append((backend, dict(os.environ)))
    )
    for backend in ("gloo", "nccl"):
        runtime._rendezvous(runtime._Place(0, 1, 0), backend)
    (_, with_gloo), (_, with_nccl) = seen
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in with_gloo
    assert with_nccl["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    assert with_nccl["TORCH_NCCL_PROPAGATE_ERROR"] == "0"
