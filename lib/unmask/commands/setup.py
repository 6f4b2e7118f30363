"""The commands around the kit itself: what is installed, weights to download, completion in the shell."""

import argparse

from unmask import cli_help
from unmask.commands.options import command
from unmask.commands.training import FUSIONS, KNOWN


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


def completion(options: argparse.Namespace) -> int:
    from unmask.cli import build_parser  # which declares this command

    print(cli_help.completion_script(build_parser(), options.shell, [*KNOWN, *FUSIONS]))
    return 0


def declare(commands: argparse._SubParsersAction) -> None:
    """Add the commands of this group."""
    about = "Say what is installed and what is missing, with the command that mends it."
    sub = command(commands, doctor, about, "unmask doctor --profile paper", settings=False)
    sub.add_argument("--profile", default="demo", help="whose needs: a name in profiles/ or a file")
    about = "Download published weights, checked against their sha256; without a name, list them."
    sub = command(commands, fetch, about, "unmask fetch yunet", settings=False)
    sub.add_argument("name", metavar="NAME", nargs="?", help="such as yunet or clip-vit-l-14")
    example = "unmask completion bash >~/.local/share/bash-completion/completions/unmask"
    sub = command(commands, completion, "Print the completion script of a shell.", example, settings=False)
    sub.add_argument("shell", choices=["bash", "zsh", "fish"], metavar="SHELL", help="bash, zsh or fish")
