"""How the command line speaks: grouped help with examples and defaults, errors of one sentence, shell completion."""

import argparse
import difflib
import itertools
import re
import sys
from collections.abc import Iterable, Sequence

# What a value is, by its placeholder, for completion.
FILES = {
    "MANIFEST", "MEDIA", "MANIFEST_OR_FOLDER", "SCORES", "FILE", "CKPT", "SCORES.csv", "CLUSTERS.csv", "PANEL.json",
    "TABLE.csv", "VERDICTS.csv",
}  # fmt: skip
FOLDERS = {"DIR", "CKPT_DIR", "OUT", "ROOT"}


def nearest(word: str, known: Iterable[str]) -> str:
    """ " (did you mean X?)" for the most similar known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Examples as they are written, and the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, value = action.help or "", action.default
        if "default" in text or not action.option_strings or value is None or value is False or value == []:
            return text
        return f"{text} (default %(default)s)".lstrip() if value is not argparse.SUPPRESS else text


class Parser(argparse.ArgumentParser):
    """Options only in full; what is wrong is one sentence with the nearest that exists, and exit code 2."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": Formatter} | kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        if self._subparsers is None:
            self._refuse_unknown(args)  # before argparse misses what was mistyped
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # refused here, where the options of the command are known, and not by the parser above
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def _refuse_unknown(self, args: Sequence[str]) -> None:
        for word in itertools.takewhile(lambda word: word != "--", args):
            name = word.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                self.error(f"there is no option {name}{nearest(name, self._option_string_actions)}")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            hint = nearest(str(value), known) or f" (choose from {', '.join(known)})"
            raise argparse.ArgumentError(action, f"there is no {str(value)!r}{hint}")

    def error(self, message: str) -> None:
        """Say what is wrong in one line, without the usage, which hides it."""
        message = re.sub(r"\s+", " ", message).strip()
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` says more.\n")


def overview(groups: dict[str, dict[str, str]]) -> str:
    """The commands in their groups with a line each, from {group: {command: what it does}}."""
    lines = []
    for group, commands in groups.items():
        lines += [f"  {group}:", *(f"    {name:<14}{about}" for name, about in commands.items())]
    return "\n".join(["commands:", *lines, "", "unmask COMMAND --help shows the options of one, with an example."])


def completion_script(parser: argparse.ArgumentParser, shell: str, detectors: list[str]) -> str:
    """The completion script of a shell (bash, zsh, fish) for a parser, which is changed on the way."""
    import shtab

    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    commands.help = "command"  # shtab leaves out what the help does not show
    for sub in set(commands.choices.values()):
        for action in sub._actions:
            name = action.metavar if isinstance(action.metavar, str) else ""
            if name in FILES or action.dest in ("manifest", "profile"):
                action.complete = shtab.FILE
            elif name in FOLDERS or action.dest == "crops":
                action.complete = shtab.DIRECTORY
            elif name == "DETECTOR":
                action.choices, action.help = detectors, "detector"
    return shtab.complete(parser, shell)
