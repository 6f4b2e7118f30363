"""The commands that learn: detectors, LaRE maps for some of them, and detection without labels."""

import argparse
import os
from pathlib import Path

from unmask import plugins
from unmask.cli_help import nearest
from unmask.commands.options import command, positive, profile_of, workers_option
from unmask.profile import ProfileError, load_profile, parse_changes

# What `unmask train` takes; kept here too, so that the parser needs no PyTorch.
VARIANTS = ("convnext", "convnext-fusion", "convnext-frequency", "residual")
HEADS = ("mean", "gru", "transformer")
CLIPS = ("ufd", "clip-nn", "lntune", "coop", "cocoop", "clip-adapter", "clip-finetune")
ADAPTED = ("d2st", "st-adapter")
KNOWN = (*VARIANTS, *HEADS, *CLIPS, *ADAPTED)
LARE = "clip-lare:"  # and a cell of the fusion matrix, F0 to F5c, alone or followed by -text
FUSIONS = tuple(f"{LARE}{kind}" for kind in ("F0", "F1", "F2c", "F2s", "F3c", "F3s", "F4c", "F5a", "F5b", "F5c"))


def _detector(text: str) -> str:
    # Files of your own are read by the training, which says what they have; the parser needs no PyTorch.
    if text not in KNOWN and not text.startswith(LARE) and plugins.VARIABLE not in os.environ:
        raise argparse.ArgumentTypeError(
            f"there is no detector {text!r}{nearest(text, KNOWN)}; known are {', '.join(KNOWN)}, {LARE}KIND, "
            f"and those of your own whose file {plugins.VARIABLE} names"
        )
    return text


def train(options: argparse.Namespace) -> int:
    profile = profile_of(options)
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


def _declare_train(commands: argparse._SubParsersAction) -> None:
    sub = command(
        commands, train, "Train a detector.",
        "unmask train convnext --manifest manifest.parquet --crops crops --out checkpoint --set train.epochs=8",
    )  # fmt: skip
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


def lare(options: argparse.Namespace) -> int:
    from unmask.lare import extract, named
    from unmask.preprocessing import failures

    decoding = {key: profile_of(options).preprocess[key] for key in ("frames", "sampling", "fps", "deadline")}
    settings = named(options.settings, options.model)
    index = extract(options.manifest, options.out, settings, options.crops, batch=options.batch, **decoding)
    failed = int((index["status"] == "failed").sum())
    print(f"{len(index) - failed} maps of {index['item_id'].nunique()} items, {failed} failures: {options.out}")
    if failed:
        print(failures(index).rename(columns={"items": "rows"}).to_string(index=False))
    return 0


def _declare_lare(commands: argparse._SubParsersAction) -> None:
    sub = command(
        commands, lare, "Make maps of the latent reconstruction error (LaRE) of a Stable Diffusion.",
        "unmask lare manifest.parquet --crops crops --settings demo-t200-e4-128 --out maps",
    )  # fmt: skip
    sub.add_argument("manifest", metavar="MANIFEST", help="the media, or those of --crops")
    sub.add_argument(
        "--settings", required=True, metavar="NAME", help="sd15-t200-e4-256, sd21-t280-e8-512, demo-t200-e4-128"
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="where the maps and their index go")
    sub.add_argument("--crops", metavar="DIR", help="of the crops that `unmask preprocess` left, not of whole frames")
    sub.add_argument("--model", metavar="DIR", help="a folder with the diffusion model, instead of the settings' own")
    sub.add_argument("--batch", type=positive, default=8, help="pictures at a time")


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


def _declare_unsupervised(commands: argparse._SubParsersAction) -> None:
    sub = command(
        commands, unsupervised, "Detection without labels, stage by stage; the stages share the folder --out.",
        "unmask unsupervised --stage 1 --manifest manifest.parquet --crops crops --out unsupervised",
    )  # fmt: skip
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
    workers_option(sub)


def declare(commands: argparse._SubParsersAction) -> None:
    """Add the commands of this group."""
    _declare_train(commands)
    _declare_lare(commands)
    _declare_unsupervised(commands)
