"""Run a command as a step of a SLURM job that may be stopped early: `python -m unmask.jobstep COMMAND ...`.

SIGUSR1 says that the job's time runs out. The command does not see the signal, but a file (`stopping`): a training then
stops at its next checkpoint. When it has, or when the grace is over, the job is queued again, and starts from there.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

STOP = "UNMASK_STOP"
"""Environment variable: the file that is there when trainings are to stop."""
STOPPED = "Stopped at a checkpoint, as the job's time runs out; the same command goes on from there."
GRACE = 240.0  # seconds; the scripts and the profile ask for the signal 300 before the end
RESTARTS = 50  # a job that never gets from one checkpoint to the next would be queued for ever


def stopping() -> bool:
    """Whether a training is to stop at its next checkpoint."""
    path = os.environ.get(STOP)
    return path is not None and os.path.exists(path)


def run(command: Sequence[str], grace: float = GRACE) -> int:
    """Run a command and queue the job again after SIGUSR1, unless it ends well by itself; returns its exit code.

    grace: seconds that it has, from the signal on, to stop by itself.
    """
    with tempfile.TemporaryDirectory(prefix="unmask-") as folder:
        stop = Path(folder) / "stop"
        environment = {**os.environ, STOP: str(stop)}
        if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
            environment.setdefault("OMP_NUM_THREADS", cores)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # which all processes of the command inherit
        process = subprocess.Popen(command, env=environment)
        signal.signal(signal.SIGUSR1, lambda *_: stop.touch())
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        _wait(process, stop, grace)
        if stop.exists() and process.returncode != 0:
            _queue_again()
        code = process.wait()  # if it still runs, SLURM ends it with the job
    return code if code >= 0 else 128 - code


def _wait(process: subprocess.Popen, stop: Path, grace: float) -> None:
    """Until the process has ended, or the grace after the file appeared."""
    deadline = None
    while deadline is None or time.monotonic() < deadline:
        if deadline is None and stop.exists():
            deadline = time.monotonic() + grace
        try:
            process.wait(timeout=0.5)
            return
        except subprocess.TimeoutExpired:
            continue


def _queue_again() -> None:
    """Have SLURM requeue this job: by one of its tasks, and not without end."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or os.environ.get("SLURM_PROCID", "0") != "0":
        return
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):  # one job of it has the array's number, which means them all
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True).stdout
    restarts = int(found[1]) if (found := re.search(r"\bRestarts=(\d+)", shown)) else 0
    if restarts >= RESTARTS:
        print(f"Job {job} was queued {restarts} times: it needs a longer time limit.", file=sys.stderr)
        return
    print(f"Job {job} is queued again.", file=sys.stderr, flush=True)
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        print(f"Job {job} cannot be queued again: {done.stderr.strip()}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit code is the command's."""
    parser = argparse.ArgumentParser(prog="python -m unmask.jobstep", description=__doc__.splitlines()[0])
    parser.add_argument("--grace", type=float, default=GRACE, help=f"seconds to stop in (default {GRACE:.0f})")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if not options.command:
        parser.error("name the command to run")
    return run(options.command, options.grace)


if __name__ == "__main__":
    sys.exit(main())
