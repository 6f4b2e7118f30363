"""What the kit finds on this machine, and the command that mends what is missing (`unmask doctor`)."""

from __future__ import annotations

import importlib
import io
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement

from unmask.profile import Study, open_study
from unmask.workflow import available_cores

MEDIA_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".png", ".jpg", ".jpeg", ".bmp", ".webp"}
# Everything a demo run leaves fits in this.
DISK_GIB = 5.0


@dataclass(frozen=True)
class Check:
    """One requirement: `status` is ok, missing or optional (not there, and not needed by this profile)."""

    name: str
    status: str
    detail: str
    fix: str = ""

    def line(self) -> str:
        """As printed: `[ok]       name: detail`, and the fix where something is to be done."""
        return f"{f'[{self.status}]':<11}{self.name}: {self.detail}" + (f" -> {self.fix}" if self.fix else "")


def checks(study: Study) -> list[Check]:
    """Every requirement of a study, in the order they would stop it."""
    found = [Check("Python", "ok", platform.python_version()), *_packages(study)]
    found += [*_device(), _h264(), _decord()]
    found += [_yunet(study), *_data_sets(study), *_raw_folders(study), _disk(study), _cores(study)]
    return found


def _packages(study: Study) -> list[Check]:
    project = tomllib.loads((study.root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = dict.fromkeys(project["dependencies"], "")
    # What several extras need is listed once, with the last of them.
    wanted |= {text: extra for extra, texts in project["optional-dependencies"].items() for text in texts}
    return [_package(Requirement(text), extra) for text, extra in wanted.items() if not text.startswith("decord")]


def _package(requirement: Requirement, extra: str) -> Check:
    fix = "pip install -c constraints.txt -e ." if not extra else f'pip install -c constraints.txt -e ".[{extra}]"'
    status = "optional" if extra else "missing"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(requirement.name, status, "not installed", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(requirement.name, status, f"{version}, but {requirement.specifier} is needed", fix)
    return Check(requirement.name, "ok", version)


def _device() -> list[Check]:
    try:
        import torch

        from unmask import training
    except ImportError as error:
        return [Check("GPU", "optional", f"cannot tell, PyTorch does not load ({error})")]
    trains_in = {"bf16": "training in bfloat16", "no": "training in float32"}[training.precision()]
    precision = Check("precision", "ok", trains_in)
    if torch.cuda.is_available():
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {gib:.0f} GiB"
        return [Check("GPU", "ok", name), precision]
    detail = "none that PyTorch sees; the demo runs on the processor, profile paper needs one"
    return [Check("GPU", "optional", detail), precision]


def _h264() -> Check:
    fix = "pip install --force-reinstall -c constraints.txt av"
    try:
        import av

        written = _h264_clip()
        with av.open(io.BytesIO(written)) as container:
            frames = sum(1 for _ in container.decode(video=0))
    except Exception as error:  # whatever breaks here is the finding
        return Check("H.264", "missing", f"PyAV cannot write and read it ({type(error).__name__}: {error})", fix)
    if frames != 5:
        return Check("H.264", "missing", f"5 frames written, {frames} read", fix)
    return Check("H.264", "ok", "libx264 writes, PyAV reads")


def _h264_clip() -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for value in range(5):
            picture = np.full((48, 64, 3), 40 * value, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _decord() -> Check:
    try:
        module = importlib.import_module("decord")
    except (ImportError, OSError) as error:
        return Check("decord", "optional", f"not usable here ({error}); PyAV decodes instead")
    return Check("decord", "ok", module.__version__)


def _yunet(study: Study) -> Check:
    found = sorted(study.models.glob("face_detection_yunet*.onnx")) if study.models.is_dir() else []
    if found:
        return Check("YuNet weights", "ok", str(found[0]))
    needed = study.profile.preprocess.locator == "yunet"
    detail = f"no face_detection_yunet*.onnx in {study.models}" + ("" if needed else ", not needed by this profile")
    fix = "unmask fetch yunet, or name the folder that holds it in UNMASK_MODELS"
    return Check("YuNet weights", "missing" if needed else "optional", detail, fix)


def _data_sets(study: Study) -> list[Check]:
    found = []
    for entry in study.profile.data.sets:
        layout, _, place = entry.partition("=")
        if layout == "world":
            folder = study.work / place
            detail = f"{count_media(folder)} media" if folder.is_dir() else "not made yet: chapter 00_data makes it"
            found.append(Check(f"data set {place}", "ok", f"synthetic world, {detail}"))
            continue
        path = study.root / place
        if layout == "manifest" and path.is_file():
            found.append(Check(f"data set {entry}", "ok", "manifest"))
        elif path.is_dir() and (number := count_media(path)):
            found.append(Check(f"data set {entry}", "ok", f"{number} media"))
        else:
            detail = f"no media in {path}" if path.is_dir() else f"no such place: {path}"
            found.append(Check(f"data set {entry}", "missing", detail, "put or link it there (data/README.md)"))
    return found


def _raw_folders(study: Study) -> list[Check]:
    raw = study.root / "data" / "raw"
    folders = sorted(path for path in raw.iterdir() if path.is_dir()) if raw.is_dir() else []
    return [Check(f"data/raw/{folder.name}", "ok", f"{count_media(folder)} media") for folder in folders]


def count_media(folder: Path) -> int:
    """Files under `folder`, links followed, whose name ends like a video or an image."""
    return sum(
        Path(name).suffix.lower() in MEDIA_SUFFIXES
        for _, _, names in os.walk(folder, followlinks=True)
        for name in names
    )


def _disk(study: Study) -> Check:
    free = shutil.disk_usage(study.root).free / 2**30
    if free >= DISK_GIB:
        return Check("disk space", "ok", f"{free:.0f} GiB free")
    return Check("disk space", "missing", f"{free:.1f} GiB free, {DISK_GIB:.0f} needed", "delete runs in data/work")


def _cores(study: Study) -> Check:
    cores = available_cores()
    workers = study.profile.workers
    if workers > cores:
        return Check("cores", "ok", f"{cores}, fewer than the profile's {workers} workers", f"--set workers={cores}")
    return Check("cores", "ok", str(cores))


def main(profile: str = "demo", tell: Callable[[str], None] = print) -> int:
    """Print one line per requirement; exit code 1 if something is missing."""
    found = checks(open_study(profile))
    for check in found:
        tell(check.line())
    return int(any(check.status == "missing" for check in found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
