"""Run the study: which notebook needs what, and `run_all.sh` over it (`python -m unmask.workflow --help`).

Snakemake decides what to run; this module declares the chapters, writes them out for one run as a plan that the
Snakefile reads, and shows how far the run is.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from unmask import slurm
from unmask.catalogue import maker
from unmask.cli_help import Parser
from unmask.machine import DiskError, writing
from unmask.plan import Chapter, WorkflowError, make_plan, out_of_date
from unmask.profile import ROOT, Profile, ProfileError, load_profile, parse_changes, write_atomic
from unmask.progress import MARK, clock

_POLL = 0.1  # seconds

CHAPTERS = (
    Chapter("00_data", keys=("data", "world", "seed")),
    Chapter("01_preprocessing", needs=("00_data",), keys=("preprocess",)),
    Chapter("02_camera_clustering", needs=("01_preprocessing",), keys=("cameras", "seed")),
    Chapter(
        "03_unsupervised", needs=("02_camera_clustering",), keys=("unsupervised", "evaluate", "seed", "seeds"), gpu=True
    ),
    Chapter("04_sbi", needs=("01_preprocessing",), keys=("sbi",)),
    Chapter("05_convnext", needs=("01_preprocessing",), keys=("sbi", "convnext", "train", "seed", "seeds"), gpu=True),
    Chapter(
        "06_temporal",
        needs=("05_convnext",),
        keys=("sbi", "convnext", "train", "temporal", "evaluate", "preprocess", "seed", "seeds"),
        gpu=True,
    ),
    Chapter(
        "07_clip_prompts",
        needs=("01_preprocessing",),
        keys=("clip", "preprocess", "evaluate", "seed", "seeds"),
        gpu=True,
    ),
    Chapter(
        "08_clip_d2st",
        needs=("07_clip_prompts",),
        keys=("sbi", "clip", "d2st", "preprocess", "evaluate", "seed", "seeds"),
        gpu=True,
    ),
    Chapter(
        "09_cross_dataset",
        needs=("03_unsupervised", "06_temporal", "07_clip_prompts", "08_clip_d2st"),
        keys=("evaluate", "robustness", "preprocess", "seed", "seeds"),
        gpu=True,
    ),
    Chapter(
        "10_ablation",
        needs=("03_unsupervised", "06_temporal", "07_clip_prompts", "08_clip_d2st"),
        keys=("sbi", "convnext", "train", "temporal", "ablation", "evaluate", "seed", "seeds"),
        gpu=True,
    ),
    Chapter("11_authenticate", needs=("09_cross_dataset",), keys=("preprocess", "evaluate"), gpu=True),
)


def select(chapters: Sequence[Chapter], number: str) -> Chapter:
    """The chapter with this number or stem; WorkflowError naming those there are."""
    for chapter in chapters:
        if number in (chapter.number, chapter.stem) or number.zfill(2) == chapter.number:
            return chapter
    raise WorkflowError(f"No chapter {number}; there are {', '.join(chapter.stem for chapter in chapters)}.")


def study_profile(options: argparse.Namespace, root: Path) -> Profile:
    """The profile of this run after --data and --set, with the run's name."""
    changes = parse_changes(options.set, root)
    if options.data is None:
        return load_profile(options.profile, changes, root)
    media = Path(options.data).resolve()
    if not media.exists():
        raise WorkflowError(f"--data {options.data}: there is no such folder or manifest.")
    changes["data.sets"] = [f"{'folder' if media.is_dir() else 'manifest'}={media}"]
    changes.setdefault("preprocess.locator", "yunet")
    profile = load_profile(options.profile, changes, root)
    slug = re.sub(r"[^a-z0-9]+", "-", media.stem.lower()).strip("-") or "data"
    profile.run = f"{profile.name}-{slug}-{hashlib.sha256(str(media).encode()).hexdigest()[:6]}"
    return profile


def write_run_files(profile: Profile, plan: dict[str, Any], root: Path) -> None:
    """Leave the run's resolved profile and plan in its work folder, untouched where nothing changed."""
    resolved = yaml.safe_dump({"name": profile.name, "run": profile.run, **profile.as_dict()}, sort_keys=False)
    for name, content in (("profile.yaml", resolved), ("plan.json", json.dumps(plan, indent=1) + "\n")):
        path = root / plan["work"] / name
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            write_atomic(path, content)


@contextmanager
def exclusive(root: Path) -> Iterator[int]:
    """Hold the repository's run lock (yields its descriptor); WorkflowError if another run has it.

    The kernel drops the lock when its holders end, however they end, so it never has to be cleared by hand.
    """
    path = root / "data" / "work" / ".lock"
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a+b", buffering=0)
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holders = [word for word in file.read().decode().split() if Path("/proc", word).exists()] or ["unknown"]
            raise WorkflowError(
                f"Another run is busy in this clone (process {holders[0]}); wait until it ends."
            ) from None
        with writing(path.parent):
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
        yield file.fileno()


def _written(log: Path, process: subprocess.Popen) -> Iterator[str]:
    """The lines that a process writes into a file, as they come, until it has ended."""
    with open(log, "rb") as file:
        rest, ended = b"", False
        while not ended:
            ended = process.poll() is not None  # asked first: what it wrote before it ended is read below
            *lines, rest = (rest + file.read()).split(b"\n")
            yield from (f"{line.decode(errors='replace')}\n" for line in lines)
            if not (lines or ended):
                time.sleep(_POLL)
        yield rest.decode(errors="replace")


class Progress:
    """Turns the output of a Snakemake run into lines for a person.

    Chapters tell of themselves (MARK); of those that run as jobs on a cluster, Snakemake tells.
    """

    def __init__(self):
        self.planned: set[str] = set()
        self.started: list[str] = []
        self.done: list[str] = []
        self.told_failure = False
        self.tail: list[str] = []
        self.jobs: dict[str, Path] = {}

    def follow(self, lines: Iterator[str]) -> None:
        for line in lines:
            if line.startswith(MARK):
                self._tell(line.removeprefix(MARK).rstrip())
            elif planned := re.match(r"chapter_(\S+)\s+1$", line):
                self.planned.add(planned[1])
            elif submitted := re.search(r"SLURM jobid (\d+) \(log: (.*/rule_chapter_([^/]+)/.*)\)", line):
                job, log, chapter = submitted.groups()
                self.jobs[chapter] = Path(log)
                self._tell(f"{chapter}: job {job}")
            elif self.jobs and (ended := re.match(r"Finished jobid: \d+ \(Rule: chapter_(\S+)\)", line)):
                self._tell(f"{ended[1]}: done")
            elif self.jobs and (failed := re.match(r"Error in rule chapter_([^:\s]+)", line)):
                self._tell_job_failure(failed[1])
            elif line.strip():
                self.tail = [*self.tail[-14:], line.rstrip()]

    def _tell(self, line: str) -> None:
        chapter, _, what = line.partition(": ")
        if what == "started" or what.startswith("job "):
            self.started.append(chapter)
            left = len(self.planned) - len(self.started)
            what += f" ({left} more after it)" if left > 0 else " (the last one)"
        elif what.startswith("done"):
            self.done.append(chapter)
        elif what.startswith("failed"):
            self.told_failure = True
        if chapter in self.planned:
            position = self.started.index(chapter) + 1 if chapter in self.started else "-"
            line = f"[{position}/{len(self.planned)}] {chapter}: {what}"
        print(line, flush=True)

    def _tell_job_failure(self, chapter: str) -> None:
        # What the chapter said last, as a local one would have said it here; none if it never started.
        log = self.jobs[chapter]
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        said = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
        start = max((i for i, line in enumerate(said) if line.startswith(f"{chapter}: ")), default=len(said))
        for line in said[start:] or [f"{chapter}: failed"]:
            self._tell(line)
        print(f"  job's output: {log}", flush=True)


def snakemake_command(
    plan_file: Path, root: Path, options: argparse.Namespace, forced: list[str], targets: list[str]
) -> list[str]:
    """The Snakemake call of a run; `forced` are rule names, no `targets` means the whole study."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(root / "Snakefile"), "--directory", str(root)]
    command += ["--rerun-incomplete", "--nocolor", "--config", f"plan={plan_file}"]
    if options.slurm:
        command += [f"gres={slurm.gres()}", *slurm.options(root, options.jobs)]
    else:
        command += ["--cores", str(options.jobs or 1)]
    if forced:
        command += ["--forcerun", *forced]
    return [*command, "--", *targets] if targets else command


def job_environment(options: argparse.Namespace) -> dict[str, str]:
    """The environment of the jobs: this interpreter as python3, and the cores shared out among them."""
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    if not options.slurm:  # there each has the cores that it asked for (`unmask.jobstep`)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // (options.jobs or 1))))
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_study(
    plan: dict[str, Any], root: Path, options: argparse.Namespace, forced: list[str], targets: list[str]
) -> int:
    """Run what has to be run, showing progress; returns the exit code."""
    start = time.monotonic()
    progress, log = Progress(), root / plan["work"] / "logs" / "snakemake.log"
    command = snakemake_command(root / plan["work"] / "plan.json", root, options, forced, targets)
    environment = job_environment(options)
    _clear_stale_lock(command, root)
    # Into a file rather than a pipe, which would break, and with it the run, should this process be killed alone.
    with writing(log.parent):
        log.parent.mkdir(parents=True, exist_ok=True)
        output = open(log, "wb")
    with (
        output,
        subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[options.lock],  # the lock lasts as long as Snakemake
        ) as process,
    ):
        os.write(options.lock, f"{process.pid}\n".encode())
        progress.follow(_written(log, process))
    log = log.relative_to(root)
    if process.returncode != 0:
        if not progress.told_failure:
            print("\n".join(progress.tail))
        print(f"Stopped after {len(progress.done)} of {len(progress.planned)} notebooks. All output: {log}")
        print("The same command goes on from here once the cause is mended.")
        return 1
    if targets:
        subprocess.run([sys.executable, "-m", "unmask.report", f"{plan['work']}/profile.yaml"], cwd=root, check=True)
    if not progress.done:
        print(f"Nothing to run: every notebook is up to date. Report: {plan['report']}")
    else:
        print(f"Done in {clock(time.monotonic() - start)}: {len(progress.done)} notebooks. Report: {plan['report']}")
    return 0


def _clear_stale_lock(command: list[str], root: Path) -> None:
    # A killed Snakemake leaves its lock behind. We hold the run lock, so nobody else can be using it.
    locks = root / ".snakemake" / "locks"
    if locks.is_dir() and any(locks.iterdir()):
        subprocess.run([*command[:3], "--unlock", *command[3:]], cwd=root, check=True, capture_output=True)


def dry_run(
    plan: dict[str, Any], root: Path, options: argparse.Namespace, forced: list[str], targets: list[str]
) -> int:
    """Print which notebooks would run and why; leaves the run's files alone."""
    with tempfile.TemporaryDirectory() as folder:
        plan_file = write_atomic(Path(folder) / "plan.json", json.dumps(plan))
        options.slurm = False  # what would run is the same, and the cluster need not be asked
        command = snakemake_command(plan_file, root, options, forced, targets)
        command.insert(3, "--dry-run")
        result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if result.returncode != 0:
        print(output[-2000:])
        return 1
    reasons = dict(re.findall(r"^(?:local)?rule chapter_(\S+):\n(?:    .*\n)*?    reason: (.*)$", output, flags=re.M))
    for stem, reason in reasons.items():
        print(f"would run {stem}: {reason}")
    if not reasons:
        print("Nothing to run: every notebook is up to date.")
    return 0


def list_chapters(plan: dict[str, Any], root: Path) -> int:
    """Print every chapter with its state and what it needs."""
    for step in plan["chapters"]:
        state = "to run" if out_of_date(step, plan, root) else "done"
        needs = ", ".join(Path(need).stem for need in step["needs"])
        print(f"{step['stem']:<24}{state:<8}{'needs ' + needs if needs else ''}".rstrip())
    return 0


def choose(plan: dict[str, Any], chapters: Sequence[Chapter], options: argparse.Namespace, root: Path):
    """The rules to force and the files to ask for, from --only, --from and what is out of date."""
    wanted = [maker(only, plan, root) if ":" in only else select(chapters, only).stem for only in options.only]
    forced = set(wanted)
    if options.start:
        first = options.start if options.start.isdecimal() else select(chapters, options.start).number
        forced |= {chapter.stem for chapter in chapters if chapter.number >= first.zfill(2)}
        if not forced:
            raise WorkflowError(f"No chapter from {options.start} on; the last is {chapters[-1].stem}.")
    needed = _with_needs(wanted, chapters) if wanted else {chapter.stem for chapter in chapters}
    forced |= {step["stem"] for step in plan["chapters"] if out_of_date(step, plan, root)}
    targets = [step["results"] for step in plan["chapters"] if step["stem"] in wanted]
    return [chapter.rule for chapter in chapters if chapter.stem in forced & needed], targets


def _with_needs(stems: Sequence[str], chapters: Sequence[Chapter]) -> set[str]:
    by_stem = {chapter.stem: chapter for chapter in chapters}
    needed: set[str] = set()
    todo = list(stems)
    while todo:
        stem = todo.pop()
        needed.add(stem)
        todo += by_stem[stem].needs
    return needed


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of run_all.sh."""
    parser = Parser(
        prog="run_all.sh",
        description="Run the study: every notebook that is not up to date, then the report\n(figures/report.html).",
    )
    parser.add_argument("--profile", default="demo", help="demo (default), tiny, paper, or a file of your own")
    parser.add_argument("--data", metavar="FOLDER|MANIFEST", help="your own media instead of the profile's data sets")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the profile")
    only = "run this chapter, or the one that makes figure:NAME or table:NAME, and what it lacks"
    parser.add_argument("--only", action="append", default=[], metavar="NN", help=only)
    parser.add_argument("--from", dest="start", metavar="NN", help="run all chapters from this number on again")
    parser.add_argument("--list", action="store_true", help="list the chapters and their state")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and why")
    parser.add_argument("--jobs", type=int, metavar="N", help="notebooks at a time (default 1; --slurm: 12)")
    parser.add_argument("--slurm", action="store_true", help="each notebook as a job of a SLURM cluster (docs/hpc.md)")
    options = parser.parse_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        parser.error("--jobs must be at least 1")
    if options.only and options.start:
        parser.error("--only and --from exclude each other")
    return options


def main(arguments: Sequence[str] | None = None, root: Path = ROOT, chapters: Sequence[Chapter] = CHAPTERS) -> int:
    """Command line of run_all.sh. Exit code 0 done, 1 a notebook failed, 2 wrong options or another run is busy."""
    options = parse_options(arguments)
    try:
        profile = study_profile(options, root)
        plan = make_plan(profile, chapters, root)
        if options.list:
            return list_chapters(plan, root)
        forced, targets = choose(plan, chapters, options, root)
        if options.dry_run:
            return dry_run(plan, root, options, forced, targets)
        with exclusive(root) as options.lock:
            write_run_files(profile, plan, root)
            return run_study(plan, root, options, forced, targets)
    except (ProfileError, WorkflowError, DiskError) as error:
        print(f"run_all.sh: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
