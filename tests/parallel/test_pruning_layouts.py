"""One tiny model scored and pruned at every layout: the same plan, and the same bytes."""

from pathlib import Path

import pytest

from nemo_minitron.checkpoints.files import FolderFiles
from nemo_minitron.checkpoints.hf import write_hf
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.pruning.plan import PruningPlan
from nemo_minitron.pruning.scores import Scores
from tests import jobs
from tests.parallel import pruning_jobs
from tests.parallel.pruning_jobs import PruneCase
from tests.ranks import run_on_ranks
from tests.tiny import write_corpus, write_llama

ALONE = [PruneCase("one"), PruneCase("again"), PruneCase("micro_batches", micro_batch_size=2)]
TOGETHER = [
    PruneCase("tp2", ParallelConfig(tensor=2)),
    PruneCase("pp2", ParallelConfig(pipeline=2)),
    PruneCase("dp2"),
    PruneCase("vpp2", ParallelConfig(pipeline=2, virtual_pipeline=2)),
    PruneCase("live", ParallelConfig(tensor=2), live=True),
    PruneCase("given_scores", ParallelConfig(tensor=2), own_scores=False),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pruning")
    write_llama(path / "hf", trained_steps=60, num_attention_heads=8, num_key_value_heads=2)
    write_corpus(path / "corpus")
    run_on_ranks(1, jobs.prepare, path)
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict]:
    """Of every case, as rank 0 tells it; the ranks agree."""
    found = {}
    for size, cases in ((1, ALONE), (2, TOGETHER)):
        ranks = run_on_ranks(size, pruning_jobs.prune_all, folder, cases)
        assert all(rank == ranks[0] for rank in ranks)
        found |= dict(zip([case.name for case in cases], ranks[0], strict=True))
    return found


def test_plans_are_the_same_at_every_layout(results: dict[str, dict], folder: Path) -> None:
    digests = {name: result["digest"] for name, result in results.items()}
    assert set(digests.values()) == {digests["one"]}
    plan = PruningPlan.load(folder / "one" / "plan.json")
    assert plan.digest() == digests["one"]
    assert plan.merges
    assert plan.student.layer.mlp.ffn_hidden_size == 48
    assert Scores.load(folder / "tp2" / "scores.safetensors").samples == 16


def test_students_are_the_same_bytes_at_every_layout(results: dict[str, dict], folder: Path) -> None:
    weights = {name: (result["students"]["hf"] / "model.safetensors").read_bytes() for name, result in results.items()}
    assert all(content == weights["one"] for content in weights.values()), [
        name for name, content in weights.items() if content != weights["one"]
    ]
    names = FolderFiles(folder / "one" / "student_hf").names()
    for name in ("tp2", "again"):
        assert FolderFiles(folder / name / "student_hf").names() == names
    assert (folder / "one" / "student.nemo").read_bytes() == (folder / "again" / "student.nemo").read_bytes()
    for name in results:
        assert not [path for path in (folder / name).iterdir() if path.name.startswith(".")]


def test_students_know_their_units(results: dict[str, dict], folder: Path) -> None:
    plan = PruningPlan.load(folder / "pp2" / "plan.json")
    for path in results["pp2"]["students"].values():
        assert PruningPlan.of_checkpoint(path).digest() == plan.digest()
        assert open_checkpoint(path).spec == plan.student


def test_a_model_that_restores_and_saves_a_student_passes_its_plan_on(
    results: dict[str, dict], folder: Path, tmp_path: Path
) -> None:
    """As distillation and export do."""
    plan = PruningPlan.load(folder / "one" / "plan.json")
    for source, target in ((results["one"]["students"]["nemo"], "folder"), (tmp_path / "folder", "again.nemo")):
        run_on_ranks(1, jobs.save_nemo, source, tmp_path / target)
        assert PruningPlan.of_checkpoint(tmp_path / target).digest() == plan.digest()
    write_hf(open_checkpoint(tmp_path / "again.nemo"), tmp_path / "hf")
    assert PruningPlan.of_checkpoint(tmp_path / "hf").digest() == plan.digest()


def test_every_rank_is_told_what_is_wrong(folder: Path) -> None:
    (folder / "taken").write_text("a file")
    cases = [
        PruneCase("impossible", target={"hidden_size": 65, "num_layers": 9}),
        PruneCase("taken", target={"num_layers": 2}),
        PruneCase("taken/below", target={"num_layers": 2}),
        PruneCase("blocked", target={"num_layers": 2}),
        PruneCase("unmeasured", target={"num_layers": 2, "depth_metric": "lm_loss"}),
        PruneCase("merging", target={"num_layers": 2, "merge_layers": True}),
    ]
    # A folder where a file is to be: rank 0 fails while it writes.
    (folder / "blocked" / "plan.json").mkdir(parents=True)
    for said in run_on_ranks(2, pruning_jobs.failing, folder, cases):
        assert "num_layers = 9, the teacher has 4; hidden_size = 65, the teacher has 64" in said[0]
        assert "cannot be made" in said[1]
        assert "cannot be made" in said[2]
        assert "rank 0 could not write" in said[3]
        assert "plan.json" in said[3]
        assert "depth_metric = lm_loss" in said[4]
        assert "merge_layers = true" in said[5]
    assert not (folder / "blocked" / "student.nemo").exists()


def test_ranks_wait_longer_for_a_student_than_for_each_other():
    assert run_on_ranks(2, pruning_jobs.slow_first_rank) == ["pruned", "pruned"]
