"""The commands of the documentation: read from its pages, and run in this process with small settings.

What is done to a command before it runs is declared here and nowhere else: SMALL, REPLACED, and `run` itself. What is
not run at all is in NOT_RUN, with the reason.
"""

import contextlib
import io
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conftest import SHARED

from unmask import cli, workflow
from unmask.profile import ROOT

YUNET = (SHARED / "data/models/face_detection_yunet.onnx").is_file()
# Commands that take a profile get `--profile tiny`, unless they name one, and these settings in front of their own.
SMALL = {
    "workers": 1, "world.size": 160, "world.frames": 4, "preprocess.frames": 4, "preprocess.size": 128,
    "train.init": "none", "train.epochs": 1, "train.frames_per_clip": 1, "convnext.backbone": "test_convnext",
    "convnext.size": 64, "residual.size": 64, "evaluate.draws": 50, "temporal.frames": 4, "d2st.frames": 4,
    "d2st.crops": 4, "cameras.crop": 0,
}  # fmt: skip
# What would have to be downloaded gives way to what comes with the kit; without YuNet's weights, Haar finds the faces.
REPLACED = {
    "clip.backbone=ViT-L-14-quickgelu": "clip.backbone=clip-demo",
    "clip.weights=openai": "clip.weights=",
    "sd15-t200-e4-256": "demo-t200-e4-128",
} | ({} if YUNET else {"yunet": "haar", "preprocess.locator=yunet": "preprocess.locator=haar"})
NOT_RUN = {
    "./run_tests.sh": "the tests themselves",
    "source .venv/bin/activate": "changes the shell that it is typed in",
    "conda env create -f environment.yaml && conda activate unmask": "needs conda and some GB of downloads",
    "jupyter lab notebooks": "a server that does not end",
    "accelerate launch -m unmask.cli train d2st ...": "several GPUs; the same training runs above on one process",
    "unmask fetch yunet": "a download; tests/test_downloads.py has it from a server of its own",
}
# Their commands need a cluster, a browser or a million videos, and have tests of their own: here they are parsed.
PARSED = ("docs/colab.md", "docs/hpc.md", "docs/scale.md")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, what follows the language in the fence, and its text."""

    language: str
    title: str
    text: str


@dataclass(frozen=True)
class Ran:
    """What became of a command: exit code, output and errors together, seconds."""

    code: int
    said: str
    seconds: float


def pages() -> list[Path]:
    """The README and every page of docs/, but for those that are only PARSED."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if page.relative_to(ROOT).as_posix() not in PARSED]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = re.findall(r"^```(\w+)(?: ([^\n]*))?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [Block(*block) for block in found]


def commands(page: Path) -> list[str]:
    """The command lines of a page's bash blocks, without comments."""
    text = "\n".join(block.text.replace("\\\n", " ") for block in blocks(page) if block.language == "bash")
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in text.splitlines()) if line]


def mentions(page: Path) -> list[str]:
    """The commands that a page names within its sentences."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    programs = r"unmask|\./run_all\.sh|\./run_tests\.sh|(?:source|conda|jupyter|accelerate|nbdime|pip|python)(?= )"
    return sorted(set(re.findall(rf"`((?:{programs})(?: [^`\n]+)?)`", text)))


def small(words: list[str]) -> list[str]:
    """The words of an `unmask` command after the rules above."""
    words = [REPLACED.get(word, word) for word in words]
    if words[0] not in ("doctor", "fetch", "index", "score", "export", "table", "completion"):
        settings = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
        profile = [] if "--profile" in words else ["--profile", "tiny"]
        return [words[0], *profile, *settings, *words[1:]]
    return words if words[0] != "score" or "--explain" not in words else [*words, "--profile", "tiny"]


def run(command: str, monkeypatch) -> Ran:
    """Run a command in the working directory. A run of the study only says which chapters it would begin anew and
    which it was asked for: the tests of the notebooks and of the workflow run them.

    An unknown program is an AssertionError: teach this function, or put the command into NOT_RUN.
    """
    start, said = time.monotonic(), io.StringIO()
    program, *words = shlex.split(command)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            if program == "export":
                monkeypatch.setenv(*words[0].split("="))
                code = 0
            elif program == "unmask":
                code = cli.main(small(words))
            elif program == "./run_all.sh":
                with monkeypatch.context() as patch:
                    if not {"--list", "--dry-run"} & set(words):
                        words.append("--dry-run")
                        patch.setattr(workflow, "dry_run", lambda *asked: print(*asked[-2:]) or 0)
                    code = workflow.main(words)
            else:
                raise AssertionError(f"nobody knows how to run: {command}")
        except SystemExit as error:  # as argparse ends
            code = error.code
    return Ran(code, said.getvalue(), time.monotonic() - start)


def run_page(page: Path, monkeypatch, before=None) -> dict[str, Ran]:
    """What became of every command of a page, in order; `before` has what to call first, by command."""
    done: dict[str, Ran] = {}
    for command in commands(page):
        if command in (before or {}):
            before[command]()
        if command not in NOT_RUN:
            done[command] = run(command, monkeypatch)
    return done


def drawn_media(world: Path, out: Path) -> Iterator[Path]:
    """Copy the videos of a world to `out` as people would keep them: real/PERSON.mp4, fake/METHOD/PERSON.mp4."""
    from unmask.data.manifest import read_manifest

    for row in read_manifest(world / "manifest.parquet").query("kind == 'video'").itertuples():
        path = out / ("real" if row.label == 0 else f"fake/{row.method}") / f"{row.subject}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(world / row.path, path)
        yield path
