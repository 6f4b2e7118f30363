"""What `run_all.sh --slurm` asks of the cluster before Snakemake's SLURM executor submits the chapters."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

from unmask.plan import WorkflowError

PROFILE = Path("profiles/slurm")


def options(root: Path, jobs: int | None) -> list[str]:
    """Options of Snakemake for a run on this cluster. WorkflowError where there is none, or a run still goes on.

    jobs: chapters at a time; None is what the profile says.
    """
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        raise WorkflowError("--slurm needs Snakemake's SLURM executor: pip install -c constraints.txt -e '.[slurm]'")
    if left := _left_over(root):
        raise WorkflowError(
            f"Chapters of an earlier run are still in the queue: jobs {', '.join(left)}. Wait until they end, or "
            f"end them: scancel {' '.join(left)}"
        )
    return ["--profile", str(root / PROFILE), *(["--jobs", str(jobs)] if jobs else [])]


def gres() -> str:
    """What a chapter that computes with networks asks for: a GPU where the cluster has any, otherwise nothing.

    Per chapter and partition the profile's `set-resources` say more.
    """
    return "gpu:1" if "gpu" in _ask("sinfo", "--noheader", "--format=%G") else ""


def _left_over(root: Path) -> list[str]:
    """Jobs of this user and clone that a Snakemake, since killed, submitted: two must not write the same files."""
    lines = (line.split(" ", 2) for line in _ask("squeue", "--me", "--noheader", "--format=%i %k %Z").splitlines())
    return [job for job, comment, folder in lines if comment.startswith("rule_") and Path(folder) == root]


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise WorkflowError(f"--slurm is for a SLURM cluster, and there is no {command[0]} here.") from None
    except subprocess.CalledProcessError as error:
        raise WorkflowError(f"SLURM does not answer: {error.stderr.strip()}") from None
