"""Published weights, fetched over https: `unmask fetch`. What has no sha256 pinned here is not downloaded.

Two exceptions, where the user asks for them: a profile with `pretrained: true` (as `paper` has) lets timm fetch its
weights, and the locator uniface those of its package. The kit knows no sha256 of either.

A file grows as NAME.part, from where it stopped if need be, and gets its name once its sha256 is the pinned one.
"""

import fcntl
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from unmask import __version__
from unmask.machine import DiskError, writing
from unmask.profile import models_folder
from unmask.progress import track

TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20


class DownloadError(RuntimeError):
    """A file cannot be fetched, or is not the pinned one; the message says what to do by hand."""


@dataclass(frozen=True)
class Published:
    """A file that others published: its `url`, the sha256 of its bytes, and what it is."""

    url: str
    sha256: str
    about: str

    @property
    def file(self) -> str:
        """Its name in the folder of models."""
        return self.url.rsplit("/", 1)[1]


def _openai(sha256: str, file: str) -> Published:
    """A CLIP of OpenAI's: they put the sha256 into the address."""
    url = f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}"
    return Published(url, sha256, f"OpenAI's CLIP {file.removesuffix('.pt')} (MIT licence)")


CATALOGUE = {
    # The sha256 is the one that OpenCV Zoo's pointer to the file states.
    "yunet": Published(
        "https://media.githubusercontent.com/media/opencv/opencv_zoo/main/models/face_detection_yunet/"
        "face_detection_yunet_2023mar.onnx",
        "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
        "YuNet, the face detector of OpenCV Zoo (MIT licence)",
    ),
    "clip-rn50": _openai("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "RN50.pt"),
    "clip-rn101": _openai("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", "RN101.pt"),
    "clip-rn50x4": _openai("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", "RN50x4.pt"),
    "clip-rn50x16": _openai("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", "RN50x16.pt"),
    "clip-rn50x64": _openai("be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", "RN50x64.pt"),
    "clip-vit-b-32": _openai("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "clip-vit-b-16": _openai("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "clip-vit-l-14": _openai("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "clip-vit-l-14-336": _openai(
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"
    ),
}


def fetch(name: str, folder: str | os.PathLike | None = None) -> Path:
    """The file of a name in CATALOGUE, in data/models ($UNMASK_MODELS) or `folder`; downloaded if it is not there.

    Raises DownloadError for another name, without a network (it then says what to copy where), and for bytes whose
    sha256 is not the pinned one: those are removed if they were downloaded just now, and left if they lay there.
    """
    if name not in CATALOGUE:
        raise DownloadError(f"There is nothing named {name!r} to fetch; known are {', '.join(CATALOGUE)}.")
    wanted, folder = CATALOGUE[name], models_folder() if folder is None else Path(folder)
    path = folder / wanted.file
    if not path.is_file():
        return download(wanted, path)
    if (found := sha256_of(path)) != wanted.sha256:
        raise DownloadError(
            f"{path} is not the published file: its sha256 is {found}, not {wanted.sha256}. Remove it and fetch it "
            "again."
        )
    return path


def download(wanted: Published, path: Path) -> Path:
    """Download a file to `path`, going on where an earlier call stopped. Raises DownloadError as `fetch`, and
    DiskError if its folder cannot be written to."""
    part = path.with_name(f"{path.name}.part")
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        return _download(wanted, path, part)


def _download(wanted: Published, path: Path, part: Path) -> Path:
    with open(part, "a+b") as file:
        if not _locked(file, part):
            raise DownloadError(f"Another process is fetching {path.name}; wait until it ends.")
        try:
            _receive(wanted.url, file)
        except DiskError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise DownloadError(_by_hand(wanted, path, error)) from error
        os.fsync(file.fileno())
        if (found := sha256_of(part)) != wanted.sha256:
            part.unlink()
            raise DownloadError(
                f"What {wanted.url} gave is not the published file and was removed: its sha256 is {found}, not "
                f"{wanted.sha256}. Run the same command again; if that does not help, the file there has changed."
            )
        os.replace(part, path)
    return path


def _locked(file: BinaryIO, part: Path) -> bool:
    """Lock an open file for this process alone; False if another has it, or had it and gave it its name since."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(part))
    except (BlockingIOError, FileNotFoundError):
        return False


def sha256_of(path: str | os.PathLike) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _by_hand(wanted: Published, path: Path, error: Exception) -> str:
    why = getattr(error, "reason", None) or error
    return (
        f"{path.name} cannot be fetched ({type(error).__name__}: {why}). What has come is kept, and the same command "
        f"goes on. Without a network: download {wanted.url} elsewhere, see that its sha256 is {wanted.sha256}, and "
        f"copy it to {path}."
    )


class _HttpsAlone(urllib.request.HTTPRedirectHandler):
    """Follows redirections to https and nowhere else."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _require_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _require_https(url: str) -> None:
    if not url.startswith("https://"):
        raise urllib.error.URLError(f"{url} is not https")


def _receive(url: str, file: BinaryIO) -> None:
    """Append to `file` what it lacks of a url; from the start where the server knows no ranges."""
    _require_https(url)
    start = file.seek(0, os.SEEK_END)
    headers = {"User-Agent": f"unmask/{__version__}"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        reply = urllib.request.build_opener(_HttpsAlone).open(
            urllib.request.Request(url, headers=headers), None, TIMEOUT
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            return  # all of it is here, or more: its sha256 tells
        raise
    with reply:
        if reply.status != http.client.PARTIAL_CONTENT:
            file.truncate(0)
        length = reply.headers.get("Content-Length")
        chunks = _chunks(reply)
        got, part = 0, Path(file.name)
        for chunk in track(chunks, length and -(-int(length) // CHUNK), f"{part.stem}, MiB"):
            with writing(part.parent):  # else the disk's refusal would pass for the network's
                got += file.write(chunk)
                file.flush()
        if length and got < int(length):
            raise ConnectionError(f"the connection ended after {got} of {length} bytes")


def _chunks(reply: IO[bytes]) -> Iterator[bytes]:
    while chunk := reply.read(CHUNK):
        yield chunk
