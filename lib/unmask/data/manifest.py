"""The manifest: one Parquet row per medium, and the rules that keep its splits honest."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import pandera.pandas as pa
import pyarrow
import pyarrow.parquet as pq
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from unmask.machine import writing

SPLITS = ("train", "val", "test")
DEFAULT_FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}

# In these families almost every identity is a donor to almost every other, so following donors would
# join the whole set into one unit; there the unit is the target identity alone.
UNLINKED_DONORS = frozenset({"celebdf", "dfd", "dfdc-preview", "deeperforensics"})


class ManifestError(ValueError):
    """A manifest, or what it should be made from, is missing, malformed or breaks a rule."""


def is_inside(path: str) -> bool:
    """Whether `path` is a relative posix path that cannot leave its root."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and "\0" not in path


def _text(*checks: pa.Check) -> pa.Column:
    return pa.Column(str, list(checks))


_FILLED = pa.Check.str_length(min_value=1, error="must not be empty")
_INSIDE = pa.Check(lambda s: s.map(is_inside), error="must be a relative path that stays inside root")
SCHEMA = pa.DataFrameSchema(
    {
        "item_id": pa.Column(str, pa.Check.str_matches(r"^[0-9a-f]{16}\Z"), unique=True),
        "root": _text(_FILLED),
        "path": _text(_INSIDE),
        "kind": _text(pa.Check.isin(["video", "image"])),
        "dataset": _text(_FILLED),
        "split": _text(pa.Check.isin(SPLITS)),
        "label": pa.Column("int8", pa.Check.isin([0, 1])),
        "method": _text(_FILLED),
        "subject": _text(),
        "source_id": _text(),
        "group_id": _text(_FILLED),
        "camera": _text(),
        "annotations": _text(
            pa.Check(
                lambda s: s.map(lambda p: p == "" or is_inside(p)),
                error="must be empty or a relative path that stays inside root",
            )
        ),
    },
    checks=pa.Check(
        lambda df: (df["label"] == 0) == (df["method"] == "real"),
        error="method must be 'real' for label 0, and only for label 0",
    ),
    strict=True,
    ordered=True,
)
COLUMNS = tuple(SCHEMA.columns)
_ARROW = pyarrow.schema([(c, pyarrow.int8() if c == "label" else pyarrow.string()) for c in COLUMNS])


def item_id(dataset: str, relpath: str) -> str:
    """First 16 hex digits of sha256 of "dataset/relative path"."""
    return hashlib.sha256(f"{dataset}/{relpath}".encode()).hexdigest()[:16]


def _validate(df: pd.DataFrame, where: str) -> pd.DataFrame:
    if len(df) == 0:
        raise ManifestError(f"{where}: the manifest has no rows.")
    try:
        return SCHEMA.validate(df, lazy=True)
    except pa.errors.SchemaErrors as error:
        raise ManifestError(f"{where}: {_describe(error.failure_cases)}") from error


def _describe(cases: pd.DataFrame) -> str:
    """The first three faults of a failed validation as one sentence each, with count and an example."""
    sentences = []
    for (column, check), part in cases.groupby(["column", "check"], sort=False, dropna=False):
        rows = part["index"].dropna().unique()
        example = (
            f" (e.g. {part['failure_case'].iloc[0]!r} in row {rows[0]})"
            if len(rows)
            else f" ({part['failure_case'].iloc[0]!r})"
        )
        subject = f"column {column!r}" if column in COLUMNS else "table"
        sentences.append(f"{subject} fails {check!r}{f' in {len(rows)} rows' if len(rows) else ''}{example}.")
    return " ".join(sentences[:3])


def write_manifest(df: pd.DataFrame, path: Path | str) -> None:
    """Validate and write a manifest atomically. Raises ManifestError that names the faulty column and row."""
    path = Path(path)
    df = _validate(df.reset_index(drop=True), f"manifest for {path}")
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        table = pyarrow.Table.from_pandas(df, schema=_ARROW, preserve_index=False).replace_schema_metadata(None)
    except (pyarrow.ArrowException, UnicodeError) as error:
        raise ManifestError(f"manifest for {path} cannot be stored: {error}") from error
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            pq.write_table(table, partial, write_page_checksum=True)
            os.replace(partial, path)
        except (pyarrow.ArrowException, UnicodeError) as error:
            raise ManifestError(f"manifest for {path} cannot be stored: {error}") from error
        finally:
            partial.unlink(missing_ok=True)


def read_manifest(path: Path | str) -> pd.DataFrame:
    """Read and validate a manifest; nothing is added. Raises ManifestError naming what is wrong with the file."""
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"There is no manifest at {path}. Make one with `unmask world` or `unmask index`.")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            # Types are settled before any data is decoded, so that nested or foreign columns never get that far.
            if not schema.equals(_ARROW):
                raise ManifestError(f"{path} is not a manifest: {_schema_fault(schema)} Write it with write_manifest.")
            table = file.read()
        table.validate(full=True)
        df = table.to_pandas(ignore_metadata=True)
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise ManifestError(f"{path} cannot be read as Parquet ({error}). Make it again.") from error
    return _validate(df, str(path))


def _schema_fault(schema: pyarrow.Schema) -> str:
    if tuple(schema.names) == COLUMNS:
        wrong = [
            f"{f.name} is {f.type}, expected {_ARROW.field(f.name).type}"
            for f in schema
            if f.type != _ARROW.field(f.name).type
        ]
        return "column " + "; ".join(wrong) + "."
    missing = [c for c in COLUMNS if c not in schema.names]
    extra = [c for c in schema.names if c not in COLUMNS]
    return (
        f"missing columns {missing[:5]}, unexpected columns {extra[:5]}."
        if missing or extra
        else "the columns are repeated or in another order."
    )


def media_path(row: Mapping[str, str] | pd.Series, manifest_path: Path | str, column: str = "path") -> Path:
    """File of a manifest row; `column="annotations"` for its landmarks.

    A relative root is taken from the manifest's folder. Raises ManifestError if the path would leave root.
    The check is on the name: links that a person put inside root are followed.
    """
    if not is_inside(row[column]):
        raise ManifestError(f"The path {row[column]!r} leaves its root or is empty; paths must stay inside root.")
    return Path(manifest_path).parent / row["root"] / row[column]


def _qualify(ids: pd.Series, dataset: pd.Series) -> pd.Series:
    """Ids written "family:id" are shared by every data set of that family; bare ids belong to their data set."""
    bare = (ids != "") & ~ids.str.contains(":", regex=False)
    return ids.where(~bare, dataset + ":" + ids)


def assign_groups(df: pd.DataFrame) -> pd.DataFrame:
    """Copy of `df` with `group_id` set to the leakage unit.

    Units are the connected components of the graph that joins each item's subject with its source_id
    (donor), within a family of data sets; donors of UNLINKED_DONORS families join nothing. An item with
    neither id is a unit of its own. A unit is named by its alphabetically first id.
    """
    subject = _qualify(df["subject"].astype(object), df["dataset"].astype(object))
    source = _qualify(df["source_id"].astype(object), df["dataset"].astype(object))
    source = source.where(~source.str.partition(":")[0].isin(UNLINKED_DONORS), "")
    own = df["dataset"].astype(object) + ":item-" + df["item_id"].astype(object)
    subject = subject.where(subject != "", source).where((subject != "") | (source != ""), own)
    source = source.where(source != "", subject)
    codes, names = pd.factorize(pd.concat([subject, source]), sort=True)
    a, b = codes[: len(df)], codes[len(df) :]
    graph = coo_matrix((np.ones(len(df), dtype=np.int8), (a, b)), shape=(len(names), len(names)))
    component = connected_components(graph, directed=False)[1]
    first = pd.Series(range(len(names))).groupby(component).min().to_numpy()
    return df.assign(group_id=np.asarray(names, dtype=object)[first[component[a]]] if len(df) else "")


def leakage(df: pd.DataFrame) -> pd.DataFrame:
    """Groups in more than one split: index group_id, columns train, val, test with the number of items in each."""
    counts = pd.crosstab(df["group_id"], df["split"]).reindex(columns=list(SPLITS), fill_value=0)
    counts.columns.name = None
    return counts[(counts > 0).sum(axis=1) > 1]


def check_splits(df: pd.DataFrame, allow_official: Collection[str] = ()) -> pd.DataFrame:
    """Refuse groups that lie in more than one split; returns the table of the allowed ones.

    `allow_official`: data sets whose official split overlaps. A group is allowed only if all its items
    belong to them. Raises ManifestError otherwise.
    """
    leaks = leakage(df)
    members = df[df["group_id"].isin(leaks.index)]
    refused = sorted(members.loc[~members["dataset"].isin(list(allow_official)), "group_id"].unique())
    if refused:
        shown = ", ".join(repr(g) for g in refused[:3])
        raise ManifestError(
            f"{len(refused)} groups lie in more than one split, e.g. {shown}. Split by group "
            "(split_by_group), or allow the data sets whose official split overlaps."
        )
    return leaks


def _covers(groups: pd.DataFrame) -> list[list[str]]:
    """Smallest sets of groups that have both classes: single mixed groups, then pairs of a real and a fake group."""
    mixed = groups.index[(groups[0] > 0) & (groups[1] > 0)]
    reals = groups.index[(groups[0] > 0) & (groups[1] == 0)]
    fakes = groups.index[(groups[0] == 0) & (groups[1] > 0)]
    return [[g] for g in mixed] + [list(pair) for pair in zip(reals, fakes, strict=False)]


def split_by_group(df: pd.DataFrame, fractions: Mapping[str, float], seed: int) -> pd.DataFrame:
    """Copy of `df` with `split` set so that no group is divided.

    Every split gets both classes if the groups allow it; beyond that each group goes where its classes
    are most lacking, largest first. Depends on the set of rows and the seed, not on row order.
    fractions: split -> share, adding up to 1. Raises ManifestError on bad fractions.
    """
    shares = {s: f for s, f in fractions.items() if f > 0}
    if not set(shares) <= set(SPLITS) or min(fractions.values(), default=0) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ManifestError(f"Split fractions must be shares of {SPLITS} that add up to 1, not {dict(fractions)}.")
    order = sorted(shares, key=lambda s: (-shares[s], SPLITS.index(s)))
    # crosstab sorts the groups, so the draw below sees the same list whatever the row order.
    groups = pd.crosstab(df["group_id"], df["label"]).reindex(columns=[0, 1], fill_value=0)
    groups = groups.iloc[np.random.default_rng(seed).permutation(len(groups))]
    total = np.maximum(groups.sum().to_numpy(), 1)
    weight = dict(zip(groups.index, groups.to_numpy() / total, strict=True))
    size = groups.sum(axis=1)
    chosen = sorted(_covers(groups)[: len(order)], key=lambda c: -size[c].sum())
    place = {g: split for split, cover in zip(order, chosen, strict=False) for g in cover}
    filled = {s: sum((weight[g] for g, p in place.items() if p == s), np.zeros(2)) for s in order}
    for group in size.drop(list(place)).sort_values(ascending=False, kind="stable").index:
        lack = {s: float((shares[s] - filled[s]) @ weight[group]) / shares[s] for s in order}
        place[group] = max(order, key=lack.__getitem__)
        filled[place[group]] = filled[place[group]] + weight[group]
    return df.assign(split=df["group_id"].map(place))


def sampling_weights(df: pd.DataFrame) -> np.ndarray:
    """Weights float64[N], adding up to 1, that balance class, then data set within class, then method within that."""
    weights = np.ones(len(df))
    keys: list[str] = []
    for key in ("label", "dataset", "method"):
        siblings = df.groupby(keys)[key].transform("nunique") if keys else df[key].nunique()
        weights = weights / np.asarray(siblings)
        keys.append(key)
    return weights / df.groupby(keys)["item_id"].transform("size").to_numpy()


def manifest_hash(df: pd.DataFrame) -> str:
    """sha256 of the rows, whatever their order. `root` is left out: it differs between machines."""
    columns = [c for c in COLUMNS if c != "root"]
    rows = df.sort_values("item_id")[columns].astype({"label": int}).to_numpy(dtype=object).tolist()
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def summary(df: pd.DataFrame) -> pd.DataFrame:
    """Number of items by dataset, split, label and method: columns dataset, split, label, method, items."""
    keys = ["dataset", "split", "label", "method"]
    return df.groupby(keys, observed=True).size().rename("items").reset_index()
