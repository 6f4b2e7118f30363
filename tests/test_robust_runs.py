"""The machine fails, not the input: full and read-only disks, killed processes, too little memory, two runs at once."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import moving_frames, tiny_profile
from PIL import Image
from test_preprocessing import annotate, manifest, shards
from test_workflow import headless, make_tree, notebook, ran, run, start

from unmask import cli, preprocessing, scoring
from unmask.data import video
from unmask.data.crops import CropWriter, read_index
from unmask.data.journals import Journal
from unmask.data.video import MediaError, encode, read_frames
from unmask.figures import save_figure, save_table
from unmask.machine import DiskError, advice, end_with_parent, writing
from unmask.parallel import side_by_side
from unmask.preprocessing import Item, Result, preprocess
from unmask.profile import ROOT, Study, write_atomic
from unmask.training import train_detector

sys.path.append(str(ROOT / "benchmarks"))
import damaged_inputs  # noqa: E402
import kills  # noqa: E402


class Disk:
    """A small file system of its own at `path`, which can be filled and made read-only."""

    def __init__(self, path: Path):
        self.path, self._ballast = path, path / "ballast"

    def fill(self, left: int = 0) -> None:
        """Leave `left` bytes, a whole number of pages of 4096."""
        self._ballast.unlink(missing_ok=True)
        room = os.statvfs(self.path)
        with open(self._ballast, "wb") as file:
            file.write(bytes(room.f_bavail * room.f_frsize - left))

    def clear(self) -> None:
        self._ballast.unlink()

    def mode(self, mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", self.path], check=True)


@pytest.fixture
def disk(tmp_path):
    (path := tmp_path / "disk").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root alone, where the system lets it")
    yield Disk(path)
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def media(tmp_path, make_clip):
    """A manifest of three annotated clips."""
    folder = tmp_path / "media"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        annotate(make_clip(folder / name, count=8).with_name(f"{name}.npz"), 8)
    return manifest(folder, ["a.mp4", "b.mp4", "c.mp4"])


def full(folder) -> str:
    return f"No space is left in {folder}.*make room.*goes on"


def crops(path: Path, out: Path) -> pd.DataFrame:
    return preprocess(path, out, frames=4, size=96, workers=0)


def test_preprocessing_on_a_full_disk_goes_on_when_there_is_room(disk, media, tmp_path):
    crops(media, tmp_path / "whole")
    size = sum(len(data) for data in shards(tmp_path / "whole").values())
    out = disk.path / "crops"
    for left in (0, 4096, size // 3 // 4096 * 4096):
        disk.fill(left)
        with pytest.raises(DiskError, match=full(disk.path)):
            crops(media, out)
        assert not (out / "items.parquet").exists()
    disk.clear()
    crops(media, out)
    assert shards(out) == shards(tmp_path / "whole")
    assert read_index(out)["sha256"].tolist() == read_index(tmp_path / "whole")["sha256"].tolist()


def test_a_shard_that_hit_the_full_disk_is_free_for_the_next_writer(disk):
    row = {"item_id": "0" * 16, "status": "ok"}
    crop = {"item_id": "0" * 16, "frame": 0, "data": bytes(200_000)}
    with pytest.raises(DiskError), CropWriter(disk.path, 0, 1) as writer:
        writer.resume([("0" * 16, "")])
        disk.fill(8192)
        writer.add(("0" * 16, ""), row, [crop], "png")
    with CropWriter(disk.path, 0, 1) as writer:
        assert writer.resume([("0" * 16, "")]) == 0


def test_rows_of_a_share_that_hit_the_full_disk_are_done_again(disk):
    keys = [(f"{i:016x}",) for i in range(3)]
    with pytest.raises(DiskError, match=full(disk.path)), Journal(disk.path, (0, 1), "x") as journal:
        journal.resume(keys)
        journal.add([(keys[0], {"score": 0.5})])
        disk.fill()
        journal.add([(keys[1], {"score": "0" * 9000})])
    disk.clear()
    with Journal(disk.path, (0, 1), "x") as journal:
        assert journal.resume(keys) == 1


def test_read_only_and_full_disks_are_told_in_one_line(disk, media, capsys):
    command = ["preprocess", str(media), str(disk.path / "crops"), "--locator", "annotations", "--workers", "1"]
    disk.mode("ro")
    assert cli.main(command) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"unmask: {disk.path}/crops is read-only: mount it writable") and told.count("\n") == 1
    disk.mode("rw")
    disk.fill()
    assert cli.main(command) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"unmask: No space is left in {disk.path}/crops") and told.count("\n") == 1
    disk.clear()
    assert cli.main(command) == 0


def test_scores_that_could_not_be_written_are_refused_before_any_work(disk, media, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(scoring, "preprocess", lambda *_, **__: pytest.fail("worked in vain"))
    for prepare, what in ((disk.fill, full(disk.path)), (lambda: disk.mode("ro"), "is read-only")):
        prepare()
        with pytest.raises(DiskError, match=what):
            scoring.score_media([media.parent / "a.mp4"], tiny_checkpoint, disk.path / "scores.csv")
    disk.mode("rw")
    disk.clear()
    assert not list(disk.path.iterdir())


def test_training_on_a_full_disk_goes_on_to_the_same_weights(disk, tiny_world, tiny_crops, tiny_checkpoint):
    task = "convnext", tiny_profile(), tiny_world / "manifest.parquet", tiny_crops, disk.path / "checkpoint"
    disk.fill(65536)
    with pytest.raises(DiskError, match=full(disk.path / "checkpoint")):
        train_detector(*task, seed=0)
    assert not list(task[-1].glob("*.safetensors")) and not (task[-1] / "last.pt").exists()
    disk.clear()
    out = train_detector(*task, seed=0)
    assert (out / "config.json").read_bytes() == (tiny_checkpoint / "config.json").read_bytes()


def test_a_video_is_whole_or_not_there(disk):
    frames = moving_frames(4)
    size = encode(disk.path / "whole.mp4", frames).stat().st_size
    for left in range(0, size, 4096):
        disk.fill(left)
        with pytest.raises(DiskError, match=full(disk.path)):
            encode(disk.path / "clip.mp4", frames)
    assert {path.name for path in disk.path.iterdir()} == {"ballast", "whole.mp4"}


def test_tables_and_figures_stay_as_they_were(disk):
    study = Study(tiny_profile(), disk.path, playing=False)
    study.figures, study.tables = disk.path / "figures", disk.path / "figures/tables"

    def save(numbers) -> None:
        save_table(study, "numbers", pd.DataFrame({"n": numbers}), "Numbers.")
        fig, ax = plt.subplots()
        ax.plot(numbers)
        save_figure(study, "line", fig, "A line.", {"n": numbers})

    save([1, 2])
    before = {path: path.read_bytes() for path in study.figures.rglob("*") if path.is_file()}
    disk.fill()
    with pytest.raises(DiskError, match=full(study.tables)):
        save([1, 3])
    fig, _ = plt.subplots()
    with pytest.raises(DiskError, match=full(study.figures)):
        save_figure(study, "line", fig, "Another.", {})
    assert {path: path.read_bytes() for path in study.figures.rglob("*") if path.is_file()} == before


def test_a_study_on_a_full_or_read_only_disk_says_so_and_goes_on(disk):
    root = make_tree(disk.path / "kit")
    disk.mode("ro")
    code, output = run(root)
    assert code == 2 and f"{root}/data/work is read-only: mount it writable" in output and "Traceback" not in output
    disk.mode("rw")
    disk.fill()
    code, output = run(root)
    assert code == 2 and f"No space is left in {root}/data/work" in output and "Traceback" not in output, output
    # Room to begin with, until a notebook takes it all: the next thing that is written fails.
    take = f"""import os
from pathlib import Path
if Path({str(disk.path)!r}, "ballast").exists():
    room = os.statvfs({str(disk.path)!r})
    Path({str(disk.path)!r}, "taken").write_bytes(bytes(room.f_bavail * room.f_frsize))"""
    code = nbformat.read(root / "notebooks" / "00_first.ipynb", 4)
    code.cells.insert(2, nbformat.v4.new_code_cell(take))
    nbformat.write(code, root / "notebooks" / "00_first.ipynb")
    disk.fill(2**20)
    code, output = run(root, "--only", "00")
    assert code == 1 and "00_first: failed" in output and "No space is left" in output and "goes on" in output, output
    assert not (root / "data/work/demo/results/00_first.json").exists()
    disk.clear()
    (disk.path / "taken").unlink()
    code, output = run(root)
    assert code == 0 and ran(output) == {"00_first", "01_second", "02_other"}


def test_only_refusals_of_the_disk_are_translated(tmp_path):
    for number, word in ((errno.EDQUOT, "quota"), (errno.EACCES, "permissions"), (errno.EROFS, "read-only")):
        with pytest.raises(DiskError, match=word), writing(tmp_path):
            raise OSError(number, "x")
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        (tmp_path / "missing").read_bytes()
    (tmp_path / "file").write_text("x")
    for place, word in (
        ("file/below", "a file is in its way"),
        ("file", "a file is in its way"),
        ("gone", "not there"),
    ):
        with pytest.raises(DiskError, match=f"{tmp_path / place} .*{word}.*name another"), writing(tmp_path / place):
            (tmp_path / place).mkdir() if word != "not there" else (tmp_path / place / "x").write_text("x")
    with pytest.raises(DiskError, match="inner"), writing("outer"), writing("inner"):
        raise OSError(errno.ENOSPC, "x")


@pytest.mark.parametrize("place", ["afile/x", "afile/x/y", "afile"])
@pytest.mark.parametrize("words", [
    "index media --layout folder --out {}", "world {} --profile tiny", "preprocess {manifest} {} --locator haar",
    "score media --checkpoint {checkpoint} --locator haar --out {}",
])  # fmt: skip
def test_an_output_below_a_file_is_refused_in_a_sentence(
    place, words, media, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("afile").write_text("x")
    Path("media/real").mkdir()
    os.link("media/a.mp4", "media/real/a.mp4")
    if "--out" in words:  # a file: it is its folder that cannot be
        place += "/table.csv"
    assert cli.main(words.format(place, manifest=media, checkpoint=tiny_checkpoint).split()) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "cannot be a folder" in told and "Errno" not in told, told
    assert Path("afile").read_text() == "x"


def test_a_journal_that_lost_power_counts_up_to_the_damage(media, tmp_path):
    crops(media, tmp_path / "whole")
    crops(media, tmp_path / "out")
    journal = tmp_path / "out/shards/crops-00000-of-00001.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + bytes(len(lines[1]) - 1) + b"\n" + lines[2])
    crops(media, tmp_path / "out")
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def killer(flag: Path, times: int) -> Callable:
    """Work that kills its own process at item 1, `times` times."""

    def work(item: Item, settings) -> Result:
        if item.media == "1" and len(seen := list(flag.iterdir())) < times:
            (flag / str(len(seen))).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Result({"item_id": item.item_id, "reason": ""}, [])

    return work


@pytest.mark.parametrize(("times", "reason"), [(1, ""), (2, "worker process died (killed or out of memory)")])
def test_a_killed_worker_gets_its_item_again_once(tmp_path, times, reason):
    items = [Item(f"{i:016x}", f"{i}", "") for i in range(4)]
    results = list(preprocessing._run(items, None, 2, killer(tmp_path, times)))
    assert [r.row["reason"] for r in results] == ["", reason, "", ""] and len(list(tmp_path.iterdir())) == times


def test_a_worker_killed_while_idle_costs_nothing():
    before = set(psutil.Process().children())
    results = preprocessing._run([Item(f"{i:016x}", f"{i}", "") for i in range(3)], None, 1, killer(Path("/"), 0))
    assert next(results).row["reason"] == ""
    for worker in set(psutil.Process().children()) - before:
        if "popen_loky" in " ".join(worker.cmdline()):
            worker.kill()
    time.sleep(0.3)
    assert [result.row["reason"] for result in results] == ["", ""]


@pytest.mark.parametrize("times", [1, 2, 9])
def test_a_killed_decoder_is_asked_again(tmp_path, make_clip, monkeypatch, times):
    clip = make_clip(tmp_path / "a.mp4")
    before, real, killed = read_frames(clip, 4), video._Decoder._exchange, []

    def exchange(process, request):
        if len(killed) < times:
            killed.append(request["decoders"])
            process.kill()
        return real(process, request)

    monkeypatch.setattr(video._Decoder, "_exchange", staticmethod(exchange))
    if times == 9:
        with pytest.raises(MediaError, match=r"decoder crashed \(SIGKILL\)"):
            read_frames(clip, 4)
        assert len(killed) == 4
        return
    after = read_frames(clip, 4)
    assert after.decoder == {1: before.decoder, 2: "pyav"}[times]
    assert after.indices.tolist() == before.indices.tolist()
    assert np.abs(after.frames.astype(int) - before.frames).max() <= (0 if times == 1 else 8)


def test_a_named_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "clip.mp4")
    begin = time.monotonic()
    with pytest.raises(MediaError, match="a pipe or device"):
        read_frames(tmp_path / "clip.mp4", 1)
    assert time.monotonic() - begin < 5


def test_a_decoder_without_memory_fails_the_picture_alone(tmp_path):
    Image.new("RGB", (12_000, 12_000)).save(tmp_path / "large.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    read_frames(tmp_path / "small.png", 1)
    child = video._child()._process.pid
    limit = psutil.Process(child).memory_info().vms + 100 * 2**20
    resource.prlimit(child, resource.RLIMIT_AS, (limit, limit))
    with pytest.raises(MediaError, match="too large for the memory"):
        read_frames(tmp_path / "large.png", 1)
    assert read_frames(tmp_path / "small.png", 1).width == 64
    video._child().close()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "The memory was not enough"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "The memory was not enough"),
        (BrokenProcessPool("x"), "A worker process was killed"),
        (DiskError("No space."), "No space."),
    ],
)
def test_the_command_line_tells_in_one_line(error, told, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("unmask.commands.options.load_profile", fail)
    assert cli.main(["evaluate", "scores", "manifest", "--out", "table.csv"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"unmask: {told}") and shown.count("\n") == 1
    assert advice("ValueError", "of something else") == ""


def watched(_) -> bool:
    return end_with_parent.__name__ in [thread.name for thread in threading.enumerate()]


def test_workers_end_with_the_process_that_they_work_for(tmp_path):
    code = ("import multiprocessing, sys, time\n"
            "from concurrent.futures import ProcessPoolExecutor\n"
            "from unmask.machine import end_with_parent\n"
            "if __name__ == '__main__':\n"
            "    context = multiprocessing.get_context('spawn')\n"
            "    pool = ProcessPoolExecutor(2, context, end_with_parent)\n"
            "    tasks = [pool.submit(time.sleep, 600) for _ in range(2)]\n"
            "    [print(pid, flush=True) for pid in pool._processes]\n"
            "    tasks[0].result()\n")  # fmt: skip
    (tmp_path / "parent.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, env=environment)
    workers = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
    time.sleep(1)
    assert all(worker.is_running() for worker in workers)
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(workers, timeout=20)[1]
    assert side_by_side(watched, [(0,)], 1, "test") == [True]


def test_a_killed_kernel_and_full_memory_are_told_apart(tmp_path):
    kill = f"""from pathlib import Path
import os, signal
if not Path({str(tmp_path / "flag")!r}).exists():
    Path({str(tmp_path / "flag")!r}).touch()
    os.kill(os.getpid(), signal.SIGKILL)"""
    nbformat.write(notebook(kill, "raise MemoryError"), tmp_path / "00_once.ipynb")
    result = headless(tmp_path / "00_once.ipynb", tmp_path / "work")
    assert result.returncode == 1 and "kernel died" in result.stdout and "The same command" in result.stdout
    result = headless(tmp_path / "00_once.ipynb", tmp_path / "work")
    assert result.returncode == 1 and "The memory was not enough" in result.stdout, "cell 1 succeeds the second time"


def test_two_trees_run_side_by_side_and_a_killed_runs_lock_is_no_hindrance(tmp_path):
    trees = [make_tree(tmp_path / name) for name in ("one", "two")]
    stale = trees[1] / ".snakemake/locks/0.output.lock"  # as a killed Snakemake leaves it
    stale.parent.mkdir(parents=True)
    stale.write_text("data/work/demo/results/02_other.json\n")
    processes = [start(tree, "--only", "02") for tree in trees]  # at the same time
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [ran(output) for output in outputs] == [{"02_other"}, {"02_other"}]


def test_damaged_inputs_each_have_a_row_and_leave_the_others_alone(tmp_path, monkeypatch):
    """Two of every kind; benchmarks/hardening.py takes a thousand."""
    monkeypatch.setattr(damaged_inputs, "command", lambda *given: cli.main(list(given)))
    count = 2 * len(damaged_inputs.DAMAGES)
    section, faults = damaged_inputs.inputs(tmp_path, count, 1, None)
    assert not faults and f"{count} damaged files" in section


TIMED = ["frames_per_s", "train_s", "extraction, ms"]


def test_only_times_may_differ_between_tables_of_two_studies(tmp_path):
    for name, seconds, auc, rate in (("a", 1, 0.5, 0.1), ("b", 2, 0.5, 0.1), ("c", 1, 0.6, 0.1), ("e", 2, 0.5, 0.2)):
        table = pd.DataFrame({"auc": [auc], "false_alarm_rate": [rate], **dict.fromkeys(TIMED, [seconds])})
        write_atomic(tmp_path / name / "figures/tiny/tables/cost.csv", table.to_csv(index=False))
        write_atomic(tmp_path / name / "figures/tiny/tables/same.csv", "auc\n0.5\n")
    assert kills.differences(tmp_path / "a", tmp_path / "b") == (2, [f"cost.{name}" for name in TIMED], [])
    assert kills.differences(tmp_path / "a", tmp_path / "c") == (2, [], ["cost.csv: auc differs."])
    assert kills.differences(tmp_path / "a", tmp_path / "d")[2] == ["cost.csv is missing.", "same.csv is missing."]
    assert kills.differences(tmp_path / "a", tmp_path / "e")[2] == ["cost.csv: false_alarm_rate differs."]
    compare = [sys.executable, str(ROOT / "tests/hpc/compare.py"), str(tmp_path / "a")]
    told = {name: subprocess.run([*compare, str(tmp_path / name)], capture_output=True).returncode for name in "bce"}
    assert told == {"b": 0, "c": 1, "e": 1}
    names = [".rows.json.ab12_x9z", ".clip.77.part.mp4", "x.tar.part"]
    assert all(kills.LEFTOVER.search(name) for name in names) and not kills.LEFTOVER.search("last.pt")
