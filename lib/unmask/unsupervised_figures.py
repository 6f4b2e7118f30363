"""Figures of the unsupervised chapter: halves of a camera, training, maps of frames, inter-frame steps, verdicts."""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import plotly.express as px
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unmask.clustering import UNATTRIBUTED
from unmask.data.frames import MediaError
from unmask.data.video import read_frames
from unmask.embedding_maps import NAMES, TIMES
from unmask.figures import COLOURS
from unmask.pseudo_labels import CUE, standardise
from unmask.unsupervised import STEPS

STEP_NAMES = {
    "spearman": "rank correlation", "euclidean": "distance", "euclidean_unit": "distance of unit vectors"
}  # fmt: skip


def draw_halves(features: pd.DataFrame, labels: pd.DataFrame) -> Figure:
    """The cue of every video, camera by camera, and standardised over all, with the half that it falls into.

    features, labels: rows of one collection in the same order, from FEATURES_FILE and LABELS_FILE; no truth.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    half = np.where(labels["cue"] > 0.5, "called fake", "called real")
    colour = {"called real": COLOURS["real"], "called fake": COLOURS["fake"]}
    camera = features["cluster"].map(lambda c: "none" if c == UNATTRIBUTED else str(c))
    order = sorted(camera.unique(), key=lambda name: (name == "none", len(name), name))
    shared = {"hue": half, "palette": colour, "hue_order": list(colour)}
    sns.stripplot(x=camera, y=features[CUE], order=order, size=3, jitter=0.3, ax=left, legend=False, **shared)
    left.set(xlabel="camera (cluster)", ylabel="correlation, face with its camera")
    scaled = standardise(features[[CUE]], features["cluster"].to_numpy())[CUE]
    sns.histplot(x=scaled, bins=40, ax=right, multiple="stack", **shared)
    right.set(xlabel="the same, robust standard deviations within the camera", ylabel="videos")
    fig.tight_layout()
    return fig


def draw_training(contrast: Mapping[str, list[dict]], classifier: Mapping[str, list[dict]]) -> Figure:
    """Histories of stages 2 and 3 by run: loss (solid) and validation loss (dashed, x), and frames kept by stage 2."""
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    runs = [*contrast, *(name for name in classifier if name not in contrast)]
    colours = dict(zip(runs, sns.color_palette("colorblind", len(runs)), strict=True))
    for ax, histories in zip(axes, (contrast, classifier), strict=False):
        for name, history in histories.items():
            table = pd.DataFrame(history).astype({"val_loss": float})
            ax.plot(table["epoch"] + 1, table["loss"], color=colours[name], marker=".", label=name)
            ax.plot(table["epoch"] + 1, table["val_loss"], color=colours[name], marker="x", linestyle="--")
    for name, history in contrast.items():
        table = pd.DataFrame(history)
        axes[2].step(table["epoch"] + 1, table["kept"], where="mid", color=colours[name])
    axes[0].set(xlabel="epoch", ylabel="contrastive loss (dashed: validation)")
    axes[1].set(xlabel="epoch", ylabel="classifier loss (dashed: validation)")
    axes[2].set(xlabel="epoch", ylabel="frames that stage 2 learns from", ylim=(0, None))
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(fontsize=8)
    fig.tight_layout()
    return fig


def draw_maps(maps: pd.DataFrame) -> Figure:
    """The maps of `unmask.embedding_maps.map_frames`: columns before and after, rows by truth and by pseudo-label."""
    fig, axes = plt.subplots(2, 2, figsize=(9, 8))
    for column, when in zip(axes.T, TIMES.values(), strict=True):
        part = maps[maps["when"] == when]
        for ax, by in zip(column, ("truth", "pseudo"), strict=True):
            for name in NAMES.values():
                own = part[part[by] == name]
                ax.scatter(own["x"], own["y"], s=14, alpha=0.7, color=COLOURS[name], label=name)
            ax.set(
                title=f"{when} training, by {'the truth' if by == 'truth' else 'pseudo-label'}", xticks=[], yticks=[]
            )
    axes[0, 0].legend(fontsize=8)
    fig.tight_layout()
    return fig


def interactive_map(maps: pd.DataFrame):
    """The maps of `unmask.embedding_maps.map_frames` as a plotly figure that names every item and its method."""
    fig = px.scatter(
        maps, x="x", y="y", facet_col="when", color="truth", symbol="pseudo", hover_data=["item_id", "method"],
        color_discrete_map=COLOURS, category_orders={"when": list(TIMES.values()), "truth": list(NAMES.values())},
    )  # fmt: skip
    fig.update_xaxes(matches=None, showticklabels=False, title="")
    fig.update_yaxes(matches=None, showticklabels=False, title="")
    return fig.update_layout(height=460, template="plotly_white")


def draw_steps(tables: Mapping[str, pd.DataFrame], truth: pd.Series, bins: int = 30) -> Figure:
    """Histograms of the inter-frame steps, a row for each backbone and a column for each of STEPS: real and fake.

    tables: `unmask.unsupervised.step_table` by backbone; truth by item_id. Shares, for there may be few reals.
    """
    fig, axes = plt.subplots(len(tables), len(STEPS), figsize=(4.2 * len(STEPS), 3.2 * len(tables)), squeeze=False)
    for row, (backbone, table) in zip(axes, tables.items(), strict=True):
        true = truth.loc[table["item_id"]].to_numpy()
        for ax, name in zip(row, STEPS, strict=True):
            values = table[name].to_numpy()
            edges = np.histogram_bin_edges(values[np.isfinite(values)], bins)
            for label, who in NAMES.items():
                own = values[(true == label) & np.isfinite(values)]
                ax.hist(
                    own,
                    edges,
                    weights=np.full(len(own), 1 / max(len(own), 1)),
                    alpha=0.5,
                    color=COLOURS[who],
                    label=who,
                )
            ax.set(xlabel=STEP_NAMES[name], title=backbone)
        row[0].set(ylabel="share of the videos")
    axes[0, 0].legend(fontsize=8)
    fig.tight_layout()
    return fig


def draw_stages(ax: Axes, table: pd.DataFrame) -> None:
    """AUC with its interval for every row of `unmask.unsupervised_judging.judge_stages`; bars: shuffled truth."""
    place = np.arange(len(table))
    ax.barh(
        place, table["shuffled_high"] - table["shuffled_low"], left=table["shuffled_low"], height=0.7, alpha=0.35,
        color=COLOURS["control"], label="shuffled truth",
    )  # fmt: skip
    error = np.abs(table[["low", "high"]].to_numpy().T - table["auc"].to_numpy())
    colours = [COLOURS["control" if stage.startswith("control") else "fake"] for stage in table["stage"]]
    for i, auc in enumerate(table["auc"]):
        ax.errorbar(auc, place[i], xerr=error[:, [i]], fmt="o", color=colours[i])
    ax.axvline(0.5, color=COLOURS["control"], linestyle="--")
    ax.set(xlabel="AUC", xlim=(0, 1.02), yticks=place, yticklabels=table["stage"])
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.legend(fontsize=8, loc="lower left")


def draw_verdicts(verdicts: pd.DataFrame, names: Sequence[str]) -> Figure:
    """The middle frame of every row of `unmask.authentication.authenticate`, titled with its name and verdict."""
    fig, axes = plt.subplots(1, len(verdicts), figsize=(2.6 * len(verdicts), 3.2), squeeze=False)
    for ax, row, name in zip(axes[0], verdicts.to_dict("records"), names, strict=True):
        try:
            frames = read_frames(row["path"], 3, max_side=320).frames
            ax.imshow(frames[len(frames) // 2])
        except MediaError:  # its row says why there is nothing to see
            pass
        ax.axis("off")
        failed = row["status"] != "ok"
        said = textwrap.fill(str(row["reason"]), 30) if failed else f"{row['verdict']}, P(fake) {row['score']:.2f}"
        ax.set_title(f"{name}\n{said}", fontsize=9, color=COLOURS["control"] if failed else "black")
    fig.tight_layout()
    return fig
