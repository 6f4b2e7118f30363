"""Numbers that others published, as data files with their source and protocol: `published/NAME.csv`.

They come from other data by other protocols, and stand in a column, or a table, of their own, never among the study's.
"""

from importlib import resources

import pandas as pd

COLUMNS = [
    "row", "method", "metric", "value", "level", "tested_on", "trained_on", "real", "fake", "protocol", "source"
]  # fmt: skip
METRICS = {"AUC", "AP", "mAP", "accuracy", "accuracy gain", "AP gain"}
LEVELS = {"video", "frame", "image", "unstated"}
TEXTS = ["method", "tested_on", "trained_on", "protocol", "source"]
NOTE = "other data, other protocol"


def names() -> list[str]:
    """The data files there are."""
    found = resources.files("unmask").joinpath("published").iterdir()
    return sorted(file.name.removesuffix(".csv") for file in found if file.name.endswith(".csv"))


def read(name: str) -> pd.DataFrame:
    """The published numbers of one file: `COLUMNS`, then `majority`.

    row: the row of the study's table that a number is the counterpart of, or "". value: float, per cent (for gains:
    points). real, fake: float, media of each class in the test set, NaN where unknown; majority: the accuracy in per
    cent of always answering with the larger class. KeyError for an unknown name, ValueError for a malformed file.
    """
    if name not in names():
        raise KeyError(f"there are no published numbers {name!r}; known are {', '.join(names())}")
    file = resources.files("unmask").joinpath("published", f"{name}.csv")
    with file.open(encoding="utf-8") as stream:
        table = pd.read_csv(stream, keep_default_na=False, dtype=str)
    return parse(table, file.name)


def parse(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """A table of texts, as its file has them, checked and with numbers; what `read` returns. Raises ValueError."""
    if list(table.columns) != COLUMNS:
        raise ValueError(f"{name} must have the columns {', '.join(COLUMNS)}")
    try:
        numbers = table[["value", "real", "fake"]].replace("", "nan").astype(float)
    except ValueError as error:
        raise ValueError(f"{name}: value, real and fake are numbers: {error}") from error
    table = table.assign(**numbers)
    counts = table[["real", "fake"]]
    faults = {
        "a value outside of 0 to 100": ~table["value"].between(0, 100),
        "an unknown metric": ~table["metric"].isin(METRICS),
        "an unknown level": ~table["level"].isin(LEVELS),
        "an empty text": (table[TEXTS].map(str.strip) == "").any(axis=1),
        "one class counted without the other": counts.isna().sum(axis=1) == 1,
        "a count that is no number of media": (counts.notna() & ((counts < 1) | (counts % 1 != 0))).any(axis=1),
        "the same number twice": table.duplicated(["row", "method", "metric", "tested_on", "trained_on"]),
    }
    for fault, found in faults.items():
        if found.any():
            raise ValueError(f"{name}, line {int(found.argmax()) + 2}: {fault}")
    return table.assign(majority=100 * counts.max(axis=1) / counts.sum(axis=1, min_count=2))


def beside(table: pd.DataFrame) -> dict[str, str]:
    """The counterparts of every row that has some in a table of `read`, in one line: "TALL: AUC 90.8 DFDC"."""
    lines = {}
    for row, own in table[table["row"] != ""].groupby("row", sort=False):
        parts = []
        for (method, metric), part in own.groupby(["method", "metric"], sort=False):
            parts.append(f"{method}: {metric} " + ", ".join(f"{n.value:g} {n.tested_on}" for n in part.itertuples()))
        lines[row] = "; ".join(parts)
    return lines
