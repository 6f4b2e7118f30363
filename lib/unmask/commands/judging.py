"""The commands that judge: scores and verdicts of media, result tables, and detectors to take elsewhere."""

import argparse
from pathlib import Path

from unmask.commands.options import command, positive, profile_of, shard_option
from unmask.profile import ProfileError, load_profile

MOST_ROWS = 1000  # of scores that are shown; the file has all


def score(options: argparse.Namespace) -> int:
    if options.explain:
        return _explained(options)
    from unmask.scoring import score_media

    if len(options.checkpoint) != 1 or options.panel:
        raise ProfileError("Without --explain, give one --checkpoint and no --panel.")
    given = options.media, options.checkpoint[0], options.out, options.locator, options.workers or 1
    table = score_media(*given, model=options.model, shard=options.shard or (0, 1))
    if len(table) <= MOST_ROWS:
        print(table.to_string(index=False))
    print(f"{int((table['status'] == 'ok').sum())} of {len(table)} scored: {options.out}")
    return 0


def _explained(options: argparse.Namespace) -> int:
    from unmask import panel
    from unmask.explain import explain
    from unmask.profile import ROOT

    if options.model:
        raise ProfileError("--model is for a detector that reads LaRE maps, which --explain does not make.")
    if options.shard:
        raise ProfileError("--shard is for scores; --explain judges all media that it is given in one call.")
    if options.panel and options.checkpoint:
        raise ProfileError("Give --panel or --checkpoint: a panel names its own checkpoints.")
    if options.checkpoint:
        print("These checkpoints are not calibrated, so there will be no verdict; `unmask panel` calibrates them.")
        judges = panel.uncalibrated(options.checkpoint)
    else:
        own = ROOT / "data" / "work" / load_profile(options.profile).run / "panel.json"
        if not (options.panel or own.is_file()):
            raise ProfileError(
                f"No panel of profile {options.profile} is here yet: ./run_all.sh --profile {options.profile} leaves "
                "one. A study of your own media has its own: --panel data/work/RUN/panel.json; or name a --checkpoint."
            )
        judges = panel.read(options.panel or own)
    table = explain(options.media, judges, options.out, options.locator, options.workers or 1)
    print(table[["path", "verdict", "probability", "low", "high", "reasons"]].to_string(index=False))
    counts = ", ".join(f"{count} {verdict}" for verdict, count in table["verdict"].value_counts().items())
    print(f"{len(table)} media: {counts}. Pages: {Path(options.out) / 'index.html'}. A verdict is no proof.")
    return 0


def _declare_score(commands: argparse._SubParsersAction) -> None:
    sub = command(
        commands, score, "Score videos, images or folders with a checkpoint.",
        "unmask score my_media clip.mp4 --checkpoint checkpoint --out scores.csv", settings=False,
    )  # fmt: skip
    sub.add_argument("media", nargs="+", metavar="MEDIA", help="files or folders")
    sub.add_argument(
        "--checkpoint", action="append", default=[], metavar="CKPT",
        help="folder, or file of `unmask export` in ONNX; with --explain folders alone, and as many as you like",
    )  # fmt: skip
    sub.add_argument("--out", required=True, metavar="SCORES.csv", help="with --explain a folder")
    sub.add_argument(
        "--explain", action="store_true", help="verdicts with their reasons: a page for each medium, by a panel"
    )
    sub.add_argument("--panel", metavar="PANEL.json", help="for --explain (default: the one that the study left)")
    sub.add_argument("--profile", default="demo", help="for --explain: whose study's panel")
    sub.add_argument(
        "--locator", choices=["yunet", "uniface", "haar"], help="default: yunet if its weights are here, else haar"
    )
    sub.add_argument("--model", metavar="DIR", help="for a detector that reads LaRE maps: the diffusion model's folder")
    shard_option(sub)
    sub.add_argument("--workers", type=positive, help="processes (default 1)")


def panel(options: argparse.Namespace) -> int:
    from unmask.data.crops import read_index
    from unmask.panel import fit, score_validation

    members = score_validation(options.checkpoints, options.manifest, options.crops)
    locators = {name for folder in options.crops for name in read_index(folder)["locator"].unique()}
    made = fit(members, options.out, locators=locators, **profile_of(options).evaluate)
    for one in made.members:
        auc = f"AUC {one.auc:.3f} ({one.low:.3f} to {one.high:.3f})"
        media = f"{one.n_real} real and {one.n_fake} fake validation media"
        print(f"{one.name}: {auc} on {media}; {one.why_silent or 'has a vote'}")
    print(f"Panel: {options.out}")
    return 0


def _declare_panel(commands: argparse._SubParsersAction) -> None:
    sub = command(
        commands, panel, "Calibrate detectors on validation media, to judge together (`unmask score --explain`).",
        "unmask panel checkpoint --manifest manifest.parquet --crops crops --out panel.json",
    )  # fmt: skip
    sub.add_argument("checkpoints", nargs="+", metavar="CKPT_DIR", help="folders that `unmask train` left")
    sub.add_argument("--manifest", required=True, help="its validation split calibrates")
    sub.add_argument("--crops", required=True, nargs="+", metavar="DIR", help="crops as each checkpoint asks for")
    sub.add_argument("--out", required=True, metavar="PANEL.json", help="the file to write")


def evaluate(options: argparse.Namespace) -> int:
    from unmask.evaluation import evaluate_files

    profile = profile_of(options)
    table = evaluate_files(options.scores, options.manifest, options.out, **profile.evaluate)
    print(table.round(4).to_string(index=False))
    return 0


def table(options: argparse.Namespace) -> int:
    from unmask.ablation import save_table
    from unmask.profile import open_study

    study = open_study(options.profile)
    print(save_table(study, options.name).round(3).to_string(index=False))
    print(f"{study.tables / options.name}.csv, .md, .tex and .json")
    return 0


def _declare_tables(commands: argparse._SubParsersAction) -> None:
    sub = command(
        commands, evaluate, "Make the result table from scores and a manifest.",
        "unmask evaluate scores.csv manifest.parquet --out table.csv",
    )  # fmt: skip
    sub.add_argument("scores", metavar="SCORES", help="score table (Parquet), or the CSV that `unmask score` wrote")
    sub.add_argument("manifest", metavar="MANIFEST", help="of the same media: their labels, splits and groups")
    sub.add_argument("--out", required=True, metavar="TABLE.csv", help="the table to write")
    sub = command(
        commands, table, "Make a table of chapter 10 anew from what the chapters of a study left.",
        "unmask table ablation_sbi --profile tiny", settings=False,
    )  # fmt: skip
    sub.add_argument("name", metavar="NAME", help="ablation_unsupervised, ablation_sbi, ...; an unknown one lists all")
    sub.add_argument("--profile", default="demo", help="of the study, or its data/work/RUN/profile.yaml")


def export(options: argparse.Namespace) -> int:
    from unmask.export import TOLERANCE, export, verify

    if options.clips and not options.verify:
        raise ProfileError("--clips is what --verify compares on; give both.")
    if options.format == "torchscript":
        print("Note: PyTorch deprecates TorchScript and will drop it; --format pt2 is what it keeps.")
    print(f"Exported: {export(options.checkpoint, options.format, options.out, options.frames)}")
    if not options.verify:
        return 0
    table = verify(options.checkpoint, options.out, options.clips, own=True)  # it was written just now
    worst = table["difference"].max(skipna=False)
    close = worst <= TOLERANCE  # not so for what is no number
    print(table.to_string(index=False))
    print(f"Largest difference to the checkpoint: {worst:.2g}, {'within' if close else 'NOT WITHIN'} {TOLERANCE:g}")
    return 0 if close else 1


def _declare_export(commands: argparse._SubParsersAction) -> None:
    sub = command(
        commands, export, "Write a detector into one file that runs without the kit.",
        "unmask export checkpoint --format onnx --out detector.onnx --verify", settings=False,
    )  # fmt: skip
    sub.add_argument("checkpoint", metavar="CKPT_DIR", help="the folder that `unmask train` left")
    sub.add_argument(
        "--format", required=True, choices=["pt2", "onnx", "torchscript"], help="`unmask score` reads onnx"
    )
    sub.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    sub.add_argument("--frames", type=positive, help="frames of a clip (default: the detector's)")
    sub.add_argument("--verify", action="store_true", help="compare with the checkpoint; exit code 1 if not close")
    sub.add_argument("--clips", metavar="DIR", help="for --verify: crops of `unmask preprocess` to compare on as well")


def declare(commands: argparse._SubParsersAction) -> None:
    """Add the commands of this group."""
    _declare_score(commands)
    _declare_panel(commands)
    _declare_tables(commands)
    _declare_export(commands)
