"""How the tables grow: manifest, crop index and evaluation of 10 000, 100 000 and 1 000 000 rows, a process each.

    python benchmarks/scale.py [--rows 10000 100000 1000000] [--out benchmarks/RESULTS.md]

The media do not exist; their tables do, as `unmask index`, `preprocess` and `score` would leave them: persons with two
reals and eight fakes by four methods, in pairs that lend each other their faces (so that 20 items are one group), a
tenth of the groups to train, a tenth to validate, the rest to test; one score per item. Every step of every size runs
in a process of its own; its highest resident memory is the process's, imports included.
"""

import argparse
import json
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

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from sections import processor, write_section  # noqa: E402

from unmask.data import crops, manifest  # noqa: E402
from unmask.evaluation import evaluate_files, write_scores  # noqa: E402

HEADING = "## Scale"
METHODS = ("swap", "reenact", "texture", "synthesis")
FRACTIONS = {"train": 0.1, "val": 0.1, "test": 0.8}
SHARDS = 8
FACES = 8  # crops of an item
DRAWS = 200


def media(count: int) -> pd.DataFrame:
    """Rows of a manifest without group and split. A method lacks the fakes of every fourth pair: reals stand there."""
    person, place = np.divmod(np.arange(count), 10)
    kind = np.where(place < 2, 0, 1 + (place - 2) % 4)
    kind[(person // 2) % 4 == kind - 1] = 0
    fake = kind > 0
    names = np.char.add("p", person.astype(str))
    paths = [f"{p:06d}/{k}.mp4" for p, k in zip(person, place, strict=True)]
    empty = np.full(count, "", object)
    return pd.DataFrame({
        "item_id": [manifest.item_id("simulated", path) for path in paths], "root": "simulated", "path": paths,
        "kind": "video", "dataset": "simulated", "split": "", "label": fake.astype(np.int8),
        "method": np.array(["real", *METHODS], object)[kind], "subject": names.astype(object),
        "source_id": np.where(fake, np.char.add("p", (person ^ 1).astype(str)).astype(object), empty), "group_id": "",
        "camera": "", "annotations": "",
    })[list(manifest.COLUMNS)]  # fmt: skip


def make_manifest(folder: Path, rows: int) -> None:
    """Groups from persons, splits from groups, and the manifest on the disk."""
    df = manifest.split_by_group(manifest.assign_groups(media(rows)), FRACTIONS, seed=0)
    manifest.write_manifest(df, folder / "manifest.parquet")


def check_manifest(folder: Path, rows: int) -> None:
    """Read and validate it; no group in two splits, and the groups are those that its persons give."""
    df = manifest.read_manifest(folder / "manifest.parquet")
    assert len(df) == rows and manifest.check_splits(df).empty
    assert (manifest.assign_groups(df)["group_id"] == df["group_id"]).all()
    manifest.summary(df)


def evaluate_scores(folder: Path, rows: int) -> None:
    """`unmask evaluate` with DRAWS draws of groups."""
    scores, listed = folder / "scores.parquet", folder / "manifest.parquet"
    table = evaluate_files(scores, listed, folder / "table.csv", draws=DRAWS)
    assert len(table) == 1 + 2 * len(METHODS) and table["low"].notna().all()


def check_and_evaluate(folder: Path, rows: int) -> None:
    """All of the above but the making."""
    check_manifest(folder, rows)
    evaluate_scores(folder, rows)


def collate_crops(folder: Path, rows: int) -> None:
    """Merge the shards of a crop index, one row per crop."""
    assert crops.collate(folder / "crops", SHARDS) == []


def read_crops(folder: Path, rows: int) -> None:
    """Read and validate the crop index."""
    assert len(crops.read_index(folder / "crops")) == rows


STEPS = {
    "groups, splits, manifest written": make_manifest,
    "manifest validated, splits and groups checked": check_manifest,
    f"evaluated, {DRAWS} draws": evaluate_scores,
    "both, in one process": check_and_evaluate,
    "crop index of as many crops merged": collate_crops,
    "crop index read": read_crops,
}


def write_inputs(folder: Path, rows: int) -> None:
    """What the steps read: scores of all items, groups alike; journals of shards whose pictures nobody looks at."""
    df = media(rows)
    rng = np.random.default_rng(0)
    lean = rng.normal(0, 0.5, len(df) // 20 + 1)[np.arange(len(df)) // 20]
    score = 1 / (1 + np.exp(-(rng.normal(0, 1, len(df)) + lean + 1.5 * df["label"].to_numpy() - 0.75)))
    run = {"frame": np.int32(-1), "score": score, "detector": "d", "variant": "", "seed": np.int32(0), "checkpoint": ""}
    table = df[["item_id"]].assign(**run).astype({"frame": "int32", "seed": "int32"})
    write_scores(table, folder / "scores.parquet")
    shards = folder / "crops" / "shards"
    shards.mkdir(parents=True)
    marks = np.linspace(10, 150, 136).round(3).tolist()
    crop = {"pts": 0.5, "x0": 1.5, "y0": 2.5, "x1": 90.5, "y1": 91.5, "landmarks": marks, "locator": "none",
            "locator_hash": "", "offset": 512, "size": 20000, "sha256": "0" * 64}  # fmt: skip
    item = {"status": "ok", "reason": "", "frames": FACES, "faces": FACES, "decoder": "pyav", "seconds": 0.5}
    for shard in range(SHARDS):
        name = f"crops-{shard:05d}-of-{SHARDS:05d}"
        (shards / f"{name}.tar").touch()
        with open(shards / f"{name}.jsonl", "w", encoding="utf-8") as journal:
            for identity in df["item_id"].iloc[: rows // FACES].iloc[shard::SHARDS]:
                found = [{"item_id": identity, "frame": t} | crop | {"shard": f"{name}.tar"} for t in range(FACES)]
                line = {"key": [identity, ""], "end": 0, "item": {"item_id": identity} | item, "crops": found}
                journal.write(json.dumps(line) + "\n")


def measured(step: str, folder: Path, rows: int) -> dict[str, float]:
    """Run one step in a process of its own: wall and processor seconds after the imports, and peak MiB."""
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder), "--rows", str(rows)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(found.splitlines()[-1])


def run_step(step: str, folder: Path, rows: int) -> None:
    """The child's part of `measured`."""
    wall, busy = time.perf_counter(), time.process_time()
    STEPS[step](folder, rows)
    spent = {"wall": time.perf_counter() - wall, "busy": time.process_time() - busy}
    print(json.dumps(spent | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def measure(sizes: list[int], steps: list[str]) -> pd.DataFrame:
    """A row per step and size: wall, busy (seconds) and peak (MiB)."""
    table = []
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(Path(folder), rows)
            for step in steps:
                table.append({"step": step, "rows": rows} | measured(step, Path(folder), rows))
                print(table[-1], file=sys.stderr, flush=True)
    return pd.DataFrame(table)


def section(table: pd.DataFrame) -> str:
    """The section as Markdown. The exponent is that of processor time between two sizes: 1 is in proportion."""
    sizes = sorted(table["rows"].unique())
    limits = [1 + np.log(np.log(b) / np.log(a)) / np.log(b / a) for a, b in zip(sizes, sizes[1:], strict=False)]
    lines = [
        HEADING, "",
        f"Seconds of wall time (of processor time in brackets) and highest resident memory of a process each, one "
        f"thread, {os.cpu_count()} cores, CPU {processor()}; Python {platform.python_version()}, NumPy "
        f"{np.__version__}, pandas {pd.__version__}; load average at the end {os.getloadavg()[0]:.1f}. `python "
        f"benchmarks/scale.py`: tables of media that do not exist, {DRAWS} draws of groups of 20 items, "
        f"{FRACTIONS['test']:.0%} of the items in the test split, {1 + 2 * len(METHODS)} rows of results. The exponent "
        "is that of processor time from a size to the next; n log n has "
        f"{' and '.join(f'{limit:.2f}' for limit in limits)}.",
        "", "| step | rows | seconds | exponent | peak (MiB) |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for step, part in table.groupby("step", sort=False):
        before = None
        for row in part.itertuples():
            exponent = ""
            if before is not None:
                exponent = f"{np.log(row.busy / before.busy) / np.log(row.rows / before.rows):.2f}"
            lines.append(f"| {step} | {row.rows} | {row.wall:.1f} ({row.busy:.1f}) | {exponent} | {row.peak:.0f} |")
            before = row
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--step", action="append", choices=list(STEPS), help="this step alone (default: all)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="Markdown file whose section is replaced")
    arguments = parser.parse_args()
    if arguments.folder:
        run_step(arguments.step[0], arguments.folder, arguments.rows[0])
        return
    text = section(measure(arguments.rows, arguments.step or list(STEPS)))
    print(text)
    if arguments.out:
        write_section(arguments.out, text)


if __name__ == "__main__":
    main()
