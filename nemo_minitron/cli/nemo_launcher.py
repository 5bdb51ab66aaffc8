r"""A recipe through NeMo-Framework-Launcher.

    python -m nemo_minitron.cli.nemo_launcher launcher_scripts_path=/opt/NeMo-Framework-Launcher/launcher_scripts \
        +recipe=my.yaml '+overrides=[distill.tokens=1000000]' 'stages=[score,prune,distill]' base_results_dir=/results

Every key of the launcher's own configuration can be given: `container`, `container_mounts`, `cluster.account`,
`env_vars.NCCL_DEBUG`. NEMO_LAUNCHER_DEBUG=True writes the jobs and submits none.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from nemo_minitron.cli.failures import reported
from nemo_minitron.cli.job import Job
from nemo_minitron.errors import LaunchError
from nemo_minitron.launchers import nemo_launcher

if TYPE_CHECKING:
    from omegaconf import DictConfig

_SCRIPTS = "launcher_scripts_path="


def main() -> None:
    """Compose the launcher's configuration, and submit the stages of the recipe."""
    with _reported():
        import hydra

        given = [Path(word.removeprefix(_SCRIPTS)) for word in sys.argv[1:] if word.startswith(_SCRIPTS)]
        if not given or not (given[-1] / "conf/config.yaml").is_file():
            raise LaunchError(
                f"{given[-1] if given else 'launcher_scripts_path'}: no NeMo-Framework-Launcher",
                rule=f"{_SCRIPTS}FOLDER names its folder launcher_scripts",
            )
        scripts = given[-1].absolute()
        sys.path.append(str(scripts))
        hydra.main(version_base="1.1", config_path=str(scripts / "conf"), config_name="config")(_submit)()


def _submit(cfg: "DictConfig") -> None:
    with _reported():
        job = Job(recipe=cfg.get("recipe", ""), overrides=list(cfg.get("overrides") or []))
        config = job.config()
        path = Path(job.recipe)
        plan = nemo_launcher.Plan(
            recipe=str(path.absolute()) if path.is_file() else job.recipe,
            overrides=job.overrides,
            config=config,
            folder=Path(cfg.base_results_dir) / config.name,
            code=Path(cfg.get("minitron_path") or nemo_launcher.IN_CONTAINER),
        )
        print(*nemo_launcher.submit(cfg, plan), sep="\n")


@contextmanager
def _reported() -> Iterator[None]:
    """`reported`, outside typer and inside hydra: the one end of which hydra makes no traceback."""
    try:
        with reported():
            yield
    except typer.Exit as ended:
        sys.exit(ended.exit_code)


if __name__ == "__main__":
    main()
