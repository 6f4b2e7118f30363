"""What one medium costs: seconds, bytes and files of preprocessing, fingerprints and scores, and their memory.

    python benchmarks/per_item.py [MEDIA] [--limit 24] [--out benchmarks/RESULTS.md]

MEDIA is a folder with real/ and fake/ (faces are found by YuNet); without it, the clips of a small synthetic world
(their landmarks are known, but for scores, where YuNet looks). Every step runs once in a process of its own with the
settings of profile demo; seconds of the processor are those of it and of its decoder, less what loading the libraries
takes.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import pandas as pd  # noqa: E402
from sections import processor, write_section  # noqa: E402

from unmask.camera_clustering import fingerprint_files, settings_of  # noqa: E402
from unmask.data.datasets import index  # noqa: E402
from unmask.data.manifest import media_path, read_manifest, write_manifest  # noqa: E402
from unmask.data.world import generate  # noqa: E402
from unmask.detectors import base  # noqa: E402
from unmask.preprocessing import preprocess  # noqa: E402
from unmask.profile import load_profile  # noqa: E402
from unmask.scoring import score_media  # noqa: E402

HEADING = "## Per medium"
PROFILE = load_profile("demo")


def prepare(folder: Path, media: Path | None, limit: int) -> str:
    """Write manifest.parquet and a checkpoint of random weights into the folder; returns the locator."""
    if media:
        df = index(media, "folder")[0]
    else:
        df = generate(folder, dict(PROFILE.world) | {"pairs_train": 2, "pairs_val": 0, "pairs_test": 0, "pairs_b": 0})
    df = df[df["kind"] == "video"]
    write_manifest(df.sort_values("item_id").head(limit), folder / "manifest.parquet")
    detector = base.build("convnext", backbone=PROFILE.convnext.backbone, size=PROFILE.convnext.size, pretrained=False)
    made = {key: PROFILE.preprocess[key] for key in ("frames", "size", "margin", "align", "encoding")}
    base.save_checkpoint(detector, folder / "checkpoint", preprocessing=made, seed=0)
    return "yunet" if media else "annotations"


def crops(folder: Path, locator: str) -> None:
    """`unmask preprocess`."""
    settings = dict(PROFILE.preprocess) | {"locator": locator}
    preprocess(folder / "manifest.parquet", folder / "crops", workers=0, **settings)


def fingerprints(folder: Path, locator: str) -> None:
    """`unmask fingerprints`."""
    target, settings = folder / "manifest.parquet", settings_of(PROFILE)
    fingerprint_files(target, folder / "fingerprints", settings, folder / "crops", workers=1)


def scores(folder: Path, locator: str) -> None:
    """`unmask score`."""
    listed = read_manifest(folder / "manifest.parquet").to_dict("records")
    paths = [media_path(row, folder / "manifest.parquet") for row in listed]
    score_media(paths, folder / "checkpoint", folder / "scores/scores.csv", "yunet", workers=0)


STEPS = {"crops": crops, "fingerprints": fingerprints, "scores": scores}


def measured(step: str, folder: Path, locator: str) -> dict:
    """Wall and processor seconds of a step in its own process, its highest memory, and what it left."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder), "--locator", locator]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    peak, loading, wall = (float(number) for number in told[-3:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    left = [path.stat().st_size for path in (folder / step).rglob("*") if path.is_file()]
    spent = {"wall": wall, "busy": busy - loading, "loading": loading, "peak": peak / 1024}
    return {"step": step} | spent | {"bytes": sum(left), "files": len(left)}


def section(table: pd.DataFrame, count: int, what: str, volume: int) -> str:
    """The section as Markdown, per medium."""
    table = table.set_index("step")
    lines = [
        f"{HEADING}: {what}", "",
        f"One process, one thread, {os.cpu_count()} cores, CPU {processor()}; Python {platform.python_version()}; load "
        f"average at the end {os.getloadavg()[0]:.1f} (with more than {os.cpu_count()} the cores were shared, and only "
        f"processor time counts). `python benchmarks/per_item.py`: {count} videos of {volume / count / 2**20:.2f} MiB "
        f"in the mean, {PROFILE.preprocess.frames} frames for crops of {PROFILE.preprocess.size} pixels "
        f"({PROFILE.preprocess.encoding}) and for scores by {PROFILE.convnext.backbone}, {PROFILE.cameras.frames} "
        f"frames of at most {PROFILE.cameras.crop} pixels for fingerprints. Loading the libraries takes "
        f"{table['loading'].median():.1f} s of the processor more, once a job.",
        "", "| step | processor seconds | wall seconds | KiB left | peak (MiB) |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in table.itertuples():
        seconds = f"{row.busy / count:.2f} | {row.wall / count:.2f}"
        lines.append(f"| {row.Index} | {seconds} | {row.bytes / count / 1024:.0f} | {row.peak:.0f} |")
    lines += ["", f"Files left: {', '.join(f'{n} {k}' for k, n in table['files'].items())}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("media", type=Path, nargs="?")
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--out", type=Path, help="Markdown file whose section is replaced")
    for hidden in ("--step", "--folder", "--locator"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        loading, start = time.process_time(), time.perf_counter()
        STEPS[arguments.step](Path(arguments.folder), arguments.locator)
        wall = time.perf_counter() - start
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, loading, wall)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        locator = prepare(folder, arguments.media, arguments.limit)
        listed = read_manifest(folder / "manifest.parquet")
        volume = sum(media_path(row, folder / "manifest.parquet").stat().st_size for row in listed.to_dict("records"))
        table = pd.DataFrame([measured(step, folder, locator) for step in STEPS])
    what = "videos of a given folder" if arguments.media else "the synthetic world"
    text = section(table, len(listed), what, volume)
    print(text)
    if arguments.out:
        write_section(arguments.out, text)


if __name__ == "__main__":
    main()
