"""A tiny study that is killed again and again, beside one that nobody disturbs; see hardening.py."""

import collections
import csv
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from sections import processor

from unmask.profile import ROOT

HEADING = "## Kills"
KILLS = 20
RUN = "tiny"
PATIENCE = 15  # seconds that a killed study's other processes have to end
BUSY = 2  # the exit code of a run that another keeps from starting
HANGS = 600  # seconds, beyond thrice the whole study's, after which a run counts as hanging
# Columns that hold measured times, and so differ between any two runs. tests/hpc/compare.py leaves out the same.
TIMES = {"extraction, ms", "frames_per_s", "train_s"}
ROLES = {
    "unmask.workflow": "run_all", "snakemake": "Snakemake", "unmask.headless": "a notebook's runner",
    "ipykernel": "a kernel", "unmask.data.decoding": "a decoder", "popen_loky": "a worker", "spawn_main": "a worker",
}  # fmt: skip
LEFTOVER = re.compile(
    r"^\..+\.[a-z0-9_]{8}$|\.part(\.\w+)?$|\.tmp$"
)  # what a kill leaves of a file that was being written


def clone(folder: Path) -> Path:
    """A clone of the last commit, with the weights that this checkout has."""
    if not folder.exists():
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    return folder


def start(root: Path, only: list[str]) -> subprocess.Popen:
    """The study of a clone, in a process group of its own, its output in run.log."""
    environment = os.environ | {"PYTHONPATH": str(root.absolute() / "lib"), "VIRTUAL_ENV": sys.prefix}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [str(root.absolute() / "run_all.sh"), "--profile", RUN, *(f"--only={number}" for number in only)]
    with open(root / "run.log", "ab") as log:
        return subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True)


def undisturbed(root: Path, only: list[str]) -> float:
    """Run the study of a clone to its end; the seconds that it took. SystemExit if it fails."""
    started = time.monotonic()
    if start(root, only).wait():
        raise SystemExit(f"The study in {root} failed; see run.log there.")
    return time.monotonic() - started


def role(process: psutil.Process) -> str:
    """What a process of a study is, "" if it is none of its own."""
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return ""
    return next((name for word, name in ROLES.items() if word in line), "")


def kill(root: subprocess.Popen, rng: np.random.Generator) -> tuple[str, list[psutil.Process]]:
    """Kill a running study in a drawn way; what was killed, and, if that was all of it, the processes that it had."""
    tree = [psutil.Process(root.pid), *psutil.Process(root.pid).children(recursive=True)]
    way = rng.choice(["group", "tree", "one", "one"])
    if way == "group":  # the kernels are in sessions of their own
        os.killpg(root.pid, signal.SIGKILL)
        return "the process group", tree[1:]
    roles = collections.defaultdict(list)
    for process in tree:
        roles[role(process)].append(process)
    roles.pop("", None)
    if way == "tree" or not roles:
        for process in tree:
            process.kill()
        return "every process", tree[1:]
    name = rng.choice(sorted(roles))
    roles[name][rng.integers(len(roles[name]))].kill()
    return name, []


def survivors(tree: list[psutil.Process]) -> list[str]:
    """Roles of the processes of a killed study that are still there after PATIENCE seconds."""
    _, alive = psutil.wait_procs(tree, timeout=PATIENCE)
    return [role(process) or "another" for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def disturbed(root: Path, only: list[str], count: int, rng: np.random.Generator, seconds: float):
    """Run the study with `count` kills on the way: how often each kind of process was killed, starts, faults."""
    killed, faults, starts, failed = collections.Counter(), [], 0, 0
    while True:
        run, starts = start(root, only), starts + 1
        try:
            if killed.total() < count:
                # Short enough that the last kill comes before the end, long enough to get beyond the last one.
                code = run.wait(timeout=rng.uniform(3, max(10, 2.5 * seconds / count)))
            else:
                code = run.wait(timeout=HANGS + 3 * seconds)
        except subprocess.TimeoutExpired:
            if killed.total() == count:
                return killed, starts, [*faults, "The study hangs after the last kill."]
            what, tree = kill(run, rng)
            killed[what] += 1
            print(f"kill {killed.total()}: {what}", flush=True)
            try:
                code = run.wait(timeout=HANGS + 3 * seconds)
            except subprocess.TimeoutExpired:
                return killed, starts, [*faults, f"The study hangs after kill {killed.total()} of {what}."]
            faults += [f"{name} outlived kill {killed.total()} of {what}." for name in survivors(tree)]
            failed = 0
        else:
            failed += code not in (0, BUSY)
        if code == 0:
            return killed, starts, faults
        if failed > 2:
            return killed, starts, [*faults, "The study fails again and again; see run.log."]
        time.sleep(1)  # another run may still be busy


def differences(whole: Path, other: Path) -> tuple[int, list[str], list[str]]:
    """Of the tables of two studies: how many there are, the columns of times that differ, and faults."""
    faults, timed = [], []
    tables = sorted((whole / "figures" / RUN / "tables").glob("*.csv"))
    for path in tables:
        twin = other / path.relative_to(whole)
        if not twin.is_file():
            faults.append(f"{path.name} is missing.")
            continue
        if path.read_bytes() == twin.read_bytes():
            continue
        first, second = (list(csv.DictReader(p.open(encoding="utf-8", newline=""))) for p in (path, twin))
        if len(first) != len(second) or first[0].keys() != second[0].keys():
            faults.append(f"{path.name} has other rows or columns.")
            continue
        columns = [c for c in first[0] if [row[c] for row in first] != [row[c] for row in second]]
        timed += [f"{path.stem}.{column}" for column in columns if column in TIMES]
        faults += [f"{path.name}: {column} differs." for column in columns if column not in TIMES]
    return len(tables), timed, faults


def files(root: Path) -> set[Path]:
    """All files of a study's work folder and figures."""
    folders = (root / "data" / "work" / RUN, root / "figures" / RUN)
    return {path.relative_to(root) for folder in folders for path in folder.rglob("*") if path.is_file()}


def kills(work: Path, count: int, seed: int, only: list[str]) -> tuple[str, list[str]]:
    """Run both studies and tell: the section as Markdown, and what went wrong."""
    whole, other = clone(work / "undisturbed"), clone(work / "killed")
    seconds = undisturbed(whole, only)
    killed, starts, faults = disturbed(other, only, count, np.random.default_rng(seed), seconds)
    number, timed, wrong = differences(whole, other)
    before, after = files(whole), files(other)
    faults += wrong + [f"{path} is missing." for path in sorted(before - after)]
    partial = [path for path in after - before if LEFTOVER.search(path.name)]
    further = sorted(map(str, after - before - set(partial)))
    counted = ", ".join(f"{name} {times}" for name, times in killed.most_common())
    chapters = f" --only {' --only '.join(only)}" if only else ""
    about = (
        f"`python benchmarks/hardening.py kills`: `./run_all.sh --profile {RUN}{chapters}`, {seconds:.0f} s "
        f"undisturbed; {killed.total()} times `kill -9` at drawn times, {starts} starts; {os.cpu_count()} cores, "
        f"CPU {processor()}, Python {platform.python_version()}. Killed: {counted}."
    )
    but = f" but for {', '.join(timed)} (times)" if timed else ""
    found = (
        f"All {number} tables are there, equal byte for byte{but}. Of {len(before)} files of the undisturbed study "
        f"{len(before - after)} are missing from the other; there {len(partial)} unfinished files lie about, besides "
        f"{', '.join(further) or 'no others'}."
    )
    return "\n".join([HEADING, "", about, "", found]) + "\n", faults
