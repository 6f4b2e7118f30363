"""Whether two runs of a study left the same tables: `compare.py FIGURES FIGURES`; exit code 1 if not.

CSV files are compared byte by byte; of those that hold measured times, the columns that do are left out (kills.TIMES
in benchmarks/).
"""

import sys
from pathlib import Path

import pandas as pd

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from kills import TIMES  # noqa: E402


def main(one: Path, other: Path) -> int:
    """Print what was compared and what differs."""
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*.csv")) for folder in (one, other)]
    differing = sorted(set(names[0]) ^ set(names[1]))
    same = 0
    for name in sorted(set(names[0]) & set(names[1])):
        if (one / name).read_bytes() == (other / name).read_bytes():
            same += 1
            continue
        tables = [pd.read_csv(folder / name) for folder in (one, other)]
        left_out = [column for column in tables[0] if column in TIMES]
        if left_out and tables[0].drop(columns=left_out).equals(tables[1].drop(columns=left_out, errors="ignore")):
            print(f"same but for {', '.join(left_out)}: {name}")
        else:
            differing.append(name)
    print(f"{same} tables are the same byte by byte", *(f"DIFFERENT: {name}" for name in differing), sep="\n")
    return 1 if differing or not same else 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
