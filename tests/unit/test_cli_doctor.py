"""What `doctor --strict` says where there is no GPU: in the build of a container image, and on a laptop."""

from dataclasses import replace

import pytest
import torch

from nemo_minitron.cli import doctor
from nemo_minitron.cli.doctor import Finding
from nemo_minitron.parallel import fused_linear_kd
from nemo_minitron.stages import self_test

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


def test_the_self_test_finds_a_processor_that_computes_right(monkeypatch):
    monkeypatch.setattr(doctor, "_SELF_TEST_SECONDS", 500)  # a test machine may have much else to do
    found = doctor.self_test("cpu")
    assert [finding.subject for finding in found] == [
        "GPU: matrix product",
        "GPU: all-reduce",
        "GPU: attention",
        "GPU: fused loss",
    ]
    assert {finding.state for finding in found} == {doctor.OK}, found
    assert "TFLOP/s" in found[0].found


def test_the_self_test_names_what_computes_wrongly(monkeypatch):
    product, attend = torch.Tensor.__matmul__, torch.nn.functional.scaled_dot_product_attention
    loss = fused_linear_kd.fused_linear_kd
    off = 1.1

    def rough_product(a, b):
        return product(a, b) if a.dtype == torch.float64 else product(a, b) * off

    def wrong_loss(*args, **kwargs):
        right = loss(*args, **kwargs)
        return replace(right, loss_sum=right.loss_sum * off)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rough_product)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: attend(*a, **k) * off)
    monkeypatch.setattr(fused_linear_kd, "fused_linear_kd", wrong_loss)
    found = {row["name"]: row["ok"] for row in self_test.run(torch.device("cpu"))}
    assert found == {"matrix product": False, "all-reduce": True, "attention": False, "fused loss": False}


def test_a_device_that_is_not_there_is_told_and_needed(monkeypatch):
    monkeypatch.setattr(doctor, "_SELF_TEST_SECONDS", 500)
    found = doctor.self_test("cuda:7")
    assert len(found) == 4
    assert {finding.state for finding in found if finding.subject != "GPU: all-reduce"} == {doctor.BAD}
    assert not doctor.healthy(found, strict=False)
