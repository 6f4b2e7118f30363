"""The command line: `unmask COMMAND`; `unmask --help` lists the commands, `unmask.commands` has them."""

import argparse
import sys
from collections.abc import Sequence

from unmask import cli_help
from unmask.commands import cameras, data, judging, setup, training
from unmask.machine import advice
from unmask.profile import ProfileError

# The groups as `unmask --help` lists them.
GROUPS = {"set-up": setup, "data": data, "training": training, "judging": judging, "cameras": cameras}


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = cli_help.Parser(prog="unmask", description="A reproducible study kit for deepfake detection.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", help=argparse.SUPPRESS)
    groups = {}
    for title, group in GROUPS.items():
        before = len(commands._choices_actions)
        group.declare(commands)
        groups[title] = {action.dest: action.help for action in commands._choices_actions[before:]}
    parser.usage, parser.epilog = "unmask [-h] COMMAND ...", cli_help.overview(groups)
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
