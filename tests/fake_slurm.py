"""`sbatch`, `srun` and `scontrol` for one machine, as far as a batch file of ours uses them.

`FAKE_SLURM_LOG` takes a line for each call; the first job step gets SIGUSR1 once the file that
`FAKE_SLURM_WARN_AFTER` names (`PATH:LINES`) has so many lines.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


def install(folder: Path) -> None:
    """Put the three commands into a folder, to be made the first of PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("sbatch", "srun", "scontrol"):
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__)}" {name} "$@"\n')
        command.chmod(0o755)


def sbatch(arguments: list[str]) -> int:
    """Run the job at once; queue it again as long as it asks for that."""
    options = _options(Path(arguments[-1]).read_text())
    assert "requeue" in options
    tasks = int(options["nodes"]) * int(options["ntasks-per-node"])
    log = Path(os.environ["FAKE_SLURM_LOG"])
    print("Submitted batch job 77", flush=True)
    for restart in range(5):
        environment = os.environ | {
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NAME": options["job-name"],
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_NTASKS": str(tasks),
            "SLURM_RESTART_COUNT": str(restart),
        }
        output = Path(options["output"].replace("%j", "77"))
        with output.open("a") as file:
            script = ["bash", arguments[-1]]
            status = subprocess.run(script, env=environment, stdout=file, stderr=file, check=False).returncode
        if not _requeued(log, restart):
            return status
    return 1


def srun(arguments: list[str]) -> int:
    """One process a task; returns the highest status, as Slurm does."""
    command = next(index for index, word in enumerate(arguments) if not word.startswith("-"))
    _note(f"srun {' '.join(arguments[:command])}")
    tasks = int(os.environ["SLURM_NTASKS"])
    shared = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost"}
    processes = [
        subprocess.Popen(
            arguments[command:], env=os.environ | shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        )
        for rank in range(tasks)
    ]
    path, _, lines = os.environ.get("FAKE_SLURM_WARN_AFTER", "").rpartition(":")
    if path and os.environ["SLURM_RESTART_COUNT"] == "0":
        while len(Path(path).read_text().splitlines() if Path(path).exists() else []) < int(lines):
            assert processes[0].poll() is None
            time.sleep(0.02)
        for process in processes:
            process.send_signal(signal.SIGUSR1)
    return max(status if status >= 0 else 128 - status for status in (process.wait() for process in processes))


def scontrol(arguments: list[str]) -> int:
    """Host names, and the wish to be queued again."""
    if arguments[:2] == ["show", "hostnames"]:
        print(arguments[2])
    else:
        _note(f"scontrol {' '.join(arguments)}")
    return 0


def _options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def _requeued(log: Path, restart: int) -> bool:
    return log.read_text().splitlines().count("scontrol requeue 77") == restart + 1


def _note(line: str) -> None:
    with Path(os.environ["FAKE_SLURM_LOG"]).open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    assert shutil.which("bash")
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
