"""What ranks do in the tests of the cost model: steps in which collectives, operations and files are counted."""

import tempfile
from collections import Counter
from itertools import chain, repeat
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.training import OptimizerConfig
from tests.support.emulation import split_angles_on_cpu

SAMPLES, LENGTH, MICRO_BATCHES = 2, 32, 4

# Operations of torch.distributed, and which of their arguments is the complete tensor.
_KINDS = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("gradient all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("gradient all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "alltoall_base_": ("all-to-all", 1),
    "reduce_scatter_tensor_coalesced_": ("gradient reduce-scatter", 1),
    "send": ("send", 0),
}
_SCALARS = 16


class Collectives(TorchDispatchMode):
    """Bytes of the complete tensors of each kind of collective, in the names of `estimate.communication`.

    Megatron's buffers of gradients and weights are the only ones that travel coalesced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if func.namespace == "c10d" and name not in ("recv_", "broadcast_") and _ranks(args) > 1:
            kind, whole = _KINDS[name]
            size = sum(tensor.nbytes for tensor in _tensors(args[whole]))
            if size > _SCALARS:
                self.bytes[kind] += size
        return func(*args, **(kwargs or {}))


def _ranks(arguments: Any) -> int:
    """Ranks of the group among the arguments of a collective."""
    objects = (each for each in arguments if isinstance(each, torch.ScriptObject))
    (group,) = (each for each in objects if "ProcessGroup" in str(each._type()))
    return dist.ProcessGroup.unbox(group).size()


def _tensors(argument: Any) -> list[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        return [argument]
    return [tensor for item in argument for tensor in _tensors(item)]


def distill_once(
    student_spec: ModelSpec, teacher_spec: ModelSpec, parallel: ParallelConfig, precision: Precision, distributed: bool
) -> tuple[int, dict[str, int]]:
    """Pipeline stage of this rank, and what its collectives moved in one step of distillation."""
    from nemo_minitron.megatron import forward, optim, runtime
    from nemo_minitron.models.losses import DistillationLoss, tensor_group

    here = runtime.start(parallel, seed=0)
    split_angles_on_cpu()
    teacher = _build(teacher_spec, here, precision, trainable=False)
    student = _build(student_spec, here, precision)
    for chunk in (*student, *teacher):
        chunk.output = "hidden"
    config = OptimizerConfig(distributed=distributed)
    wrapped = optim.wrap(student, config)
    trainer = optim.build_optimizer(wrapped, config, precision, steps=10)
    micro_batches = [_batch(student_spec)] * MICRO_BATCHES
    with Collectives() as seen:
        trainer.zero_grad()
        states = forward.collect_hidden(teacher, micro_batches, here)
        loss = DistillationLoss(
            student=student[-1],
            teacher=teacher[-1],
            teacher_states=states,
            vocab_size=student_spec.vocab_size,
            tensor_group=tensor_group(here),
        )
        forward.run(wrapped, micro_batches, loss, runtime=here, forward_only=False)
        trainer.step()
    runtime.stop()
    return here.pp_rank, dict(seen.bytes)


def _build(spec: ModelSpec, here: Any, precision: Precision, *, trainable: bool = True) -> list[Any]:
    from nemo_minitron.megatron import build

    # Sequence and context parallelism are refused without Transformer Engine; what travels is the business of
    # Megatron's linears and of Mamba's mixers, which the local layers have too. The first question is the refusal's,
    # the others choose the layers.
    answers = chain([here.parallel.sequence_parallel or here.parallel.context > 1], repeat(False))
    with patch.object(build, "engine_carries", side_effect=answers):
        return build.build_chunks(spec, here, precision, seed=0, trainable=trainable)


def _batch(spec: ModelSpec, samples: int = SAMPLES, length: int = LENGTH) -> Any:
    from nemo_minitron.megatron.forward import MicroBatch

    tokens = torch.randint(0, spec.vocab_size, (samples, length))
    return MicroBatch.of(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool))


def _linear_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * weight[0]


def train_once(spec: ModelSpec, precision: Precision, samples: int, length: int) -> tuple[int, int]:
    """Operations of one step of plain training on one rank, and bytes of its checkpoint's folder."""
    from nemo_minitron.megatron import forward, optim, runtime, sharded_io
    from nemo_minitron.models.losses import LanguageModelLoss

    here = runtime.start(ParallelConfig(), seed=0)
    chunks = _build(spec, here, precision)
    chunks[0].output = "hidden"
    config = OptimizerConfig()
    wrapped = optim.wrap(chunks, config)
    for parameter in chunks[0].parameters():
        parameter.gradient_through_autograd = True  # PyTorch's counter does not know products that add in place
    trainer = optim.build_optimizer(wrapped, config, precision, steps=10)
    loss = LanguageModelLoss(model=chunks[0], vocab_size=spec.vocab_size, tensor_group=None)
    # PyTorch's counter does not know oneDNN's product.
    known = {torch.ops.mkldnn._linear_pointwise: _linear_flops}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        forward.run(wrapped, [_batch(spec, samples, length)], loss, runtime=here, forward_only=False)
    trainer.step()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "state.ckpt"
        sharded_io.save_training(wrapped, trainer, target, common={"step": 1})
        size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    runtime.stop()
    return counter.get_total_flops(), size
