"""Every family against transformers: logits before and after pruning, bytes there and back, what is exact in a cut."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_minitron.arch.axes import Axis
from nemo_minitron.checkpoints.hf import open_hf, write_hf
from nemo_minitron.checkpoints.nemo1 import write_folder
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.config.parallel import Precision
from nemo_minitron.config.training import OptimizerConfig, Schedule
from nemo_minitron.megatron import optim
from nemo_minitron.megatron.forward import MicroBatch, collect_hidden, reduce_report, run
from nemo_minitron.megatron.hooks import ImportanceCollector
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.models.losses import DistillationLoss
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.plan import PruningPlan
from tests import tiny
from tests.support.family_plans import FFN, HEADS, HIDDEN, SIZE, plan_for
from tests.support.loaded import TOKENS, hf_logits, loaded, megatron_logits, megatron_model

CASES = pytest.mark.parametrize("case", tiny.FAMILY_CONFIGS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("families")
    _written.cache_clear()


@cache
def _written(root: Path, case: str) -> tuple[Path, PreTrainedModel]:
    folder = root / case.replace(", ", "_").replace(" ", "_")
    return folder, tiny.write_family(folder, case)


@CASES
def test_logits_are_those_of_transformers_before_and_after_pruning(
    case: str, folders: Path, tmp_path: Path, here: Runtime
) -> None:
    folder, _ = _written(folders, case)
    source = open_hf(folder)
    torch.testing.assert_close(megatron_logits(source, here), hf_logits(loaded(folder)), rtol=1e-4, atol=1e-4)
    pruned = PrunedSource(source, plan_for(source))
    write_hf(pruned, tmp_path / "pruned")
    again = open_hf(tmp_path / "pruned")
    sizes = again.spec.layer
    assert again.spec.head_dim == SIZE != again.spec.hidden_size / sizes.attention.num_attention_heads == 48 / 6
    assert again.spec == pruned.spec
    expected = hf_logits(loaded(tmp_path / "pruned"))
    torch.testing.assert_close(megatron_logits(pruned, here), expected, rtol=1e-4, atol=1e-4)


@CASES
def test_bytes_there_and_back(case: str, folders: Path, tmp_path: Path) -> None:
    """bf16: Hugging Face, our folder, Hugging Face; as it is and pruned."""
    folder, _ = _written(folders, case)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "first")
    source = open_hf(tmp_path / "first")
    write_hf(PrunedSource(source, plan_for(source)), tmp_path / "pruned")
    for name in ("first", "pruned"):
        write_folder(open_hf(tmp_path / name), tmp_path / f"{name}.folder")
        write_hf(open_checkpoint(tmp_path / f"{name}.folder"), tmp_path / f"{name}.again")
        before, after = (load_file(tmp_path / f"{name}{end}" / "model.safetensors") for end in ("", ".again"))
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert tensor.dtype == after[key].dtype == torch.bfloat16
            assert torch.equal(tensor.view(torch.int16), after[key].view(torch.int16)), key


# -- dead units -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def kill(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Make everything that the plan cuts carry nothing, in the sense of the model's norms."""
    dead = [channel for channel in range(HIDDEN) if channel not in plan.hidden]
    kept = list(plan.hidden)
    layernorm = model.config.model_type == "nemotron"
    state = model.state_dict()
    for name, weight in state.items():
        if "embed_tokens" in name:
            weight[:, dead] = weight[:, kept].mean(1, keepdim=True) if layernorm else 0.0
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[dead] = weight[kept].mean(0) if layernorm else 0.0
        elif name.endswith("norm.bias"):
            weight[dead] = 0.0
    for layer in plan.layers:
        block = model.model.layers[layer.source]
        block.mlp.down_proj.weight[:, [unit for unit in range(FFN) if unit not in layer.kept[Axis.FFN]]] = 0.0
        for head in set(range(HEADS)) - set(layer.kept[Axis.HEAD]):
            block.self_attn.o_proj.weight[:, head * SIZE : (head + 1) * SIZE] = 0.0
    for index in set(range(4)) - {layer.source for layer in plan.layers}:
        block = model.model.layers[index]
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()


@CASES
def test_cutting_what_carries_nothing_changes_no_logit(case: str, folders: Path, tmp_path: Path) -> None:
    """Channels carry nothing if they are zero, or under LayerNorm the mean of all channels, with no bias.

    Norms of query and key heads share their epsilon with the others: rescaling it by c moves them by a share of
    (c - 1) eps / 2 mean(q^2), which is below fp32's resolution at the usual 1e-6.
    """
    folder, alive = _written(folders, case)
    plan = plan_for(open_hf(folder))
    model = loaded(folder)
    kill(model, plan)
    model.save_pretrained(tmp_path / "dead")
    write_hf(PrunedSource(open_hf(tmp_path / "dead"), plan), tmp_path / "pruned")
    expected = hf_logits(model)
    assert (expected - hf_logits(alive)).abs().max() > 0.1  # nothing was dead before
    torch.testing.assert_close(hf_logits(loaded(tmp_path / "pruned")), expected, rtol=2e-5, atol=2e-5)


def test_layernorm_channels_that_are_zero_are_not_free(folders: Path, tmp_path: Path) -> None:
    """They pull the mean, and carry its negative themselves: what holds for RMSNorm does not for LayerNorm."""
    folder, _ = _written(folders, "nemotron")
    plan = plan_for(open_hf(folder))
    model = loaded(folder)
    kill(model, plan)
    dead = [channel for channel in range(HIDDEN) if channel not in plan.hidden]
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if "embed_tokens" in name:
                weight[:, dead] = 0.0
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[dead] = 0.0
    model.save_pretrained(tmp_path / "zero")
    write_hf(PrunedSource(open_hf(tmp_path / "zero"), plan), tmp_path / "pruned")
    assert (hf_logits(loaded(tmp_path / "pruned")) - hf_logits(model)).abs().max() > 1e-2


# -- scoring and training ---------------------------------------------------------------------------------------------


@CASES
def test_importance_is_read_where_transformers_has_it(case: str, folders: Path, here: Runtime) -> None:
    """Mean |x| over positions of what norms give and what the second matrices take, by hooks in transformers."""
    folder, model = _written(folders, case)
    second_norm = "pre_feedforward_layernorm" if case == "gemma3" else "post_attention_layernorm"
    found: dict[str, Tensor] = {}

    def watch(name: str, module: torch.nn.Module, *, output: bool) -> object:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            found[name] = (out if output else args[0]).abs().mean(1).sum(0).double()

        return module.register_forward_hook(hook)

    handles = []
    for index, layer in enumerate(model.model.layers):
        handles += [
            watch(f"layers.{index}.hidden.attention.mean.sum", layer.input_layernorm, output=True),
            watch(f"layers.{index}.hidden.mlp.mean.sum", getattr(layer, second_norm), output=True),
            watch(f"layers.{index}.head.mean.sum", layer.self_attn.o_proj, output=False),
            watch(f"layers.{index}.ffn.mean.sum", layer.mlp.down_proj, output=False),
        ]
    hf_logits(model)
    for handle in handles:
        handle.remove()
    source = open_hf(folder)
    chunk = megatron_model(source, here)
    micro = MicroBatch.of(TOKENS, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    with ImportanceCollector([chunk], here, source.spec) as collector:
        collector.expect([micro.keep])
        collect_hidden([chunk], [micro], here)
    sums = collector.result()
    for name, expected in found.items():
        torch.testing.assert_close(sums[name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@CASES
def test_a_pruned_student_learns_from_its_teacher(case: str, folders: Path, tmp_path: Path, here: Runtime) -> None:
    """The first step's loss is the KL between the two models' logits in transformers; then it falls."""
    folder, model = _written(folders, case)
    source = open_hf(folder)
    write_hf(PrunedSource(source, plan_for(source)), tmp_path / "student")
    student = megatron_model(open_hf(tmp_path / "student"), here, trainable=True)
    teacher = megatron_model(source, here)
    student.output = teacher.output = "hidden"
    micro = MicroBatch.of(TOKENS, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    loss = DistillationLoss(
        student=student,
        teacher=teacher,
        teacher_states=collect_hidden([teacher], [micro], here),
        vocab_size=256,
        tensor_group=None,
    )
    config = OptimizerConfig(lr=3e-3, min_lr=3e-3, warmup_steps=0, weight_decay=0.0, schedule=Schedule.CONSTANT)
    wrapped = optim.wrap([student], config)
    optimizer = optim.build_optimizer(wrapped, config, Precision.FP32, 3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        sums = reduce_report(run(wrapped, [micro], loss, runtime=here, forward_only=False), here)
        losses.append(sums["kl"] / sums["tokens"])
        optimizer.step()
    theirs, ours = (hf_logits(each).double().log_softmax(-1) for each in (model, loaded(tmp_path / "student")))
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    assert losses[0] == pytest.approx(float(kl), rel=1e-4)
    assert losses[2] < losses[1] < losses[0]
