"""The commands that bring media into the kit: the synthetic world, manifests of data sets, crops of faces."""

import argparse
from pathlib import Path

from unmask.commands.options import command, profile_of, shard_option, workers_option


def world(options: argparse.Namespace) -> int:
    from unmask.data.layouts import write_layout
    from unmask.data.manifest import summary
    from unmask.data.world import generate

    profile = profile_of(options)
    df = generate(options.out, dict(profile.world), options.seed, options.workers or profile.workers)
    print(summary(df).to_string())
    if options.layout:
        folder = Path(options.out) / options.layout
        for note in write_layout(Path(options.out) / "manifest.parquet", folder, options.layout):
            print(note)
        print(f"Also written in the {options.layout} layout: {folder}")
    return 0


def index(options: argparse.Namespace) -> int:
    from unmask.data.datasets import adapter_of, index
    from unmask.data.manifest import leakage, summary, write_manifest

    given = dict(text.partition("=")[::2] for text in options.option)
    adapter_of(options.layout, given)  # here, where no KEY can be taken for an argument of `index`
    df, notes = index(options.root, options.layout, options.seed, **given)
    write_manifest(df, options.out)
    print(summary(df).to_string(), *notes, sep="\n")
    overlap = leakage(df)
    print(f"{len(overlap)} groups in more than one split; manifest: {options.out}")
    return 0


def preprocess(options: argparse.Namespace) -> int:
    from unmask.preprocessing import failures, preprocess

    profile = profile_of(options)
    settings = dict(profile.preprocess) | ({"locator": options.locator} if options.locator else {})
    items = preprocess(
        options.manifest, options.out, shard=options.shard, workers=options.workers or profile.workers, **settings
    )
    failed = int((items["status"] == "failed").sum())
    print(f"{len(items)} items, {failed} failed, {int(items['faces'].sum())} crops in {options.out}")
    if failed:
        print(failures(items).to_string(index=False))
    return 0


def _key_value(text: str) -> str:
    if not text.partition("=")[0].isidentifier() or "=" not in text:
        raise argparse.ArgumentTypeError(f"an option of a layout is KEY=VALUE, such as compression=c40, not {text!r}")
    return text


def declare(commands: argparse._SubParsersAction) -> None:
    """Add the commands of this group."""
    _declare_world(commands)
    _declare_index(commands)
    _declare_preprocess(commands)


def _declare_world(commands: argparse._SubParsersAction) -> None:
    sub = command(
        commands, world, "Generate the synthetic world.",
        "unmask world world --profile tiny --seed 1",
    )  # fmt: skip
    sub.add_argument("out", metavar="OUT", help="the folder; what an interrupted run left there is gone on with")
    sub.add_argument("--seed", type=int, default=0, help="another seed is another world")
    workers_option(sub)
    sub.add_argument(
        "--layout",
        choices=["ffpp", "celebdf2", "dfdc", "df40"],
        help="also write it under a data set's official names, in OUT/LAYOUT",
    )


def _declare_index(commands: argparse._SubParsersAction) -> None:
    sub = command(
        commands, index, "Make a manifest of a data set.",
        "unmask index my_media --layout folder --out manifest.parquet", settings=False,
    )  # fmt: skip
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


def _declare_preprocess(commands: argparse._SubParsersAction) -> None:
    sub = command(
        commands, preprocess, "Decode, find faces, cut crops; one row per item, failures too.",
        "unmask preprocess manifest.parquet crops --locator yunet --set preprocess.frames=16",
    )  # fmt: skip
    sub.add_argument("manifest", metavar="MANIFEST", help="the table that `unmask index` or `unmask world` left")
    sub.add_argument("out", metavar="OUT", help="the folder of the crops; what is there already is not done again")
    sub.add_argument(
        "--locator", choices=["annotations", "yunet", "uniface", "haar"],
        help="what finds the faces: annotations (of the world), yunet, uniface or haar (default: the profile's)",
    )  # fmt: skip
    shard_option(sub)
    workers_option(sub)
