"""Findings as files: a self-contained page and a JSON for each medium, an index, and the table of verdicts."""

import base64
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from unmask import explain_figures
from unmask.explain import Finding
from unmask.figures import shown, style
from unmask.panel import Panel
from unmask.profile import write_atomic, write_json
from unmask.progress import track
from unmask.verdicts import LIMITS

COLUMNS = ["path", "status", "verdict", "probability", "low", "high", "votes", "agreement", "reasons", "page"]
WARNING = (
    "A verdict here is no proof. It says what these detectors, calibrated on their validation media, make "
    "of this file. On forgeries, cameras and codecs that they have not seen they can be wrong and sure of it, and the "
    "probability takes real and fake to be equally likely beforehand."
)
COMBINED = (
    "The probability is the mean of the calibrated log odds of the detectors with a vote: all count alike, no weight "
    "was learned. A vote has who was calibrated and whose AUC on validation media is above chance with its whole "
    "interval. The range (95 %, if the log odds err as a normal distribution does) comes from the finite number of "
    "validation media; that a medium may be unlike them is not in it."
)


def page_name(number: int, path: str) -> str:
    """A file name for the page of the input `number`, safe on every file system: "0003-clip.mp4.html"."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).name).strip("-.")[:60] or "medium"
    return f"{number:04d}-{stem}.html"


def write_pages(
    findings: Sequence[Finding], names: Sequence[str], panel: Panel, out: str | os.PathLike, locator: str
) -> pd.DataFrame:
    """Write index.html, verdicts.csv and verdicts.json, and a page and a JSON per finding; returns the table.

    names: how the inputs are called, in the order of the findings.
    """
    out, rows = Path(out), []
    environment = Environment(loader=PackageLoader("unmask"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    template = environment.get_template("explain.html.j2")
    about = {"warning": WARNING, "combined": COMBINED, "limits": LIMITS, "panel": panel, "locator": locator}
    about["moved"] = bool(panel.locators) and locator not in panel.locators
    style()
    for number, (finding, name) in enumerate(track(list(zip(findings, names, strict=True)), label="pages"), 1):
        page = page_name(number, name)
        document = finding.document() | {"path": name, "page": page}
        rows.append({key: document[key] for key in COLUMNS} | {"reasons": "; ".join(document["reasons"])})
        pictures = _pictures(finding) if finding.status == "ok" else {}
        on_videos = _on_videos(finding, panel)
        html = template.render(finding=finding, name=name, pictures=pictures, on_videos=on_videos, rows=None, **about)
        write_atomic(out / page, html)
        write_json(out / Path(page).with_suffix(".json"), document | _provenance(panel, locator))
    table = pd.DataFrame(rows, columns=COLUMNS)
    write_atomic(out / "index.html", template.render(finding=None, name="", pictures={}, rows=rows, **about))
    write_atomic(out / "verdicts.csv", table.to_csv(index=False, float_format="%.6f"))
    write_json(out / "verdicts.json", _provenance(panel, locator) | {"media": rows})
    return table


def _on_videos(finding: Finding, panel: Panel) -> list[str]:
    """Who has a vote on a picture by a calibration on videos alone."""
    if not finding.facts["picture"]:
        return []
    pairs = zip(finding.voices, panel.members, strict=True)
    return [voice.name for voice, member in pairs if not (voice.silent or member.pictures)]


def _pictures(finding: Finding) -> dict[str, str]:
    """PNGs (base64) by what they show."""
    figures = {"votes": explain_figures.votes(finding), "regions": explain_figures.regions(finding)}
    if finding.scores and not finding.facts["picture"]:
        figures["timeline"] = explain_figures.timeline_still(finding)
    return {name: _png(fig) for name, fig in figures.items() if fig is not None}


def _png(fig: Figure) -> str:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(fig)
    return base64.b64encode(buffer.getvalue()).decode()


def _provenance(panel: Panel, locator: str) -> dict:
    """Who judged, and how."""
    members = [
        {"name": m.name, "sha256": m.sha256, "n_real": m.n_real, "n_fake": m.n_fake,
         "pictures": m.pictures, "frames": m.frames, "auc": m.auc, "low": m.low,
         "high": m.high, "threshold": m.threshold, "calibration": vars(m.calibration) if m.calibration else None,
         "silent": m.why_silent}
        for m in panel.members
    ]  # fmt: skip
    limits = {
        name: {"value": x.value, "stands": x.stands, "about": x.about, "source": x.source} for name, x in LIMITS.items()
    }
    return {
        "warning": WARNING, "combination": COMBINED, "locator": locator, "level": panel.level, "panel": members,
        "limits": limits,
    }  # fmt: skip
