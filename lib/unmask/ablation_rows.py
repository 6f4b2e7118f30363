"""Rows of the ablation tables: arms, ways to detect, against each other on one data set, from their stored scores.

Test media alone are judged, paired with the others' judgement of the same media; an arm without scores says why.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from unmask import published
from unmask.comparison import compare
from unmask.contenders import Contender, ended, gather
from unmask.data.manifest import read_manifest
from unmask.evaluation import join, slices_by_kind
from unmask.intervals import holm, paired_p
from unmask.profile import Study

KEYS = ["dataset", "method", "arm"]
GAINS = ["gain", "gain_low", "gain_high", "p", "p_holm"]
JUDGED = [
    *KEYS, "seeds", "items", "n_real", "n_fake", "auc", "low", "high", *GAINS, "best", "majority"
]  # fmt: skip
COLUMNS = [*JUDGED, "published", "note"]
COUNTS = ["seeds", "items", "n_real", "n_fake"]
BEST, TIE = "best", "="


def judge(
    scores: pd.DataFrame,
    manifest: pd.DataFrame,
    control: str,
    level: float = 0.95,
    draws: int = 1000,
    by_method: bool = False,
) -> pd.DataFrame:
    """Every arm (`detector` of a score table) against the others on the items of the manifest that all of them scored.

    Columns `JUDGED`, a row per data set (with `by_method` per forgery, too) and arm, in the order of the scores. seeds
    are averaged; low, high: the interval of the AUC over groups; gain: the paired difference to `control` (NaN if it is
    missing), with p, and p_holm corrected over all rows but the control's. best: `BEST` for the highest AUC of a data
    set and forgery, `TIE` for what a paired test, corrected over its arms, does not show to be worse. majority: the
    accuracy of always answering with the larger class.
    """
    clips = scores[(scores["frame"] == -1) & scores["item_id"].isin(manifest["item_id"])]
    if clips.empty:
        return pd.DataFrame(columns=JUDGED)
    if not by_method:  # all fakes of a data set are one kind then
        manifest = manifest.assign(method=manifest["method"].where(manifest["label"] == 0, "all"))
    against = control if control in set(clips["detector"]) else clips["detector"].iloc[0]
    rows = compare(clips, manifest, (against, ""), level, draws).rename(columns={"detector": "arm"})
    if rows.empty:
        return rows.reindex(columns=JUDGED)
    if against != control:
        rows[GAINS] = np.nan
    about = [
        _standing(part, rows[(rows["dataset"] == where.dataset) & (rows["method"] == where.method)], level)
        for where, part in slices_by_kind(join(clips, manifest)).items()
        if where.reals == "all" and part["label"].nunique() == 2
    ]
    place = rows["arm"].map({arm: k for k, arm in enumerate(clips["detector"].unique())})
    order = np.lexsort((place, rows.groupby(KEYS[:2], sort=False).ngroup()))
    return rows.join(pd.concat(about))[JUDGED].iloc[order].reset_index(drop=True)


def _standing(part: pd.DataFrame, rows: pd.DataFrame, level: float) -> pd.DataFrame:
    """Counts, majority and `best` of the rows of one slice, whose joined scores are `part`; indexed like `rows`."""
    keys = ["item_id", "label", "group_id"]
    wide = part.pivot(index=keys, columns=["detector", "seed"], values="score").dropna()
    labels, groups = (wide.index.get_level_values(key).to_numpy() for key in keys[1:])
    n_fake = int((labels == 1).sum())
    counts = {"n_real": len(labels) - n_fake, "n_fake": n_fake}
    if rows["auc"].isna().all():  # of the items that all scored, none is of one class
        return pd.DataFrame(counts | {"majority": np.nan, "best": ""}, index=rows.index)
    best = rows.loc[rows["auc"].idxmax(), "arm"]
    others = [arm for arm in rows["arm"] if arm != best]
    p = [paired_p(labels, wide[arm].to_numpy(), wide[best].to_numpy(), groups) for arm in others]
    majority = max(counts.values()) / len(labels)
    found = {"majority": majority, "best": marks(list(rows["arm"]), best, p, level)}
    return pd.DataFrame(counts | found, index=rows.index)


def contest(
    study: Study,
    arms: Sequence[Contender],
    control: str,
    counterparts: str = "",
    by_method: bool = False,
    work: Path | None = None,
) -> pd.DataFrame:
    """`judge` of arms on the study's test media, with `COLUMNS`; an arm without scores has a row whose note says why.

    counterparts: the published numbers (`published.read`) whose `row` are arms; they stand in an arm's first row. work:
    where the scores are, if not in the study's work folder. Every arm missing for one reason is one row.
    """
    manifest = read_manifest(study.input("manifest.parquet", made_by="00_data"))
    scores, missing = gather(work or study.work, arms)
    options, test = study.profile.evaluate, manifest[manifest["split"] == "test"]
    table = judge(scores, test, control, options.level, options.draws, by_method)
    for arm in (arm.name for arm in arms if arm.name not in missing and arm.name not in set(table["arm"])):
        missing[arm] = "missing: no test medium of a data set with both classes that every arm scored"
    if len(missing) == len(arms) and len(set(missing.values())) == 1:
        missing = {"all": next(iter(missing.values()))}
    absent = pd.DataFrame([{"dataset": "", "method": "", "arm": arm, "note": why} for arm, why in missing.items()])
    table = pd.concat([part for part in (table.assign(note=""), absent) if len(part)], ignore_index=True)
    known = published.beside(published.read(counterparts)) if counterparts else {}
    first = ~table["arm"].duplicated()
    table["published"] = [known.get(arm, "") if new else "" for arm, new in zip(table["arm"], first, strict=True)]
    table = whole_numbers(table.reindex(columns=COLUMNS), COUNTS)
    texts = {name: [value if isinstance(value, str) else "" for value in table[name]] for name in ("best", "note")}
    return table.assign(**texts)


def marks(names: Sequence[str], best: str, p: Sequence[float], level: float) -> list[str]:
    """`BEST` for one of names, and for the others, in order, `TIE` unless p, corrected by Holm, shows them worse."""
    others = [name for name in names if name != best]
    worse = {name for name, value in zip(others, holm(p), strict=True) if value < 1 - level}
    return [BEST if name == best else "" if name in worse else TIE for name in names]


def missing_row(work: Path, chapter: str) -> pd.DataFrame:
    """The one row of a table whose chapter left nothing in the work folder, with the reason in its note."""
    why = ended(work, chapter) or f"{chapter} left no results"
    return pd.DataFrame([{"arm": "all", "note": f"missing: {why}"}])


def whole_numbers(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The table with these columns as whole numbers, None where something is missing."""
    whole = {}
    for name in columns:
        values = table[name].astype(float)
        found = [None if np.isnan(value) else int(value) for value in values]
        whole[name] = pd.Series(found, table.index, dtype=object if values.isna().any() else int)
    return table.assign(**whole)
