"""Pictures of a finding (`unmask.explain.Finding`): scores over time, what each detector says, where it looks."""

import math

import matplotlib.pyplot as plt
import numpy as np
import plotly.graph_objects as go
import seaborn as sns
from matplotlib.figure import Figure
from scipy.special import expit

from unmask.d2st_figures import draw_points
from unmask.explain import Finding, Region
from unmask.figures import COLOURS
from unmask.verdicts import LIMITS, RANGE

P_FAKE = "P(fake), calibrated"
MOST_FRAMES = 4  # of a clip, side by side


def palette(finding: Finding) -> dict[str, str]:
    """A colour for each detector."""
    names = [voice.name for voice in finding.voices]
    return dict(zip(names, sns.color_palette("colorblind", len(names)).as_hex(), strict=True))


def _steps(table) -> tuple[list, list]:
    """Line through scores over time, where a clip's window is level from its start to its end."""
    x, y = [], []
    for row in table.itertuples():
        level = row.end > row.start
        x += [row.start, row.end, None] if level else [row.start]
        y += [row.probability, row.probability, None] if level else [row.probability]
    return x, y


def timeline(finding: Finding) -> go.Figure:
    """Scores over time, to point at (plotly): a point for a frame, a level line for a clip; hover tells the numbers."""
    fig, colours = go.Figure(), palette(finding)
    band = _undecided()
    fig.add_hrect(*band, fillcolor=COLOURS["control"], opacity=0.15, line_width=0)
    for name, table in finding.scores.items():
        x, y = _steps(table)
        told = [v for v in finding.voices if v.name == name and v.silent]
        fig.add_scatter(
            x=x, y=y, name=name + (" (no vote)" if told else ""), mode="lines+markers",
            line={"color": colours[name], "dash": "dot" if told else "solid"},
            hovertemplate="%{x:.2f} s: P(fake) %{y:.2f}<extra>" + name + "</extra>",
        )  # fmt: skip
    if not math.isnan(finding.verdict.probability):
        fig.add_hline(finding.verdict.probability, line_dash="dash", annotation_text="all with a vote")
    fig.update_layout(
        xaxis_title="seconds", yaxis_title=P_FAKE, yaxis_range=[-0.02, 1.02], template="plotly_white", height=380,
        margin={"t": 30, "b": 50, "l": 60, "r": 20}, legend={"orientation": "h", "y": -0.25},
    )  # fmt: skip
    return fig


def _undecided() -> tuple[float, float]:
    odds = LIMITS["odds"].value
    return 1 / (1 + odds), odds / (1 + odds)


def timeline_still(finding: Finding) -> Figure:
    """`timeline` as a matplotlib figure, for pages and print."""
    fig, ax = plt.subplots(figsize=(6, 3))
    ax.axhspan(*_undecided(), color=COLOURS["control"], alpha=0.15, linewidth=0)
    colours = palette(finding)
    for name, table in finding.scores.items():
        silent = any(v.silent for v in finding.voices if v.name == name)
        x, y = (np.array([math.nan if v is None else v for v in values], float) for values in _steps(table))
        label = name + (" (no vote)" if silent else "")
        ax.plot(x, y, ":" if silent else "-", marker="o", markersize=4, color=colours[name], label=label)
    if not math.isnan(finding.verdict.probability):
        ax.axhline(finding.verdict.probability, color="0.2", linestyle="--", linewidth=1, label="all with a vote")
    ax.set(xlabel="seconds", ylabel=P_FAKE, ylim=(-0.02, 1.02))
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def votes(finding: Finding) -> Figure:
    """What every detector says, calibrated, with its 95 % range, above the panel's P(fake) with its own."""
    said = [v for v in finding.voices if not math.isnan(v.log_odds)]
    fig, ax = plt.subplots(figsize=(6, 0.4 * len(said) + 1.3))
    ax.axvspan(*_undecided(), color=COLOURS["control"], alpha=0.15, linewidth=0)
    ax.axvline(0.5, color=COLOURS["control"], linestyle="--", linewidth=1)
    for voice in said:
        low, high = (expit(voice.log_odds + side * RANGE * voice.error) for side in (-1, 1))
        colour = COLOURS["control"] if voice.silent else COLOURS["fake" if voice.log_odds > 0 else "real"]
        label = voice.name + (" (no vote)" if voice.silent else "")
        ax.plot([low, high], [label] * 2, color=colour, linewidth=2)
        ax.plot(voice.probability, label, "x" if voice.silent else "o", color=colour)
    own = finding.verdict
    if own.votes:
        ax.plot([own.low, own.high], ["together"] * 2, color="0.2", linewidth=3)
        ax.plot(own.probability, "together", "D", color="0.2")
    ax.invert_yaxis()
    ax.set(xlabel=P_FAKE, xlim=(-0.02, 1.02))
    return fig


def regions(finding: Finding) -> Figure | None:
    """Where each detector looks; None if none can tell. Red speaks for fake, blue for real, each map on its own scale;
    circles and squares are points that a D2ST reads, in space and in time."""
    shown = finding.regions
    if not shown:
        return None
    columns = max(min(len(region.frames), MOST_FRAMES) for region in shown)
    fig, grid = plt.subplots(
        len(shown), columns, figsize=(2.1 * columns, 2.35 * len(shown)), squeeze=False, layout="constrained"
    )
    for axes, region in zip(grid, shown, strict=True):
        for ax in axes:
            ax.axis("off")
        _draw_region(axes[: min(len(region.frames), MOST_FRAMES)], region)
    return fig


def _draw_region(axes, region: Region) -> None:
    chosen = np.linspace(0, len(region.frames) - 1, len(axes)).round().astype(int)
    if region.look is not None:
        draw_points(axes, region.frames, region.look)
    else:
        size = region.frames.shape[1]
        most = max(float(np.abs(region.map).max()), 1e-9)
        for ax, t in zip(axes, chosen, strict=True):
            ax.imshow(region.frames[t])
            ax.imshow(
                region.map, cmap="RdBu_r", vmin=-most, vmax=most, alpha=0.45, interpolation="bilinear",
                extent=(-0.5, size - 0.5, size - 0.5, -0.5),
            )  # fmt: skip
    for ax, t in zip(axes, chosen, strict=True):
        ax.set_title(f"{region.times[t]:.2f} s", fontsize=8)
    scale = "" if region.map is None else f", up to {np.abs(region.map).max():.2f}"
    axes[0].set_title("")
    axes[0].set_title(f"{region.detector}{scale}\n{region.times[chosen[0]]:.2f} s", fontsize=8, loc="left")
