"""What ranks of an emulated GPU machine do; module-level functions that return plain numbers."""

import gc
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.kernels.available import SWITCH
from tests.parallel import megatron_jobs
from tests.parallel.hooks_jobs import ScoreCase, score
from tests.parallel.megatron_jobs import Case, train
from tests.parallel.overlap_jobs import Run
from tests.parallel.overlap_jobs import train as train_overlapping


def train_on_both(cases: list[Case]) -> list[dict[str, Any]]:
    """Runs of the engine's layers, and at the end one of the project's own, all from the same weights."""
    results = [train(case) for case in cases]
    with own_layers():
        return [*results, train(Case("tied"))]


@contextmanager
def own_layers() -> Iterator[None]:
    """A block in which models are built of the project's own layers."""
    from nemo_minitron.megatron import build

    engine = build.engine_carries
    build.engine_carries = lambda spec, device, precision: False
    try:
        yield
    finally:
        build.engine_carries = engine


def train_all(cases: list[Case]) -> list[dict[str, Any]]:
    return [train(case) for case in cases]


def score_all(cases: list[ScoreCase]) -> list[dict[str, torch.Tensor]]:
    return [score(case) for case in cases]


def score_without_triton(case: ScoreCase) -> dict[str, torch.Tensor]:
    """Triton would look for a driver."""
    os.environ[SWITCH] = "0"
    return score(case)


def train_by_default(run: Run) -> dict[str, Any]:
    """As the settings say, or by what is right on this device where they say nothing; a rank sees one GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    os.environ[SWITCH] = "0"  # Triton would look for a driver
    return train_overlapping(run)


def save_before_the_first_step(folder: Path, distributed: bool) -> dict[str, Any]:
    """A state saved before any step, its loss curve, and that of a model that has taken the state up."""
    from tests.parallel.checkpoint_jobs import Training

    case = Case("tied", distributed=distributed)
    curves, names = [], set()
    for again in (False, True):
        training = Training(case)
        if again:
            training.load(folder)
        else:
            training.save(folder)
            adam = training.optimizer.optimizer.chained_optimizers[0].optimizer
            names = {type(adam).__name__, *(name for state in adam.state.values() for name in state)}
        curves.append([_loss(training) for _ in range(3)])
    return {"first": curves[0], "again": curves[1], "names": sorted(names)}


def _loss(training: Any) -> float:
    from nemo_minitron.megatron.forward import reduce_report, run

    training.optimizer.zero_grad()
    batch = megatron_jobs.micro_batches(training.case, training.here)
    reports = run(training.wrapped, batch, megatron_jobs.loss, runtime=training.here, forward_only=False)
    training.optimizer.step()
    return reduce_report(reports, training.here)["total"]


def inference_mode_then_training(parallel: ParallelConfig) -> dict[str, Any]:
    """Score, measure and validate in inference mode, as by hand; then train the same model."""
    from nemo_minitron.megatron.depth_metrics import DepthCollector
    from nemo_minitron.megatron.forward import reduce_report, run
    from nemo_minitron.megatron.hooks import ImportanceCollector
    from nemo_minitron.pruning.depth import candidate_blocks
    from tests.parallel.checkpoint_jobs import Training

    training = Training(Case("tied", parallel))
    here, chunks = training.here, training.wrapped
    batch = megatron_jobs.micro_batches(training.case, here)
    spec = megatron_jobs.ALL_SPECS["tied"]
    with torch.inference_mode():
        with ImportanceCollector(chunks, here, spec) as collector:
            collector.expect([micro_batch.keep for micro_batch in batch])
            sums = reduce_report(run(chunks, batch, megatron_jobs.loss, runtime=here, forward_only=True), here)
            collector.load(collector.result())
            collector.expect([micro_batch.keep for micro_batch in batch])
            run(chunks, batch, megatron_jobs.loss, runtime=here, forward_only=True)
            samples = collector.result()["samples"].item()
        depth = DepthCollector(chunks, here, spec, blocks=candidate_blocks(4))
        depth.add(batch[-1])
        depth.result()
    return {"validated": sums["total"], "samples": samples, "trained": [_loss(training) for _ in range(2)]}


def top_k_loss_in_inference_mode() -> list[float]:
    """The loss of a teacher's likeliest tokens in and out of inference mode, through the schedule."""
    from nemo_minitron.megatron.forward import LossResult, reduce_report, run
    from nemo_minitron.parallel.fused_linear_sparse_kd import fused_linear_sparse_kd
    from nemo_minitron.parallel.sparse_targets import top_k_targets
    from tests.parallel.checkpoint_jobs import Training

    training = Training(Case("tied", megatron_jobs.ONE))
    (chunk,) = training.wrapped
    model = chunk.module
    model.output = "hidden"

    def loss(hidden: torch.Tensor, batch: Any, index: int) -> LossResult:
        weight = model.output_weight()
        targets = top_k_targets(hidden.detach().flatten(0, 1), weight.detach(), k=4, vocab_size=94)
        result = fused_linear_sparse_kd(2 * hidden.flatten(0, 1), weight, targets, vocab_size=94)
        return LossResult(result.loss_sum, result.tokens)

    found = []
    batch = megatron_jobs.micro_batches(training.case, training.here)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            reports = run(training.wrapped, batch, loss, runtime=training.here, forward_only=True)
            found.append(reduce_report(reports, training.here)["total"])
    return found


def run_recipe(recipe: Path, overrides: list[str], run: Path, last: str | None = None) -> dict[str, Any]:
    """All stages of a recipe in this process; what they left, and what of each stage's models outlived it.

    With `last`, the stages up to that one.
    """
    from nemo_minitron.callbacks.reporter import Reporter
    from nemo_minitron.cli import quiet
    from nemo_minitron.config.load import load_recipe
    from nemo_minitron.megatron import build, optim, runtime
    from nemo_minitron.stages.chain import chain_for
    from nemo_minitron.stages.engine import Request, join_processes, run_chain
    from nemo_minitron.stages.run_folder import RunFolder

    quiet.install()
    watched = Watched(build, optim)
    config = load_recipe(recipe, overrides)
    folder = RunFolder(run)
    processes = join_processes(config, folder)
    gc.disable()  # what a stage leaves is to be freed when it ends, not when the collector happens to run
    try:
        chain = chain_for(config)
        request = Request(config=config, run=folder, last=last)
        run_chain(chain, request, processes=processes, reporter=watched.reporter(Reporter))
        results = {stage.name: folder.result(stage.name) for stage in chain if folder.is_complete(stage.name)}
    finally:
        gc.enable()
        runtime.stop()
    return {
        "perplexity": results["evaluate"]["perplexity"] if last is None else {},
        "kl": [row["kl"] for row in results["distill"]["history"]],
        "built": watched.built,
        "alive": watched.alive,
        "most_at_once": watched.most_at_once,
        "layers": sorted(watched.layers),
    }


class Watched:
    """Weak references to all models that are built, and to their wrappers and gradient buffers."""

    def __init__(self, build: Any, optim: Any) -> None:
        self.built = 0
        self.alive: dict[str, int] = {}
        """By stage, at its end."""
        self.most_at_once = 0
        """Models in memory when another one is built."""
        self.layers: set[str] = set()
        self._models: list[weakref.ref[Any]] = []
        self._others: list[weakref.ref[Any]] = []
        build_chunks, wrap = build.build_chunks, optim.wrap

        def watched_build(*args: Any, **kwargs: Any) -> Any:
            self.most_at_once = max(self.most_at_once, _alive(self._models))
            chunks = build_chunks(*args, **kwargs)
            self.built += 1
            self._models += map(weakref.ref, chunks)
            self.layers |= {_kind(chunk.decoder.layers[0]) for chunk in chunks}
            return chunks

        def watched_wrap(*args: Any, **kwargs: Any) -> Any:
            wrapped = wrap(*args, **kwargs)
            buffers = [buffer.grad_data for chunk in wrapped for buffer in chunk.buffers]
            self._others += map(weakref.ref, [*wrapped, *buffers])
            return wrapped

        build.build_chunks, optim.wrap = watched_build, watched_wrap

    def reporter(self, kind: type) -> Any:
        """A silent reporter that counts at the end of each stage."""
        reporter = kind(silent=True)
        finished = reporter.stage_finished

        def stage_finished(name: str, *args: Any, **kwargs: Any) -> None:
            self.alive[name] = _alive([*self._models, *self._others])
            finished(name, *args, **kwargs)

        reporter.stage_finished = stage_finished
        return reporter


def _kind(layer: Any) -> str:
    """Class of a layer's first linear behind its middle, of its mixture, or of Mamba's first."""
    part = next(part for part in (layer.mlp, layer.self_attention) if type(part).__name__ != "IdentityOp")
    found = getattr(part, "linear_fc1", None) or getattr(part, "in_proj", None) or part
    return type(found).__name__


def _alive(references: list[weakref.ref[Any]]) -> int:
    return sum(reference() is not None for reference in references)


def validate_with_a_trainer_of_ones_own(source: Path) -> dict[str, Any]:
    """A user's `Trainer`, which says nothing of inference mode, validates and trains a model."""
    from lightning.pytorch import LightningDataModule, Trainer
    from torch.utils.data import DataLoader

    from nemo_minitron import MegatronGPTModel
    from nemo_minitron.megatron.forward import MicroBatch
    from nemo_minitron.models.strategy import MegatronStrategy

    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader([self.batch()] * 2, batch_size=None)

        val_dataloader = train_dataloader

        def batch(self) -> MicroBatch:
            tokens = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))
            return MicroBatch.of(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 16, dtype=torch.bool))

    modes = []

    class Model(MegatronGPTModel):
        def validation_step(self, *args: Any, **kwargs: Any) -> Any:
            modes.append(torch.is_inference_mode_enabled())
            return super().validation_step(*args, **kwargs)

    config = Model.restore_from(source, return_config=True)
    config.precision, config.micro_batch_size = "32", 2
    config.optim = {"name": "adamw", "lr": 1e-3}
    trainer = Trainer(
        strategy=MegatronStrategy(),
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        max_steps=2,
        limit_val_batches=1,
        check_val_every_n_epoch=None,
        val_check_interval=10,
    )
    model = Model.restore_from(source, override_config_path=config, trainer=trainer)
    trainer.validate(model, datamodule=Data(), verbose=False)
    trainer.fit(model, datamodule=Data())
    return {"inference_mode": modes, "steps": trainer.global_step}


def save_in_background(folder: Path) -> dict[str, Any]:
    """A background save of tensors on a GPU: which thread made which device current, and what came of it."""
    import threading

    from torch.distributed.checkpoint import filesystem

    from nemo_minitron.megatron.checkpoint_writer import BackgroundWriter
    from tests.parallel.checkpoint_jobs import Training

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("copies ahead on the stream of the training")

    training = Training(Case("tied"))
    losses = [_loss(training)]
    made_current = []
    torch.cuda.set_device = lambda device: made_current.append((threading.current_thread().name, str(device)))
    filesystem._OverlappingCpuLoader = refused
    background = BackgroundWriter()
    training.save(folder / "background.ckpt", background)
    written = background.finished(wait=True)
    training.save(folder / "at_once.ckpt")
    losses.append(_loss(training))
    again = Training(Case("tied"))
    again.load(folder / "background.ckpt")
    return {"current": made_current, "written": written.name, "losses": losses, "again": _loss(again)}


def states_of_a_projection() -> dict[str, Any]:
    """Where the state of a projection between hidden states lies, after a step and after it was taken up again."""
    from nemo_minitron.config.hidden import HiddenConfig
    from nemo_minitron.config.training import OptimizerConfig
    from nemo_minitron.megatron import runtime
    from nemo_minitron.models.hidden import StateMatching

    here = runtime.start(ParallelConfig(), seed=0)
    spec = megatron_jobs.ALL_SPECS["tied"]
    how = {"student": spec, "teacher": spec, "runtime": here, "optimizer": OptimizerConfig(lr=1e-2)}
    config = HiddenConfig(layers=((1, 1),), projection=True)
    first, second = StateMatching(config, **how), StateMatching(config, **how)
    first.projection.grad = torch.ones_like(first.projection)
    first.step(tokens=1.0, lr=1e-2, skipped=False)
    state = first.state_dict()
    second.load_state_dict(state)
    pairs = zip(_tensors(second.state_dict()), _tensors(state), strict=True)
    return {
        "projection": str(first.projection.device),
        "state": sorted({str(x.device) for x in _tensors(state)}),
        "count": len(_tensors(state)),
        "same": all(torch.equal(x, y) for x, y in pairs),
        "moments": sorted({str(x.device) for x in _tensors(second._optimizer.state) if x.dim() > 0}),
    }


class _ForgetsTheDevice(torch.autograd.Function):
    """Multiplies by two, and in its backward pass by a tensor that it makes on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * torch.full((2, 3), 2.0)


def mixed(where: str) -> float:
    """A tensor of the GPU and one of the CPU meet, or do not."""
    x = torch.ones(2, 3, device="cuda", requires_grad=True)
    if where == "forward":
        x * torch.ones(2, 3)
    elif where == "backward":
        _ForgetsTheDevice.apply(x).sum().backward()
    elif where == "numpy":
        x.detach().numpy()
    return (x * torch.ones(2, 3).to(x.device) * torch.tensor(2.0)).sum().item()


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def on_pretended_gpu(job: str, *args: Any) -> Any:
    """A job below or in `megatron_jobs` on a process that sees a GPU; what it returns comes back as the CPU's."""
    from tests.support import pretend_gpu

    pretend_gpu.install()
    found = globals()[job](*args)
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, found)
