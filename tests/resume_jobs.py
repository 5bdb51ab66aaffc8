"""One training that is stopped, and goes on again and again with another value of one setting; for the matrix test."""

import hashlib
import importlib.util
import io
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from nemo_minitron.errors import MinitronError
from tests import chain_jobs

SCRIPT = Path(__file__).parents[1] / "examples/megatron_gpt_distillation.py"
LENGTH, BATCH = 32, 4
STEPS, SAVED, KILLED = 12, 6, 8
"""Steps asked for at first; of the checkpoint that training goes on from; after which the process is killed."""
DISTILL: dict[str, Any] = {
    "tokens": STEPS * BATCH * LENGTH,
    "batch": {"sequence_length": LENGTH, "micro_batch_size": 2, "global_batch_size": BATCH},
    "optimizer": {"lr": 2e-3, "min_lr": 2e-4, "warmup_steps": 3},
    "validate_every": SAVED,
    "validation_samples": BATCH,
    "checkpoint_every": SAVED,
}


class KilledError(Exception):
    """As if the process were killed: nothing is tidied up."""


class Watch:
    """What each step of an attempt saw and did."""

    def __init__(self) -> None:
        self.killed: int | None = None
        self.clear()

    def clear(self) -> None:
        self.samples: dict[int, list[str]] = {}
        self.used: dict[int, list[dict[str, float]]] = {}
        self.weights: list[Any] = []

    def install(self) -> None:
        """Into the classes of this process."""
        from nemo_minitron.megatron.optim import TrainOptimizer
        from nemo_minitron.models.distillation import MegatronGPTDistillationModel as Model
        from nemo_minitron.models.strategy import MegatronStrategy

        training_step, step, ended = Model.training_step, TrainOptimizer.step, MegatronStrategy.on_train_end

        def training_step_noted(model, batch, batch_idx):
            self.samples[model.trainer.global_step + 1] = [_digest(row) for row in batch.tokens]
            training_step(model, batch, batch_idx)

        def step_noted(optimizer, refuse=None):
            info = step(optimizer, refuse)
            self.used[optimizer.steps_taken] = [
                {
                    "lr": group["lr"],
                    "decays": group["wd_mult"],
                    "weight_decay": group["weight_decay"],
                    "beta1": group["betas"][0],
                    "beta2": group["betas"][1],
                    "eps": group["eps"],
                    "clip_grad": optimizer.clip_grad,
                }
                for group in optimizer.optimizer.param_groups
            ]
            return info

        def ended_noted(strategy):
            ended(strategy)
            [chunk] = strategy.lightning_module.chunks
            self.weights = [parameter.detach().clone() for _, parameter in chunk.named_weights()]

        def batch_ended(model, outputs, batch, batch_idx):
            if model.trainer.global_step == self.killed:
                raise KilledError

        Model.training_step, TrainOptimizer.step = training_step_noted, step_noted
        MegatronStrategy.on_train_end = ended_noted
        Model.on_train_batch_end = batch_ended

    @contextmanager
    def attempt(self, found: dict[str, Any], killed: int | None = None) -> Iterator[None]:
        """Note what one attempt does, or why it is refused."""
        self.clear()
        self.killed = killed
        try:
            yield
        except KilledError:
            assert killed is not None
        except MinitronError as error:
            found["refused"] = str(error)
        except SystemExit as ended:
            found["status"] = ended.code
        found |= {"samples": self.samples, "used": self.used, "weights": self.weights}


def _digest(row) -> str:
    return hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16]


# -- recipe --------------------------------------------------------------------------------------------------------


def recipe_rows(
    run: Path,
    inputs: Path,
    rows: Mapping[str, Mapping[str, Any]],
    *,
    begun: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """An undisturbed training (`whole`), a stopped one (`stopped`), and how that goes on with each row's recipe.

    Args:
        run: A run folder with all stages before distillation.
        inputs: Folder with `hf/` and `corpus/`.
        rows: Changes of `DISTILL` by dotted key (`distill.optimizer.lr`), or of other sections, by the row's name.
        begun: Changes that the stopped training has already.
    """
    watch = Watch()
    watch.install()
    found: dict[str, dict[str, Any]] = {"complete": {}, "stopped": {}}
    again = run.with_name("again")
    shutil.copytree(run, again)
    with watch.attempt(found["complete"]):
        _run(again, inputs, begun or {})
    with watch.attempt(found["stopped"], KILLED):
        _run(run, inputs, begun or {})
    for name, changes in rows.items():
        shutil.rmtree(again)
        shutil.copytree(run, again)
        found[name] = {}
        with watch.attempt(found[name]):
            found[name]["result"] = _run(again, inputs, {**(begun or {}), **changes})["distill"]
    return found


def _run(run: Path, inputs: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    sections: dict[str, Any] = {"distill": DISTILL}
    for key, value in changes.items():
        sections = _with(sections, key, value)
    return chain_jobs.run_to(run, inputs, "distill", **sections)


def _with(data: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {**data, first: _with(data.get(first) or {}, rest, value) if rest else value}


# -- hydra ---------------------------------------------------------------------------------------------------------


def hydra_rows(
    run: Path, where: Path, rows: Mapping[str, Mapping[str, Any]], *, early: bool = True
) -> dict[str, dict[str, Any]]:
    """The same through the hydra script, with keys of its configuration.

    Args:
        run: A run folder with all stages before distillation, which gives teacher, student and data.
        where: An empty folder.
        rows: Changes of the configuration by dotted key, by the row's name.
        early: Whether the script compares before it reads the models; else only `MegatronStrategy` does, as for a
            script of one's own.
    """
    from nemo_minitron.cli import quiet

    quiet.install()
    watch = Watch()
    watch.install()
    script = _script()
    if not early:
        script.resumed_settings = lambda script, *unused: script.settings
    found: dict[str, dict[str, Any]] = {"stopped": {}}
    with watch.attempt(found["stopped"], KILLED):
        _script_run(script, run, where / "stopped", {})
    for name, changes in rows.items():
        again = where / "again"
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(where / "stopped", again)
        found[name] = {}
        with watch.attempt(found[name]):
            said = io.StringIO()
            try:
                _script_run(script, run, again, {"exp_manager.resume_if_exists": True, **changes}, said)
            finally:
                found[name]["said"] = said.getvalue()
    return found


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("distillation_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _script_run(
    script: Any, run: Path, where: Path, changes: Mapping[str, Any], said: io.StringIO | None = None
) -> None:
    from omegaconf import OmegaConf

    from nemo_minitron.megatron import runtime
    from nemo_minitron.models.scripts import reported_errors

    cfg = OmegaConf.load(SCRIPT.parent / "conf/megatron_gpt_distillation.yaml")
    stages = run / "stages"
    given = {
        "model.student": str(stages / "prune/student"),
        "model.data": str(stages / "data"),
        "model.minitron.distillation.teacher": str(stages / "import/teacher"),
        **{"model.precision": "32", "model.encoder_seq_length": LENGTH, "model.validation_samples": BATCH},
        **{"model.micro_batch_size": 2, "model.global_batch_size": BATCH},
        **{"model.optim.lr": 2e-3, "model.optim.sched.min_lr": 2e-4, "model.optim.sched.warmup_steps": 3},
        **{"trainer.max_steps": STEPS, "trainer.val_check_interval": SAVED, "trainer.enable_progress_bar": False},
        **{"exp_manager.explicit_log_dir": str(where), "exp_manager.create_tensorboard_logger": False},
        **changes,
    }
    for key, value in given.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(said or io.StringIO()), reported_errors():
            script.distill(cfg)
    finally:
        runtime.stop()
