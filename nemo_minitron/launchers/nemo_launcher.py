"""NeMo-Framework-Launcher: a recipe as its stages, score -> prune -> distill, one job after the other.

Each job calls a script of `examples/` with a configuration in NeMo's keys, made out of the recipe. The launcher is
imported when `stage_class` is called, and not before. `nemo_minitron.cli.nemo_launcher` is the main program.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_minitron.config.cluster import ClusterConfig
from nemo_minitron.config.parallel import Precision
from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.training import FinishWith
from nemo_minitron.errors import ConfigError, LaunchError
from nemo_minitron.launchers.commands import arguments, check_ranks
from nemo_minitron.models import nemo_settings

SCRIPTS: Mapping[str, str] = {
    "score": "megatron_gpt_score",
    "prune": "megatron_gpt_prune",
    "distill": "megatron_gpt_distillation",
}
"""Stages that the launcher can be asked for, in order, and what each of them calls."""
IN_CONTAINER = Path("/opt/nemo_minitron")
"""Where our Dockerfile puts the source tree."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is launched.

    Attributes:
        recipe: As the nodes will find it.
        overrides: `key=value` items; they are in `config` already.
        folder: Where everything goes, on a disk that all nodes see.
        code: Our source tree on the nodes.
    """

    recipe: str
    overrides: Sequence[str]
    config: RunConfig
    folder: Path
    code: Path = IN_CONTAINER

    @property
    def cluster(self) -> ClusterConfig:
        """Nodes and GPUs; one node where the recipe says nothing."""
        return self.config.cluster or ClusterConfig()


def submit(cfg: DictConfig, plan: Plan) -> list[str]:
    """Submit the stages that the launcher's configuration names, each after the one before has succeeded.

    Returns:
        Job ids.

    Raises:
        ConfigError: A stage that is none of `SCRIPTS`, or a recipe with parts that the scripts leave out.
        LayoutError: The GPUs do not fit the layout.
    """
    wanted = list(cfg["stages"])
    problems = [f"stages: {name}: one of {', '.join(SCRIPTS)}" for name in wanted if name not in SCRIPTS]
    if problems := problems + _left_out(plan.config):
        raise ConfigError(plan.recipe, problems)
    check_ranks(plan.cluster.gpus, plan.config.parallel)
    kind = stage_class(plan)
    jobs: list[str] = []
    for name in (name for name in SCRIPTS if name in wanted):
        with open_dict(cfg):
            cfg.minitron = stage_config(name, plan, after=jobs[-1] if jobs else None)
            cfg.minitron_config = f"{SCRIPTS[name]}/{name}"
        jobs.append(kind(cfg).run())
    return jobs


def stage_class(plan: Plan) -> Any:
    """The launcher's `NeMoStage`, calling our scripts.

    Raises:
        LaunchError: The launcher cannot be imported.
    """
    try:
        from nemo_launcher.core.stages import NeMoStage
    except ImportError as error:
        raise LaunchError(
            f"NeMo-Framework-Launcher cannot be imported ({error})",
            remedy="give launcher_scripts_path=/path/to/NeMo-Framework-Launcher/launcher_scripts",
        ) from error

    class MinitronStage(NeMoStage):  # type: ignore[misc]
        """One script of ours."""

        def setup_stage_vars(self, cfg: DictConfig) -> None:
            self.stage_name = "minitron"
            self.stage_cfg = cfg.minitron

        def make_stage_command_groups(self, stage_cfg_path: Path) -> list[list[str]]:
            groups: list[list[str]] = super().make_stage_command_groups(stage_cfg_path)
            if self.get_stage_config_choice()[1] != "score":
                return groups
            words = arguments("data", plan.recipe, plan.overrides, plan.folder)
            prepare = _inside_quotes(["python3", "-u", "-m", "nemo_minitron", *words])
            return [[*self._make_nemo_path_command(), prepare], *groups]

        def _make_nemo_path_command(self) -> list[str]:
            return [f"export PYTHONPATH={plan.code}:\\${{PYTHONPATH}}"]

        def _get_nemo_code_path(self, model_type: str) -> Path:
            return plan.code / "examples" / f"{model_type}.py"

    return MinitronStage


def _inside_quotes(words: Sequence[str]) -> str:
    """A command for the launcher, which puts it between double quotes after `bash -c`."""
    line = shlex.join(words)
    for character in '\\"$`':
        line = line.replace(character, f"\\{character}")
    return line


def stage_config(name: str, plan: Plan, *, after: str | None = None) -> DictConfig:
    """Configuration of a stage: of the job under `run`, the rest of its script.

    `after` is the job that must have succeeded.
    """
    path = Path(__file__).parents[2] / "examples" / "conf" / f"{SCRIPTS[name]}.yaml"
    if not path.is_file():
        raise LaunchError(f"{path} is missing", remedy="launch from a source tree of nemo_minitron")
    config, folder = plan.config, plan.folder
    job = {
        "name": f"{config.name}_{name}",
        "results_dir": str(folder / name),
        "time_limit": plan.cluster.time,
        "dependency": "singleton" if after is None else f"afterok:{after}",
    }
    sizes = {"devices": plan.cluster.gpus_per_node, "num_nodes": plan.cluster.nodes}
    if name == "prune":
        sizes = {"devices": 1, "num_nodes": 1}  # no model is built
    values = {"score": _score, "prune": _prune, "distill": _distill}[name](config, folder)
    merged = OmegaConf.merge(OmegaConf.load(path), {"run": job, "trainer": sizes}, values)
    if not isinstance(merged, DictConfig):
        raise LaunchError(f"{path} is not a mapping")
    return merged


def _score(config: RunConfig, folder: Path) -> dict[str, Any]:
    score = config.score
    ranks = (config.cluster or ClusterConfig()).gpus // config.parallel.model_parallel_size
    model = {
        "restore_from_path": str(folder / "stages/import/teacher"),
        "encoder_seq_length": score.sequence_length,
        "micro_batch_size": score.micro_batch_size,
        "global_batch_size": score.micro_batch_size * ranks,
    }
    scoring = {"path": str(_scores(folder)), "samples": score.samples, "ffn_site": score.ffn_site.value}
    return {"model": model | _shared(config, folder), "scoring": scoring}


def _prune(config: RunConfig, folder: Path) -> dict[str, Any]:
    target = config.target.model_dump(mode="json", exclude_none=True)
    pruning = {"folder": str(folder / "prune"), "scores": str(_scores(folder)), "formats": ["nemo"], "target": target}
    return {
        "model": {"restore_from_path": str(folder / "stages/import/teacher"), "data": str(folder / "stages/data")},
        "pruning": pruning,
    }


def _distill(config: RunConfig, folder: Path) -> dict[str, Any]:
    settings = config.distill
    model = {
        "student": str(folder / "prune/student.nemo"),
        "seed": config.seed,
        "encoder_seq_length": settings.batch.sequence_length,
        "micro_batch_size": settings.batch.micro_batch_size,
        "global_batch_size": settings.batch.global_batch_size,
        "validation_samples": settings.validation_samples,
        "optim": nemo_settings.optimizer_keys(settings.optimizer),
        "minitron": {
            "guard": settings.guard.model_dump(mode="json"),
            "distillation": settings.with_teacher(folder / "stages/import/teacher").model_dump(mode="json"),
        },
    }
    trainer = {"max_steps": settings.steps, "val_check_interval": settings.validation_interval}
    logs = {"name": config.name, "explicit_log_dir": str(folder / "distill/results"), "resume_if_exists": True}
    shared = _shared(config, folder)
    shared["minitron"] = model["minitron"] | shared["minitron"]
    return {"model": model | shared, "trainer": trainer, "exp_manager": logs, "name": config.name}


def _shared(config: RunConfig, folder: Path) -> dict[str, Any]:
    auto = config.precision is Precision.AUTO
    return {
        **nemo_settings.parallel_keys(config.parallel),
        "data": str(folder / "stages/data"),
        # The launcher is for clusters, and on their GPUs `auto` is bf16.
        "precision": nemo_settings.precision_key(Precision.BF16 if auto else config.precision),
    }


def _scores(folder: Path) -> Path:
    return folder / "score/scores.safetensors"


def _left_out(config: RunConfig) -> list[str]:
    """What a recipe can ask for and the three scripts do not do."""
    asked = {
        "rounds": config.rounds > 1,
        "correct": config.correct is not None,
        "cache": config.cache is not None,
        "tune": config.tune is not None,
        "score.depth.metrics": bool(config.score.depth.metrics),
        "score.first_sample": config.score.first_sample > 0,
        "score.sublayers": config.score.sublayers,
        "target.merge_layers": config.target.merge_layers,
        "distill.minutes": config.distill.minutes is not None,
        "distill.patience": config.distill.patience > 0,
        "distill.finish_with": config.distill.finish_with is not FinishWith.LAST,
        **dict.fromkeys((f"target.{name}" for name in config.target.budgets), True),
    }
    return [f"{key}: not through this launcher; use `nemo-minitron submit`" for key, is_so in asked.items() if is_so]
