"""What `doctor --strict` says where there is no GPU: in the build of a container image, and on a laptop."""

import pytest

from nemo_minitron.cli import doctor
from nemo_minitron.cli.doctor import Finding

NO_GPU = {"gpus": [], "gloo": True}


def parts_without_a_gpu(build: str) -> list[Finding]:
    return [doctor._gpu_part(part, {"build": build, **NO_GPU}) for part in doctor.GPU_PARTS]


def test_an_image_whose_gpu_parts_are_there_passes_without_a_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda distribution: "2.4")
    monkeypatch.setattr(doctor, "_import_error", lambda module: pytest.fail("needs a driver"))
    assert doctor.healthy(parts_without_a_gpu("CUDA 13.0"), strict=True)


@pytest.mark.parametrize(("build", "passes"), [("CUDA 13.0", False), ("CPU", True)])
def test_an_image_that_lost_transformer_engine_fails(monkeypatch, build, passes):
    monkeypatch.setattr(doctor, "_version", lambda distribution: "")
    found = parts_without_a_gpu(build)
    assert doctor.healthy(found, strict=True) == passes
    assert doctor.healthy(found, strict=False)


def test_the_absence_of_what_only_some_want_is_told_and_no_failure(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda distribution: "")
    monkeypatch.setattr(doctor, "_import_error", lambda module: "No module named it")
    wanted_by_some = [doctor._part(part) for part in doctor.PARTS if part.extra]
    assert {finding.subject for finding in wanted_by_some} >= {"nemo-run", "wandb", "lm_eval"}
    assert all("pip install" in finding.cost for finding in wanted_by_some)
    assert doctor.healthy(wanted_by_some, strict=True)
