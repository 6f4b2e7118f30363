"""How large a study is, and where it lives: profiles, and the folders of one run.

`profiles/demo.yaml` is the complete set of keys, with their types; every other profile only overrides it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from unmask.machine import writing

# Keys of a resolved profile file that are not settings: they say which run it belongs to.
IDENTITY = ("name", "run")
# They become folders' names, and a part of patterns that Snakemake reads.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Where figures/ has the demo's tables, figures, report and README itself, no run's folder can be.
_TAKEN = re.compile(r"tables|.*\.(png|pdf|html|json|js|md)", re.IGNORECASE)
# Keys that change how fast a study runs but never what it finds, so they stay out of every hash.
SPEED = ("workers",)
# What safe_load raises: for bytes that are no UTF-8 and a date such as 2024-99-99 ValueErrors, for brackets within
# brackets, a thousand deep, RecursionError.
_UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
RECORDED_PACKAGES = (
    "torch", "torchvision", "timm", "open_clip_torch", "accelerate", "numpy", "scipy", "scikit-learn", "pandas",
    "pyarrow", "opencv-python-headless", "av", "decord", "matplotlib", "seaborn",
)  # fmt: skip


class ProfileError(ValueError):
    """A profile, or a key of one, that does not exist or has the wrong type."""


class MissingInput(FileNotFoundError):
    """A file that an earlier chapter leaves is not there."""


class ChapterEnds(Exception):
    """Nothing further in this notebook applies to these data; its results are written. A headless run takes it so."""


def find_root() -> Path:
    """The repository root: above the package in a clone, otherwise the nearest one above the working directory."""
    here = Path(__file__).resolve()
    for folder in (*here.parents, Path.cwd(), *Path.cwd().parents):
        if (folder / "profiles" / "demo.yaml").is_file():
            return folder
    raise ProfileError("No Unmask repository here: run from a clone of it (the folder that holds profiles/demo.yaml).")


ROOT = find_root()


def models_folder(root: Path = ROOT) -> Path:
    """Where weights are kept: $UNMASK_MODELS, else data/models."""
    return Path(os.environ.get("UNMASK_MODELS") or root / "data" / "models")


def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Write a whole file or nothing: a temporary name in the same folder, then a rename.

    Raises DiskError if the folder cannot be written to.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
    return path


def _replace(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def digest(value: Any) -> str:
    """First 12 hex digits of the SHA-256 of a JSON-able value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


class Section(Mapping):
    """Read-only settings with attribute access: `section.frames` is `section["frames"]`."""

    def __init__(self, values: dict[str, Any], where: str = ""):
        self._values = values
        self._where = where

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise KeyError(key)
        value = self._values[key]
        return Section(value, f"{self._where}{key}.") if isinstance(value, dict) else value

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):
            raise AttributeError(key)
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"The profile has no key {self._where}{key}.{_nearest(key, self._values)}") from None

    def __iter__(self):
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._values!r})"

    def as_dict(self) -> dict[str, Any]:
        """A copy as plain dicts and lists."""
        return json.loads(json.dumps(self._values))


class Profile(Section):
    """All settings of a study, by attribute (`profile.world.frames`), with the profile's `name` and its `run`."""

    def __init__(self, name: str, run: str, values: dict[str, Any]):
        super().__init__(values)
        self.name = name
        self.run = run

    @property
    def hash(self) -> str:
        """12 hex digits that change with every setting but those of SPEED."""
        return self.subset_hash([key for key in self._values if key not in SPEED])

    def changed(self, changes: Mapping[str, Any]) -> Profile:
        """A copy with some keys changed, such as {"clip.frames": 4}. ProfileError as in `load_profile`."""
        values = self.as_dict()
        for key, value in changes.items():
            _override(values, _nested(key, value), "")
        return Profile(self.name, self.run, values)

    def subset_hash(self, keys: list[str]) -> str:
        """Hash of some top-level keys, so that a chapter can tell whether its own settings changed."""
        return digest({key: self._values[key] for key in keys})


def load_profile(profile: str | Path = "demo", changes: Mapping[str, Any] | None = None, root: Path = ROOT) -> Profile:
    """Read a profile by name (`demo`) or file, over the keys of `demo`, with `changes` such as {"train.epochs": 2}.

    Raises ProfileError for an unknown profile, an unknown key (naming the nearest) or a value of the wrong type.
    """
    values = _read(root / "profiles" / "demo.yaml")
    path = _profile_path(profile, root)
    own = _read(path)
    name, run = (_name(own.pop(key, path.stem), key, path) for key in IDENTITY)
    _override(values, own, f" (in {path.name})")
    return Profile(name, run, values).changed(changes or {})


def _name(value: Any, key: str, path: Path) -> str:
    if not _NAME.fullmatch(str(value)):
        raise ProfileError(
            f"The {key} of a profile is of letters, digits, dots, dashes and underscores, and begins with a letter or "
            f"digit; {path.name!r} has {value!r}. Rename the file, or say `{key}: NAME` in it."
        )
    if key == "run" and _TAKEN.fullmatch(str(value)):
        raise ProfileError(
            f"A run cannot be called {value!r}, a name that figures/ uses: say `run: NAME` in {path.name}."
        )
    return str(value)


def _nested(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for the key "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def parse_changes(settings: list[str], root: Path = ROOT) -> dict[str, Any]:
    """Turn command-line settings `train.epochs=2` into changes, reading each value as the type its key has."""
    changes = {}
    schema = load_profile("demo", root=root)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ProfileError(f"A setting is KEY=VALUE, for example train.epochs=2; got {setting!r}.")
        default: Any = schema
        for part in key.split("."):
            default = default.get(part) if isinstance(default, Section) else None
        # YAML would read `off` or `08` as something other than text.
        changes[key] = text if isinstance(default, str) else _parse_value(key, text)
    return changes


def _parse_value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except _UNREADABLE:
        raise ProfileError(f"The value of {key} cannot be read: {text!r}.") from None


def _profile_path(profile: str | Path, root: Path) -> Path:
    text = str(profile)
    if "/" in text or text.endswith((".yaml", ".yml")):
        for path in (Path(text), root / text):
            if path.is_file():
                return path.resolve()
        raise ProfileError(f"No profile file {text}.")
    known = sorted(path.stem for path in (root / "profiles").glob("*.yaml"))
    if text not in known:
        raise ProfileError(f"No profile named {text!r}; there are {', '.join(known)}.")
    return root / "profiles" / f"{text}.yaml"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except _UNREADABLE as error:
        raise ProfileError(f"{path.name} is not valid YAML: {str(error)[:500]}") from None
    if not isinstance(content, dict):
        raise ProfileError(f"{path.name} must hold `key: value` lines.")
    return content


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else f" Known here: {', '.join(known)}."


def _override(values: dict[str, Any], changes: dict[str, Any], source: str, where: str = "") -> None:
    for key, value in changes.items():
        if key not in values:
            raise ProfileError(f"Unknown profile key {where}{key}{source}.{_nearest(str(key), values)}")
        default = values[key]
        if isinstance(default, dict):
            if not isinstance(value, dict):
                keys = ", ".join(f"{where}{key}.{inner}" for inner in default)
                raise ProfileError(f"{where}{key} is a group of keys{source}: set one of {keys}.")
            _override(default, value, source, f"{where}{key}.")
        else:
            values[key] = _checked(value, default, f"{where}{key}{source}")


def _checked(value: Any, default: Any, label: str) -> Any:
    expected = type(default)
    if expected is float:
        # YAML 1.1 reads 1e-3 as text.
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
            return float(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return float(value)
    if type(value) is not expected:
        raise ProfileError(f"{label} must be {_kind(expected)}, not {value!r}.")
    if expected is list and default:
        return [_checked(item, default[0], f"every item of {label}") for item in value]
    return value


def _kind(expected: type) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list"}
    return names[expected]


def figures_folder(run: str) -> Path:
    """Where a run's figures go, relative to the root: the demo's at the top, every other run's in its own folder."""
    return Path("figures") if run == "demo" else Path("figures") / run


class Study:
    """One run of the kit: its profile, its folders and where its numbers come from (see `open_study`)."""

    def __init__(self, profile: Profile, root: Path, playing: bool):
        self.profile = profile
        self.root = root
        self.playing = playing
        self.work = root / "data" / "work" / profile.run
        self.models = models_folder(root)
        self.seeds = [profile.seed + offset for offset in range(profile.seeds)]
        self.manifest_hash: str | None = None
        self.saved: list[str] = []
        if playing:
            self.figures = self.work / "scratch" / "figures"
        else:
            self.figures = root / figures_folder(profile.run)
        self.tables = self.figures / "tables"
        self.provenance = {
            "profile": profile.name,
            "run": profile.run,
            "profile_hash": profile.hash,
            "commit": _git_commit(root),
            "versions": _versions(),
            "world": any(entry.startswith("world=") for entry in profile.data.sets),
        }

    def describe(self) -> str:
        """The run, the commit and the versions, as printed at the top of every notebook."""
        versions = ", ".join(f"{package} {version}" for package, version in self.provenance["versions"].items())
        mode = ", playing: outputs go to scratch" if self.playing else ""
        return (
            f"profile {self.profile.name} ({self.profile.hash}), run {self.profile.run}, seeds {self.seeds}{mode}\n"
            f"commit {self.provenance['commit']}\nPython {platform.python_version()}, {versions}"
        )

    def input(self, relpath: str, made_by: str = "01_preprocessing") -> Path:
        """The path of something an earlier chapter left in the work folder; MissingInput says which one if not."""
        path = self.work / relpath
        if not path.exists():
            number = made_by.split("_")[0]
            raise MissingInput(
                f"{relpath} is not in data/work/{self.profile.run} yet: {made_by} leaves it. Run that notebook first, "
                f"or `./run_all.sh --profile {self.profile.name} --from {number}`."
            )
        return path

    def output(self, relpath: str) -> Path:
        """Where this run may write: the work folder, or its scratch folder while playing."""
        path = (self.work / "scratch" if self.playing else self.work) / relpath
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def end(self, chapter: str, reason: str) -> None:
        """End a chapter early: write its results with the reason, then raise ChapterEnds."""
        self.results(chapter, {"ended": reason})
        raise ChapterEnds(reason)

    def results(self, chapter: str, numbers: dict[str, Any]) -> Path:
        """Write results/<chapter>.json: the numbers, the figures and tables saved so far, and the provenance."""
        content = {
            "chapter": chapter,
            "numbers": numbers,
            "saved": self.saved,
            "seeds": self.seeds,
            "manifest_hash": self.manifest_hash,
            **self.provenance,
        }
        return write_json(self.output(f"results/{chapter}.json"), content)


def open_study(profile: str | Path = "demo", changes: Mapping[str, Any] | None = None, playing: bool = False) -> Study:
    """Open a run by profile name or by a resolved profile file (data/work/<run>/profile.yaml, as run_all.sh passes).

    With `changes`, or if `playing`, the study is played with: inputs are found as ever, while figures, tables, results
    and outputs go to <work>/scratch, so that trying something never replaces the study's own.
    """
    path = _profile_path(profile, ROOT)
    resolved = path.name == "profile.yaml" and path.parents[1].parts[-2:] == ("data", "work")
    root = path.parents[3] if resolved else ROOT
    return Study(load_profile(path, changes, root), root, playing=playing or bool(changes))


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON that any parser reads: numpy numbers and arrays as plain ones, NaN and infinities as null."""
    return write_atomic(path, json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """The same value in JSON's own types."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not float("-inf") < value < float("inf"):
        return None
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _git_commit(root: Path) -> str:
    # Without this check a copy unpacked inside another repository would record that one's commit.
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _versions() -> dict[str, str]:
    found = {}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def source_hash(*modules: ModuleType) -> str:
    """First 12 hex digits of the SHA-256 of the modules' source: derived data made by other code is made anew."""
    return digest([Path(module.__file__).read_text(encoding="utf-8") for module in modules])
