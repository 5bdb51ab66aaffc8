"""What a student carries: its way back to the first teacher, whatever it went through; and writes that break."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_minitron.arch.axes import Axis
from nemo_minitron.checkpoints.files import FolderFiles
from nemo_minitron.checkpoints.hf import open_hf, write_hf
from nemo_minitron.checkpoints.nemo1 import open_nemo, write_folder
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import PLAN_FILE
from nemo_minitron.config.run import ExportFormat
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import CheckpointError, PlanError
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import random_plan
from nemo_minitron.pruning.plan import PruningPlan
from nemo_minitron.pruning.write import write_checkpoint
from tests import tiny
from tests.support.plans import changed


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("carried") / "teacher"
    tiny.write_llama(path, tied=False)
    return path


def plan_for(path: Path, seed: int, **target: object) -> PruningPlan:
    return random_plan(TargetConfig(**target), open_checkpoint(path).spec, seed=seed)


def test_three_prunings_through_both_formats_are_traced_in_one_step(teacher: Path, tmp_path: Path) -> None:
    """Hidden sizes no Llama may have, so that the family changes on the way, and a norm left as it was in between."""
    steps = [
        ("a.nemo", ExportFormat.NEMO, {"hidden_size": 60, "num_layers": 3}),
        ("b", ExportFormat.HF, {"hidden_size": 45, "rescale_norms": False, "ffn_hidden_size": 0.7}),
        ("c", ExportFormat.HF, {"hidden_size": 35, "num_query_groups": 3, "num_layers": 2}),
    ]
    path, sources = teacher, PrunedSource(open_hf(teacher), PruningPlan.keep_all(open_hf(teacher).spec))
    for seed, (name, kind, target) in enumerate(steps):
        plan = plan_for(path, seed, **target)
        sources = PrunedSource(sources, replace(plan, spec=sources.spec))
        write_checkpoint(PrunedSource(open_checkpoint(path), plan), tmp_path / name, (kind,))
        path = tmp_path / name
    student = open_checkpoint(path)
    assert student.family == "mistral"
    found = PruningPlan.of_checkpoint(path)
    assert found.spec == open_hf(teacher).spec
    assert found.digest() == sources.plan.digest()
    assert len(found.provenance["composed"]) == 3
    # A unit's weights are its teacher unit's; the norms in between are the only numbers that change.
    whole = open_hf(teacher)
    for index, layer in enumerate(found.layers):
        name = "decoder.layers.{}.mlp.linear_fc2.weight"
        expected = whole.get(name.format(layer.source))[list(found.hidden)][:, list(layer.kept[Axis.FFN])]
        assert torch.equal(student.get(name.format(index)), expected)
    name = "decoder.final_layernorm.weight"
    factor = (64 / 60 * 45 / 35) ** 0.5
    torch.testing.assert_close(student.get(name), whole.get(name)[list(found.hidden)] * factor, rtol=1e-6, atol=0)
    assert student.spec.norm_eps == pytest.approx(whole.spec.norm_eps * factor**2, rel=1e-9)


def test_mixed_settings_compose_exactly(teacher: Path) -> None:
    """Rescaled once and left alone once, in either order; written as version 2 and read back."""
    source = open_hf(teacher)
    for first_rescales in (True, False):
        first = plan_for(teacher, 1, hidden_size=48, rescale_norms=first_rescales)
        once = PrunedSource(source, first)
        second = random_plan(TargetConfig(hidden_size=32, rescale_norms=not first_rescales), once.spec, seed=2)
        both = first.compose(second)
        assert both.norm_scale is not None
        assert PruningPlan.from_dict(json.loads(json.dumps(both.to_dict()))) == both
        assert both.student == second.student
        ratio = 64 / 48 if first_rescales else 48 / 32
        name = "decoder.final_layernorm.weight"
        expected = (source.get(name).double()[list(both.hidden)] * ratio**0.5).float()
        assert torch.equal(PrunedSource(source, both).get(name), expected)


def test_an_unpruned_model_is_its_own_teacher(teacher: Path, tmp_path: Path) -> None:
    source = open_hf(teacher)
    assert PruningPlan.of_checkpoint(teacher) == PruningPlan.keep_all(source.spec)
    kept = PrunedSource(source, PruningPlan.keep_all(source.spec))
    assert kept.tokenizer_files() == source.tokenizer_files()
    write_folder(kept, tmp_path / "kept")
    assert PruningPlan.of_checkpoint(tmp_path / "kept").is_identity


def test_what_is_carried_may_not_be_lost_or_another_models(teacher: Path, tmp_path: Path) -> None:
    plan = plan_for(teacher, 1, ffn_hidden_size=50)
    write_hf(PrunedSource(open_hf(teacher), plan), tmp_path / "student")
    carried = tmp_path / "student" / PLAN_FILE
    whole = carried.read_bytes()
    carried.write_bytes(plan_for(teacher, 1, ffn_hidden_size=40).to_bytes())
    with pytest.raises(PlanError, match="other sizes"):
        PruningPlan.of_checkpoint(tmp_path / "student")
    carried.write_bytes(whole[:-40])
    for act in (
        lambda: PruningPlan.of_checkpoint(tmp_path / "student"),
        lambda: PrunedSource(open_hf(tmp_path / "student"), plan_for(tmp_path / "student", 2, num_layers=2)),
    ):
        with pytest.raises(PlanError, match=f"{PLAN_FILE}: cannot be read"):
            act()
    carried.unlink()
    with pytest.raises(PlanError, match=f"was pruned, but {PLAN_FILE} is not among its files"):
        PruningPlan.of_checkpoint(tmp_path / "student")
    with pytest.raises(CheckpointError):
        PruningPlan.of_checkpoint(tmp_path / "absent")


# -- writing ----------------------------------------------------------------------------------------------------------


class Breaking(PrunedSource):
    """Gives out some tensors and then fails, as a disk does that goes away."""

    left = 5

    def get(self, name: str) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise OSError("the disk is gone")
        return super().get(name)


@pytest.mark.parametrize("formats", [(ExportFormat.HF,), (ExportFormat.NEMO,), tuple(ExportFormat)])
def test_an_interrupted_write_leaves_what_was_there(
    teacher: Path, tmp_path: Path, formats: tuple[ExportFormat, ...]
) -> None:
    plan, other = plan_for(teacher, 1, ffn_hidden_size=50), plan_for(teacher, 2, ffn_hidden_size=50)
    target = tmp_path / ("student.nemo" if formats == (ExportFormat.NEMO,) else "student")
    places = write_checkpoint(PrunedSource(open_hf(teacher), plan), target, formats)
    before = _bytes(tmp_path)
    with pytest.raises(OSError, match="disk is gone"):
        write_checkpoint(Breaking(open_hf(teacher), other), target, formats)
    assert _bytes(tmp_path) == before
    for path in places.values():
        assert PruningPlan.of_checkpoint(path).digest() == plan.digest()


def test_a_plan_is_replaced_whole_or_not_at_all(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_for(teacher, 1, ffn_hidden_size=50).save(tmp_path / "plan.json")
    before = _bytes(tmp_path)

    def broken(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", broken)
    with pytest.raises(OSError, match="no space"):
        plan_for(teacher, 2, ffn_hidden_size=40).save(tmp_path / "plan.json")
    assert _bytes(tmp_path) == before


def _bytes(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FolderFiles(folder).names()}


def test_both_formats_hold_the_same_numbers(teacher: Path, tmp_path: Path) -> None:
    source = PrunedSource(open_hf(teacher), plan_for(teacher, 3, hidden_size=40, num_layers=2))
    places = write_checkpoint(source, tmp_path / "student", tuple(ExportFormat))
    nemo, hf = open_nemo(places[ExportFormat.NEMO]), open_hf(places[ExportFormat.HF])
    for name in source.names():
        expected = source.get(name)
        assert torch.equal(nemo.get(name), expected)
        assert torch.equal(hf.get(name), expected)


def test_layers_of_different_sizes_are_refused_before_anything_is_written(teacher: Path, tmp_path: Path) -> None:
    plan = PruningPlan.keep_all(open_hf(teacher).spec)
    uneven = replace(plan, layers=(changed(plan.layers[0], ffn=tuple(range(10))), *plan.layers[1:]))
    with pytest.raises(Exception, match="differ in size"):
        write_checkpoint(PrunedSource(open_hf(teacher), uneven), tmp_path / "student", tuple(ExportFormat))
    assert list(tmp_path.iterdir()) == []
