"""The study's ablation tables, each made anew by one function from what the chapters left: `TABLES`, `unmask table`.

A row is an arm, a way to detect, on one data set. Published numbers stand in a column of their own: other data, other
protocol.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd

from unmask import ablation_cost, ablation_stages, figures, published
from unmask.ablation_grid import PLAIN, cells
from unmask.ablation_rows import BEST, KEYS, contest, whole_numbers
from unmask.contenders import Contender
from unmask.data.manifest import manifest_hash, read_manifest
from unmask.profile import ProfileError, Study

RAISED = {"auc", "ari"}  # columns that are bold in the best rows


def sbi(study: Study) -> pd.DataFrame:
    """Source x fusion x frequency x head (chapter 10), against the plain ConvNeXt with the mean of its frames."""
    arms = [Contender(f"{cell} {head}", "10_ablation", "ablation", head, str(cell))
            for cell in cells(study.profile) for head in study.profile.ablation.heads]  # fmt: skip
    # Where the chapter writes: it makes this table before its own results are there.
    work = study.output("scores/ablation.parquet").parents[1]
    table = contest(study, arms, f"{PLAIN} logits", "sbi", by_method=True, work=work)
    parts = table["arm"].str.extract(r"(?P<source>\w+)-(?P<fusion>\w+)-(?P<frequency>\w+) (?P<head>\w+)").fillna("")
    return pd.concat([table[KEYS], parts, table.drop(columns=KEYS)], axis=1)


def prompts(study: Study) -> pd.DataFrame:
    """Ways to teach a CLIP (chapter 07), against the linear probe."""
    arms = [Contender(name, "07_clip_prompts", "clip", name) for name in study.profile.clip.detectors]
    return contest(study, arms, "ufd", "prompts")


def fusion(study: Study) -> pd.DataFrame:
    """The fusion matrix F0 to F5c by two heads, and LaRE's error alone (chapter 07), against CLIP's features alone."""
    keys, arms = study.profile.clip, []
    for kind in keys.fusions:
        for head in keys.heads:
            name = f"clip-lare:{kind}{'-text' if head == 'text' else ''}"
            arms.append(Contender(f"{kind} {head}", "07_clip_prompts", "clip", name))
    arms.append(Contender("LaRE error alone", "07_clip_prompts", "clip", "lare-error"))
    return contest(study, arms, "F0 linear", "fusion")


def d2st(study: Study) -> pd.DataFrame:
    """Pathways, stages and placement of adapters in a CLIP, and baselines (chapter 08), against LayerNorm tuning.

    clip: all frames together; frames: the mean over the same frames, each judged alone.
    """
    stages = ("d2st, stage 1", "d2st, stage 2", "d2st, stage 3", "unaligned, stage 3")
    looks = [("lntune", "frames"), ("ufd", "frames")]
    looks += [(stage, look) for stage in stages for look in ("frames", "clip")]
    looks += [(f"{label}, stage 2", "clip") for label in study.profile.d2st.arms if label != "d2st"]
    arms = [Contender(f"{name}, {look}", "08_clip_d2st", "clip_d2st", name, look) for name, look in looks]
    return contest(study, arms, "lntune, frames", "d2st")


def literature(study: Study) -> pd.DataFrame:
    """All published numbers (`published.read`) with their sources; the same for every study."""
    parts = [published.read(name).assign(table=name) for name in published.names()]
    table = whole_numbers(pd.concat(parts, ignore_index=True), ["real", "fake"])
    return table[["table", *published.COLUMNS, "majority"]]


@dataclass(frozen=True)
class Table:
    """A table of the study: the function of a study that makes it, and its caption.

    origin: where its numbers come from if not from the study's data; seeds: how many of the study's, the first ones,
    are behind them if not all.
    """

    make: Callable[[Study], pd.DataFrame]
    caption: str
    origin: str | None = None
    seeds: int | None = None


_SHARED = (
    "AUC over test media by the mean over frames (or clips), mean over seeds, interval over groups; "
    "gain: paired difference to {}; "
    "best: highest AUC of a data set; =: not shown to be worse by a paired test"
)
TABLES: Mapping[str, Table] = {
    "ablation_unsupervised": Table(
        ablation_stages.unsupervised, f"Stages without labels: {_SHARED.format('the camera cue')}"
    ),
    "ablation_features": Table(
        ablation_stages.features,
        "Measurements of the first stage without labels, alone, on the videos that they label: training, validation",
        seeds=1,
    ),
    "ablation_clustering": Table(
        ablation_stages.clustering,
        "Clusters of media against the true cameras: interval and tests of ARI by a jackknife over recordings",
        seeds=1,
    ),
    "ablation_sbi": Table(sbi, f"Source, fusion, frequency and head: {_SHARED.format('the plain ConvNeXt')}"),
    "ablation_prompts": Table(prompts, f"Ways to teach a CLIP: {_SHARED.format('the linear probe')}"),
    "ablation_fusion": Table(fusion, f"Fusion of CLIP and LaRE: {_SHARED.format('the features of CLIP alone')}"),
    "ablation_d2st": Table(d2st, f"Adapters in a CLIP: {_SHARED.format('LayerNorm tuning')}"),
    "ablation_published": Table(
        literature,
        f"Published numbers by table and the row that they are the counterpart of, per cent: {published.NOTE}",
        "published",
        seeds=0,
    ),
    "ablation_cost": Table(
        ablation_cost.table,
        "What a detector costs beside its AUC on test videos of the home set by the mean over frames (or clips); "
        "frames per second and seconds of training on this machine; front: none is better for less",
    ),
}


def make(study: Study, name: str) -> pd.DataFrame:
    """One of TABLES, made anew. ProfileError for an unknown name, with those there are."""
    if name not in TABLES:
        raise ProfileError(f"There is no table {name}; there are {', '.join(TABLES)}.")
    return TABLES[name].make(study)


def bold(table: pd.DataFrame) -> pd.DataFrame:
    """Which cells are bold: the figure that is judged, in the best rows."""
    best = table["best"] == BEST if "best" in table else pd.Series(False, table.index)
    return pd.DataFrame({column: best & (column in RAISED) for column in table}, index=table.index)


def save_table(study: Study, name: str) -> pd.DataFrame:
    """Make one of TABLES anew and leave it with the study's tables, as chapter 10 does; returns it."""
    table = make(study, name)
    if study.manifest_hash is None:
        study.manifest_hash = manifest_hash(read_manifest(study.input("manifest.parquet", made_by="00_data")))
    sizes = table["items"].astype(float).groupby(table["dataset"]).max() if "items" in table else pd.Series(dtype=float)
    n = {"media": int(sizes.sum())} if sizes.notna().any() else None
    about = TABLES[name]
    figures.save_table(study, name, table, about.caption, bold(table), n, about.origin, study.seeds[: about.seeds])
    return table
