"""Figures of the camera chapter: patterns, the similarity matrix in order, its tree, pairs, and what quality does."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import dendrogram, linkage, to_tree

from unmask.figures import COLOURS

UNKNOWN = (0.9, 0.9, 0.9)  # colour of a camera that nobody knows


def camera_means(patterns: np.ndarray, valid: np.ndarray, labels: np.ndarray, most: int = 6) -> dict[str, np.ndarray]:
    """The mean fingerprint float32[H,W] of the `most` largest clusters, by name with the number of media.

    patterns: float[N,H,W], valid: bool[N,H,W], labels: int[N], numbered by size, -1 in none. Pixels that none of the
    media shows are 0.
    """
    found = {}
    for label in np.unique(labels[labels >= 0])[:most]:
        of = labels == label
        count = valid[of].sum(0)
        mean = (patterns[of] * valid[of]).sum(0, dtype=np.float32) / np.maximum(count, 1)
        found[f"cluster {label}, {of.sum()} media"] = mean
    return found


def draw_patterns(panels: Mapping[str, np.ndarray], window: int = 96) -> Figure:
    """Patterns float[H,W] side by side, the same window of `window` pixels of each: grey is 0, black and white are
    three standard deviations. Pictures uint8[H,W,3] are shown as they are."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3.3 * rows), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, (name, panel) in zip(axes.flat, panels.items(), strict=False):
        # A quarter from the corner: in the middle there is a face, where the background has nothing to show.
        top, left = (max(min(side // 4 - window // 2, side - window), 0) for side in panel.shape[:2])
        cut = panel[top : top + window, left : left + window]
        limit = 3 * float(cut.std()) or 1.0
        ax.imshow(cut, cmap="gray", vmin=-limit, vmax=limit, interpolation="nearest")
        ax.set_title(name, fontsize=10)
    fig.tight_layout()
    return fig


def _camera_colours(cameras: Sequence[str]) -> tuple[np.ndarray, dict[str, tuple]]:
    """Colour float[N,3] of each medium's camera and the legend; unknown cameras ("") are light grey."""
    names = sorted(set(map(str, cameras)) - {""})
    palette = dict(zip(names, sns.color_palette("colorblind" if len(names) <= 10 else "husl", len(names)), strict=True))
    return np.array([palette.get(str(name), UNKNOWN) for name in cameras]).reshape(-1, 3), palette


def _strip(ax: Axes, colours: np.ndarray, palette: Mapping[str, tuple], place: Sequence[float], name: str) -> None:
    """A strip of colours under an axis, with a legend if it stays readable."""
    strip = ax.inset_axes(place)
    strip.imshow(colours[None], aspect="auto", interpolation="nearest")
    strip.set(xticks=[], yticks=[], xlabel=name)
    strip.spines[:].set_visible(False)
    if 0 < len(palette) <= 12:
        for camera, colour in palette.items():
            strip.plot([], [], "s", color=colour, label=camera)
        legend = {"fontsize": 8, "loc": "upper center", "bbox_to_anchor": (0.5, -1.2), "columnspacing": 0.8}
        strip.legend(ncols=6, handletextpad=0.1, **legend)


def draw_matrix(ax: Axes, matrix: np.ndarray, labels: np.ndarray, cameras: Sequence[str] | None = None) -> np.ndarray:
    """The similarity float[N,N] ordered by cluster (labels int[N], -1 last), borders drawn; returns the order int[N].

    Values are clipped where all but one in a hundred lie. The true cameras str[N] are a strip of colours below.
    """
    order = np.lexsort((np.arange(len(labels)), np.where(labels < 0, np.iinfo(int).max, labels)))
    inside = np.abs(matrix[np.triu_indices(len(matrix), 1)])
    limit = float(np.quantile(inside, 0.99)) if inside.size else 0.0
    limit = limit or 1.0
    image = ax.imshow(
        matrix[np.ix_(order, order)], cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest", rasterized=True
    )
    for border in np.flatnonzero(np.diff(labels[order])) + 0.5:
        ax.axhline(border, color="black", linewidth=0.6)
        ax.axvline(border, color="black", linewidth=0.6)
    ax.set(xticks=[], yticks=[], ylabel="media, by cluster; unattributed last")
    ax.grid(False)
    ax.figure.colorbar(image, ax=ax, shrink=0.7, extend="both", label="correlation")
    if cameras is not None:
        colours, palette = _camera_colours([cameras[i] for i in order])
        _strip(ax, colours, palette, (0, -0.05, 1, 0.03), "true camera")
    return order


def draw_tree(ax: Axes, matrix: np.ndarray, cameras: Sequence[str] | None = None, most: int = 100) -> list[list[int]]:
    """Average linkage of 1 - similarity float[N,N], N > 1, the last `most` joins alone; returns the media of each leaf.

    Below, each leaf has the colour of the camera (str[N]) of most of its media.
    """
    distance = np.clip(1 - matrix[np.triu_indices(len(matrix), 1)].astype(np.float64), 0, None)
    tree = linkage(distance, "average")
    drawn = dendrogram(
        tree, p=most, truncate_mode="lastp", ax=ax, no_labels=True, link_color_func=lambda node: COLOURS["control"]
    )
    nodes = to_tree(tree, rd=True)[1]
    members = [nodes[leaf].pre_order() for leaf in drawn["leaves"]]
    ax.set(ylabel="1 - correlation", ylim=(0.98 * min(tree[:, 2].min(), 0.98), None))
    ax.grid(False)
    if cameras is not None:
        leading = [pd.Series([str(cameras[i]) for i in leaf]).mode().iloc[0] for leaf in members]
        colours, palette = _camera_colours(leading)
        _strip(ax, colours, palette, (0, -0.08, 1, 0.06), "true camera")
    return members


def draw_pairs(ax: Axes, pairs: pd.DataFrame, chance: float, bins: int = 80) -> None:
    """Histogram of `unmask.camera_clustering.pairs`, in standard deviations of `chance`, with logarithmic counts."""
    deviations = pairs["ncc"].to_numpy() / max(chance, 1e-12)
    edges = np.linspace(*np.quantile(deviations, [0, 1]), bins + 1) if len(deviations) else bins
    for same, name, colour in ((False, "different cameras", "control"), (True, "one camera", "other")):
        found = deviations[pairs["same"].to_numpy() == same]
        ax.hist(found, edges, color=to_rgb(COLOURS[colour]), alpha=0.6, label=f"{name}, {len(found)} pairs")
    ax.set(xlabel="correlation, standard deviations of chance", ylabel="pairs", yscale="log")
    ax.legend()


def draw_quality(ax: Axes, table: pd.DataFrame) -> None:
    """AUC against CRF, a line for each number of frames, from the table of `unmask.camera_clustering.quality`."""
    shades = sns.color_palette("viridis", table["frames"].nunique())
    for shade, (frames, part) in zip(shades, table.groupby("frames"), strict=True):
        ax.plot(part["crf"], part["auc"], marker="o", color=shade, label=f"{frames} frame{'s' * (frames > 1)}")
    ax.axhline(0.5, color=COLOURS["control"], linestyle="--", label="chance")
    ax.set(xlabel="CRF of H.264 (higher: smaller files)", ylabel="AUC, one camera against others")
    ax.legend(fontsize=8)
