"""The command line: `unmask COMMAND`; `unmask --help` lists the commands."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from unmask import cli_help, plugins
from unmask.machine import advice
from unmask.profile import Profile, ProfileError, load_profile, parse_changes

# What `unmask train` takes; kept here too, so that the parser needs no PyTorch.
VARIANTS = ("convnext", "convnext-fusion", "convnext-frequency", "residual")
HEADS = ("mean", "gru", "transformer")
CLIPS = ("ufd", "clip-nn", "lntune", "coop", "cocoop", "clip-adapter", "clip-finetune")
ADAPTED = ("d2st", "st-adapter")
MOST_ROWS = 1000  # of scores that are shown; the file has all
LARE = "clip-lare:"  # and a cell of the fusion matrix, F0 to F5c, alone or followed by -text


def _profile(options: argparse.Namespace) -> Profile:
    return load_profile(options.profile, parse_changes(options.set))


def doctor(options: argparse.Namespace) -> int:
    from unmask.doctor import main

    return main(options.profile)


def fetch(options: argparse.Namespace) -> int:
    from unmask import downloads
    from unmask.profile import models_folder

    if options.name:
        print(downloads.fetch(options.name))
        return 0
    for name, entry in downloads.CATALOGUE.items():
        place = "here" if (models_folder() / entry.file).is_file() else "not here"
        print(f"{name:<18} {entry.about}: {entry.file}, {place}")
    print(f"They go to {models_folder()}.")
    return 0


def world(options: argparse.Namespace) -> int:
    from unmask.data.layouts import write_layout
    from unmask.data.manifest import summary
    from unmask.data.world import generate

    profile = _profile(options)
    df = generate(options.out, dict(profile.world), options.seed, options.workers or profile.workers)
    print(summary(df).to_string())
    if options.layout:
        folder = Path(options.out) / options.layout
        for note in write_layout(Path(options.out) / "manifest.parquet", folder, options.layout):
            print(note)
        print(f"Also written in the {options.layout} layout: {folder}")
    return 0


def index(options: argparse.Namespace) -> int:
    from unmask.data.datasets import index
    from unmask.data.manifest import leakage, summary, write_manifest

    given = dict(text.partition("=")[::2] for text in options.option)
    df, notes = index(options.root, options.layout, options.seed, **given)
    write_manifest(df, options.out)
    print(summary(df).to_string(), *notes, sep="\n")
    overlap = leakage(df)
    print(f"{len(overlap)} groups in more than one split; manifest: {options.out}")
    return 0


def preprocess(options: argparse.Namespace) -> int:
    from unmask.preprocessing import failures, preprocess

    profile = _profile(options)
    settings = dict(profile.preprocess) | ({"locator": options.locator} if options.locator else {})
    items = preprocess(
        options.manifest, options.out, shard=options.shard, workers=options.workers or profile.workers, **settings
    )
    failed = int((items["status"] == "failed").sum())
    print(f"{len(items)} items, {failed} failed, {int(items['faces'].sum())} crops in {options.out}")
    if failed:
        print(failures(items).to_string(index=False))
    return 0


def cluster(options: argparse.Namespace) -> int:
    from unmask.camera_clustering import cluster_files, settings_of

    profile = _profile(options)
    settings = settings_of(profile, {"frames": options.frames, "crop": options.crop})
    method = options.method or profile.cameras.method
    workers = options.workers or profile.workers
    rows = cluster_files(options.media, options.out, settings, options.crops, method, workers, options.fingerprints)
    known = rows.loc[rows["cluster"] >= 0, "cluster"]
    failed = int((rows["status"] == "failed").sum())
    print(
        f"{len(rows)} media: {known.nunique()} cameras, {len(rows) - len(known) - failed} unattributed, {failed} failed"
    )
    print(f"{options.out}; why and how: {options.out.removesuffix('.csv')}.json")
    return 0


def fingerprints(options: argparse.Namespace) -> int:
    from unmask.camera_clustering import fingerprint_files, settings_of

    profile = _profile(options)
    settings = settings_of(profile, {"frames": options.frames, "crop": options.crop})
    workers = options.workers or profile.workers
    rows = fingerprint_files(options.media, options.out, settings, options.crops, workers, options.shard)
    print(f"{len(rows)} media, {int((rows['status'] == 'failed').sum())} failed: {options.out}")
    return 0


def unsupervised(options: argparse.Namespace) -> int:
    from unmask.authentication import authenticate
    from unmask.unsupervised import run_stage

    workers = {"workers": options.workers} if options.workers else {}
    profile = load_profile(options.profile, parse_changes(options.set) | workers)
    needed = {1: ["manifest", "crops"], 2: ["crops"], 3: ["crops"], 4: ["media", "scores"]}[options.stage]
    missing = [f"--{name}" for name in needed if not getattr(options, name)]
    if missing:
        raise ProfileError(f"Stage {options.stage} needs {' and '.join(missing)}.")
    if options.stage < 4:
        print(run_stage(options.stage, profile, options.out, options.crops, options.manifest, options.seed))
        return 0
    table = authenticate(
        options.media, options.out, options.scores, profile, options.seed, options.locator, profile.workers
    )
    print(table.to_string(index=False))
    return 0


def train(options: argparse.Namespace) -> int:
    profile = _profile(options)
    given = options.detector, profile, options.manifest, options.crops, options.out, options.seed
    fused = options.detector.startswith(LARE)
    if options.backbone and options.detector not in HEADS:
        raise ProfileError(f"--backbone is for {', '.join(HEADS)}; a CLIP is chosen by --set clip.backbone=NAME.")
    if options.lare and not fused:
        raise ProfileError(f"--lare is for {LARE}KIND.")
    if (options.stage or options.init) and options.detector not in ADAPTED:
        raise ProfileError(f"--stage and --init are for {' and '.join(ADAPTED)}.")
    if options.detector in ADAPTED:
        from unmask.d2st_training import Faces, Run, train

        if not options.stage:
            raise ProfileError(f"{options.detector} is trained in stages: name one by --stage 1, 2 or 3.")
        faces = Faces(options.manifest, options.crops, options.features or Path(options.crops) / "clip-features")
        out = train(Run(options.detector, options.stage, profile, faces, options.seed, options.init), options.out)
    elif options.detector in HEADS:
        from unmask.temporal import train_head

        if not options.backbone:
            raise ProfileError(f"{options.detector} is a head over clips: name the detector below it by --backbone.")
        out = train_head(*given, options.backbone, options.features, workers=profile.workers)
    elif options.detector in CLIPS or fused:
        from unmask.clip_training import Faces, train

        features = options.features or Path(options.crops) / "clip-features"
        faces = Faces(options.manifest, options.crops, features, options.lare)
        out = train(options.detector, profile, faces, options.out, options.seed)
    else:
        from unmask.training import train_detector

        if options.features:
            raise ProfileError(f"--features is for {', '.join((*HEADS, *CLIPS, *ADAPTED))} and {LARE}KIND.")
        out = train_detector(*given)
    print(f"Checkpoint: {out}")
    return 0


def score(options: argparse.Namespace) -> int:
    if options.explain:
        return _explained(options)
    from unmask.scoring import score_media

    if len(options.checkpoint) != 1 or options.panel:
        raise ProfileError("Without --explain, give one --checkpoint and no --panel.")
    given = options.media, options.checkpoint[0], options.out, options.locator, options.workers or 1
    table = score_media(*given, model=options.model, shard=options.shard)
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
    if options.shard != (0, 1):
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
                "one; or name your own by --panel FILE or --checkpoint CKPT."
            )
        judges = panel.read(options.panel or own)
    table = explain(options.media, judges, options.out, options.locator, options.workers or 1)
    print(table[["path", "verdict", "probability", "low", "high", "reasons"]].to_string(index=False))
    counts = ", ".join(f"{count} {verdict}" for verdict, count in table["verdict"].value_counts().items())
    print(f"{len(table)} media: {counts}. Pages: {Path(options.out) / 'index.html'}. A verdict is no proof.")
    return 0


def panel(options: argparse.Namespace) -> int:
    from unmask.data.crops import read_index
    from unmask.panel import fit, score_validation

    members = score_validation(options.checkpoints, options.manifest, options.crops)
    locators = {name for folder in options.crops for name in read_index(folder)["locator"].unique()}
    made = fit(members, options.out, locators=locators, **_profile(options).evaluate)
    for one in made.members:
        auc = f"AUC {one.auc:.3f} ({one.low:.3f} to {one.high:.3f})"
        media = f"{one.n_real} real and {one.n_fake} fake validation media"
        print(f"{one.name}: {auc} on {media}; {one.why_silent or 'has a vote'}")
    print(f"Panel: {options.out}")
    return 0


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


def lare(options: argparse.Namespace) -> int:
    from unmask.lare import extract, named
    from unmask.preprocessing import failures

    decoding = {key: _profile(options).preprocess[key] for key in ("frames", "sampling", "fps", "deadline")}
    settings = named(options.settings, options.model)
    index = extract(options.manifest, options.out, settings, options.crops, batch=options.batch, **decoding)
    failed = int((index["status"] == "failed").sum())
    print(f"{len(index) - failed} maps of {index['item_id'].nunique()} items, {failed} failures: {options.out}")
    if failed:
        print(failures(index).rename(columns={"items": "rows"}).to_string(index=False))
    return 0


def evaluate(options: argparse.Namespace) -> int:
    from unmask.evaluation import evaluate_files

    profile = _profile(options)
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


def completion(options: argparse.Namespace) -> int:
    kinds = [f"{LARE}{kind}" for kind in ("F0", "F1", "F2c", "F2s", "F3c", "F3s", "F4c", "F5a", "F5b", "F5c")]
    print(cli_help.completion_script(build_parser(), options.shell, [*VARIANTS, *HEADS, *CLIPS, *ADAPTED, *kinds]))
    return 0


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and int(number) < int(of)):
        raise argparse.ArgumentTypeError("a shard is I/N with I from 0 to N-1, such as 0/4")
    return int(number), int(of)


def _detector(text: str) -> str:
    known = (*VARIANTS, *HEADS, *CLIPS, *ADAPTED)
    # Files of your own are read by the training, which says what they have; the parser needs no PyTorch.
    if text not in known and not text.startswith(LARE) and plugins.VARIABLE not in os.environ:
        raise argparse.ArgumentTypeError(
            f"there is no detector {text!r}{cli_help.nearest(text, known)}; known are {', '.join(known)}, {LARE}KIND, "
            f"and those of your own whose file {plugins.VARIABLE} names"
        )
    return text


def _key_value(text: str) -> str:
    if not text.partition("=")[0].isidentifier() or "=" not in text:
        raise argparse.ArgumentTypeError(f"an option of a layout is KEY=VALUE, such as compression=c40, not {text!r}")
    return text


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


def _shard_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N",
        help="do every N-th item from the I-th on; the last shard to end joins all (default: everything)",
    )  # fmt: skip


def _export_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", metavar="CKPT_DIR", help="the folder that `unmask train` left")
    sub.add_argument(
        "--format", required=True, choices=["pt2", "onnx", "torchscript"], help="`unmask score` reads onnx"
    )
    sub.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    sub.add_argument("--frames", type=_positive, help="frames of a clip (default: the detector's)")
    sub.add_argument("--verify", action="store_true", help="compare with the checkpoint; exit code 1 if not close")
    sub.add_argument("--clips", metavar="DIR", help="for --verify: crops of `unmask preprocess` to compare on as well")


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = cli_help.Parser(prog="unmask", description="A reproducible study kit for deepfake detection.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", help=argparse.SUPPRESS)

    def command(function, help_text: str, settings: bool = True) -> argparse.ArgumentParser:
        name = function.__name__
        example = f"example:\n  {cli_help.EXAMPLES[name]}" if name in cli_help.EXAMPLES else None
        sub = commands.add_parser(name, help=help_text, description=help_text, epilog=example)
        sub.set_defaults(run=function)
        if settings:
            sub.add_argument("--profile", default="demo", help="whose settings: a name in profiles/ or a file")
            sub.add_argument(
                "--set", action="append", default=[], metavar="KEY=VALUE",
                help="change a key of the profile, such as train.epochs=2; may be given several times",
            )  # fmt: skip
        return sub

    sub = command(doctor, "Say what is installed and what is missing, with the command that mends it.", settings=False)
    sub.add_argument("--profile", default="demo", help="whose needs: a name in profiles/ or a file")
    sub = command(completion, "Print the completion script of a shell.", settings=False)
    sub.add_argument("shell", choices=["bash", "zsh", "fish"], metavar="SHELL", help="bash, zsh or fish")
    sub = command(
        fetch, "Download published weights, checked against their sha256; without a name, list them.", settings=False
    )
    sub.add_argument("name", metavar="NAME", nargs="?", help="such as yunet or clip-vit-l-14")
    sub = command(world, "Generate the synthetic world.")
    sub.add_argument("out", metavar="OUT", help="the folder; what an interrupted run left there is gone on with")
    sub.add_argument("--seed", type=int, default=0, help="another seed is another world")
    sub.add_argument("--workers", type=_positive, help="processes (default: the profile's)")
    sub.add_argument(
        "--layout",
        choices=["ffpp", "celebdf2", "dfdc", "df40"],
        help="also write it under a data set's official names, in OUT/LAYOUT",
    )
    sub = command(index, "Make a manifest of a data set.", settings=False)
    sub.add_argument("root", metavar="ROOT", help="the data set's folder, which is only read")
    sub.add_argument(
        "--layout",
        required=True,
        help="folder (your own media), ffpp, dfd, celebdf1, celebdf2, uadfv, dfdc, dfdc-preview, deeperforensics, "
        "ffiw, df40, world; docs/datasets has a page on each",
    )
    sub.add_argument("--out", required=True, metavar="MANIFEST", help="the table to write (Parquet)")
    sub.add_argument("--seed", type=int, default=0, help="of the split, where the data set has none")
    sub.add_argument(
        "--option", action="append", default=[], type=_key_value, metavar="KEY=VALUE",
        help="of the layout: compression=raw|c23|c40 (ffpp, dfd, deeperforensics), ffpp_root=DIR (deeperforensics)",
    )  # fmt: skip
    sub = command(preprocess, "Decode, find faces, cut crops; one row per item, failures too.")
    sub.add_argument("manifest", metavar="MANIFEST", help="the table that `unmask index` or `unmask world` left")
    sub.add_argument("out", metavar="OUT", help="the folder of the crops; what is there already is not done again")
    sub.add_argument(
        "--locator", choices=["annotations", "yunet", "uniface", "haar"],
        help="what finds the faces: annotations (of the world), yunet, uniface or haar (default: the profile's)",
    )  # fmt: skip
    _shard_option(sub)
    sub.add_argument("--workers", type=_positive, help="processes (default: the profile's)")
    sub = command(
        cluster, "Group pictures and videos by the camera that took them; how many cameras need not be known."
    )
    sub.add_argument("media", metavar="MANIFEST_OR_FOLDER", help="what to group")
    sub.add_argument("--out", required=True, metavar="CLUSTERS.csv", help="path,cluster; -1 is unattributed")
    sub.add_argument("--crop", type=_positive, help="pixels of the frame's centre (default: the profile's)")
    sub.add_argument("--frames", type=_positive, help="frames per video (default: the profile's)")
    sub.add_argument(
        "--method", choices=["linkage", "spectral", "consensus"], help="of clustering (default: the profile's)"
    )
    sub.add_argument("--crops", metavar="DIR", help="the folder that `unmask preprocess` filled, to leave faces out")
    sub.add_argument(
        "--fingerprints", metavar="DIR", help="the folder that `unmask fingerprints` filled: nothing is decoded again"
    )
    sub.add_argument("--workers", type=_positive, help="processes (default: the profile's)")
    sub = command(
        fingerprints, "Take the camera fingerprints of media for `unmask cluster`, by several jobs if need be."
    )
    sub.add_argument("media", metavar="MANIFEST_OR_FOLDER", help="whose fingerprints are taken")
    sub.add_argument("out", metavar="OUT", help="the folder they go to; what is there already is not done again")
    sub.add_argument("--crop", type=_positive, help="pixels of the frame's centre (default: the profile's)")
    sub.add_argument("--frames", type=_positive, help="frames per video (default: the profile's)")
    sub.add_argument("--crops", metavar="DIR", help="the folder that `unmask preprocess` filled, to leave faces out")
    _shard_option(sub)
    sub.add_argument("--workers", type=_positive, help="processes (default: the profile's)")
    sub = command(unsupervised, "Detection without labels, stage by stage; the stages share the folder --out.")
    sub.add_argument(
        "--stage", type=int, required=True, choices=[1, 2, 3, 4],
        help="1 pseudo-labels, 2 contrastive learning, 3 classifier, 4 judge media",
    )  # fmt: skip
    sub.add_argument("--out", required=True, metavar="DIR", help="where the stages leave what the next one needs")
    sub.add_argument("--manifest", help="stage 1: the media, whose labels are not read")
    sub.add_argument("--crops", metavar="DIR", help="stages 1 to 3: the folder that `unmask preprocess` filled")
    sub.add_argument("--media", nargs="+", metavar="MEDIA", help="stage 4: files or folders")
    sub.add_argument("--scores", metavar="VERDICTS.csv", help="stage 4: the table to write")
    sub.add_argument(
        "--locator", choices=["yunet", "uniface", "haar"],
        help="stage 4: what finds the faces (default: yunet if its weights are here, else haar)",
    )  # fmt: skip
    sub.add_argument("--seed", type=int, default=0, help="of the trainings")
    sub.add_argument("--workers", type=_positive, help="processes (default: the profile's)")
    sub = command(train, "Train a detector.")
    sub.add_argument(
        "detector", type=_detector, metavar="DETECTOR",
        help=f"on real faces and their self-blends: {', '.join((*VARIANTS, *HEADS))}; on labelled faces, over a CLIP: "
        f"{', '.join(CLIPS)} and {LARE}KIND, KIND being F0 to F5c, alone or with -text; in stages, adapters in a CLIP: "
        f"{', '.join(ADAPTED)}",
    )  # fmt: skip
    sub.add_argument(
        "--backbone", metavar="CKPT_DIR", help=f"for {', '.join(HEADS)}: the detector of single frames, which stays"
    )
    sub.add_argument("--features", metavar="DIR", help="where its features are kept (default: beside the crops)")
    sub.add_argument("--stage", type=int, choices=(1, 2, 3), help=f"for {', '.join(ADAPTED)}: images, clips, both")
    sub.add_argument("--init", metavar="CKPT_DIR", help="for stages 2 and 3: the checkpoint of the stage before")
    sub.add_argument("--lare", metavar="DIR", help=f"for {LARE}KIND: the folder that `unmask lare --crops` filled")
    sub.add_argument("--manifest", required=True, help="the media; their train and validation splits are used")
    sub.add_argument("--crops", required=True, metavar="DIR", help="the folder that `unmask preprocess` filled")
    sub.add_argument("--out", required=True, metavar="CKPT_DIR", help="the checkpoint; an interrupted training goes on")
    sub.add_argument("--seed", type=int, default=0, help="of the training")
    sub = command(score, "Score videos, images or folders with a checkpoint.", settings=False)
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
    _shard_option(sub)
    sub.add_argument("--workers", type=_positive, help="processes (default 1)")
    sub = command(panel, "Calibrate detectors on validation media, to judge together (`unmask score --explain`).")
    sub.add_argument("checkpoints", nargs="+", metavar="CKPT_DIR", help="folders that `unmask train` left")
    sub.add_argument("--manifest", required=True, help="its validation split calibrates")
    sub.add_argument("--crops", required=True, nargs="+", metavar="DIR", help="crops as each checkpoint asks for")
    sub.add_argument("--out", required=True, metavar="PANEL.json", help="the file to write")
    _export_options(command(export, "Write a detector into one file that runs without the kit.", settings=False))
    sub = command(lare, "Make maps of the latent reconstruction error (LaRE) of a Stable Diffusion.")
    sub.add_argument("manifest", metavar="MANIFEST", help="the media, or those of --crops")
    sub.add_argument(
        "--settings", required=True, metavar="NAME", help="sd15-t200-e4-256, sd21-t280-e8-512, demo-t200-e4-128"
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="where the maps and their index go")
    sub.add_argument("--crops", metavar="DIR", help="of the crops that `unmask preprocess` left, not of whole frames")
    sub.add_argument("--model", metavar="DIR", help="a folder with the diffusion model, instead of the settings' own")
    sub.add_argument("--batch", type=_positive, default=8, help="pictures at a time")
    sub = command(evaluate, "Make the result table from scores and a manifest.")
    sub.add_argument("scores", metavar="SCORES", help="score table (Parquet), or the CSV that `unmask score` wrote")
    sub.add_argument("manifest", metavar="MANIFEST", help="of the same media: their labels, splits and groups")
    sub.add_argument("--out", required=True, metavar="TABLE.csv", help="the table to write")
    sub = command(table, "Make a table of chapter 10 anew from what the chapters of a study left.", settings=False)
    sub.add_argument("name", metavar="NAME", help="ablation_unsupervised, ablation_sbi, ...; an unknown one lists all")
    sub.add_argument("--profile", default="demo", help="of the study, or its data/work/RUN/profile.yaml")
    parser.usage, parser.epilog = "unmask [-h] COMMAND ...", cli_help.overview(commands)
    return parser


def _expected_errors() -> tuple[type[Exception], ...]:
    """What a user can mend; shown as one line instead of a traceback."""
    errors: list[type[Exception]] = [ProfileError, OSError]
    for module, name in {
        "unmask.data.manifest": "ManifestError", "unmask.data.faces": "LocatorError", "unmask.data.crops": "CropError",
        "unmask.training": "TrainingError", "unmask.detectors.base": "CheckpointError",
        "unmask.evaluation": "ScoreError", "unmask.fingerprints": "FingerprintError", "unmask.lare": "LareError",
        "unmask.export": "ExportError", "unmask.panel": "PanelError", "unmask.downloads": "DownloadError",
        "unmask.detectors.clip_backbone": "BackboneError", "unmask.data.journals": "ShareError",
    }.items():  # fmt: skip
        if module in sys.modules:  # an error can only come from a module that was imported
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `unmask`. Exit code 0 done, 1 something is missing, 2 wrong input with one line that says what."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except Exception as error:
        if isinstance(error, _expected_errors()):
            print(f"unmask: {error}", file=sys.stderr)
            return 2
        if what := advice(type(error).__name__, str(error)):
            print(f"unmask: {what}", file=sys.stderr)
            return 2
        raise


if __name__ == "__main__":
    sys.exit(main())
