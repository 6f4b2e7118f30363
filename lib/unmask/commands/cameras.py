"""The commands that ask which camera took what."""

import argparse

from unmask.commands.options import command, positive, profile_of, shard_option, workers_option


def cluster(options: argparse.Namespace) -> int:
    from unmask.camera_clustering import cluster_files, settings_of

    profile = profile_of(options)
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

    profile = profile_of(options)
    settings = settings_of(profile, {"frames": options.frames, "crop": options.crop})
    workers = options.workers or profile.workers
    rows = fingerprint_files(options.media, options.out, settings, options.crops, workers, options.shard or (0, 1))
    print(f"{len(rows)} media, {int((rows['status'] == 'failed').sum())} failed: {options.out}")
    return 0


def declare(commands: argparse._SubParsersAction) -> None:
    """Add the commands of this group."""
    sub = command(
        commands, cluster,
        "Group pictures and videos by the camera that took them; how many cameras need not be known.",
        "unmask cluster my_media --out clusters.csv",
    )  # fmt: skip
    sub.add_argument("media", metavar="MANIFEST_OR_FOLDER", help="what to group")
    sub.add_argument("--out", required=True, metavar="CLUSTERS.csv", help="path,cluster; -1 is unattributed")
    _size_options(sub)
    sub.add_argument(
        "--method", choices=["linkage", "spectral", "consensus"], help="of clustering (default: the profile's)"
    )
    _crops_option(sub)
    sub.add_argument(
        "--fingerprints", metavar="DIR", help="the folder that `unmask fingerprints` filled: nothing is decoded again"
    )
    workers_option(sub)
    sub = command(
        commands, fingerprints,
        "Take the camera fingerprints of media for `unmask cluster`, by several jobs if need be.",
        "unmask fingerprints my_media fingerprints --shard 0/16",
    )  # fmt: skip
    sub.add_argument("media", metavar="MANIFEST_OR_FOLDER", help="whose fingerprints are taken")
    sub.add_argument("out", metavar="OUT", help="the folder they go to; what is there already is not done again")
    _size_options(sub)
    _crops_option(sub)
    shard_option(sub)
    workers_option(sub)


def _size_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--crop", type=positive, help="pixels of the frame's centre (default: the profile's)")
    sub.add_argument("--frames", type=positive, help="frames per video (default: the profile's)")


def _crops_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--crops", metavar="DIR", help="the folder that `unmask preprocess` filled, to leave faces out")
