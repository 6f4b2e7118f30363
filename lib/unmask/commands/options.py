"""What the commands share: how one is declared, options that several of them take, and the values of options."""

import argparse
from collections.abc import Callable

from unmask.profile import Profile, load_profile, parse_changes


def command(
    commands: argparse._SubParsersAction,
    function: Callable[[argparse.Namespace], int],
    about: str,
    example: str,
    settings: bool = True,
) -> argparse.ArgumentParser:
    """The parser of a new command, which is named as its function; with `settings` it takes --profile and --set."""
    text = f"example:\n  {example}"
    sub = commands.add_parser(function.__name__, help=about, description=about, epilog=text)
    sub.set_defaults(run=function)
    if settings:
        sub.add_argument("--profile", default="demo", help="whose settings: a name in profiles/ or a file")
        sub.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE",
            help="change a key of the profile, such as train.epochs=2; may be given several times",
        )  # fmt: skip
    return sub


def profile_of(options: argparse.Namespace) -> Profile:
    """The profile that --profile and --set ask for; ProfileError for what it does not have."""
    return load_profile(options.profile, parse_changes(options.set))


def shard_option(sub: argparse.ArgumentParser) -> None:
    """--shard I/N; None, which means everything, without it."""
    sub.add_argument(
        "--shard", type=_shard, metavar="I/N",
        help="do every N-th item from the I-th on; the last shard to end joins all (default: everything)",
    )  # fmt: skip


def workers_option(sub: argparse.ArgumentParser) -> None:
    """--workers of a command that takes a profile, whose number is the default."""
    sub.add_argument("--workers", type=positive, help="processes (default: the profile's)")


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse's `type`."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and int(number) < int(of)):
        raise argparse.ArgumentTypeError("a shard is I/N with I from 0 to N-1, such as 0/4")
    return int(number), int(of)
