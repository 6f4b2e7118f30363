"""Downloads, from a server on this machine that speaks TLS with a certificate of its own."""

import errno
import fcntl
import hashlib
import http.server
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from unmask import cli, downloads
from unmask.data import faces
from unmask.downloads import CATALOGUE, DownloadError, Published

CONTENT = bytes(range(256)) * 20_000  # 5 MB: several chunks


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, as the test tells by `mode`, and notes the ranges that were asked for."""

    mode, ranges = "whole", []

    def do_GET(self):
        asked = self.headers.get("Range")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if self.mode == "missing" or start > len(CONTENT):
            self.send_error(404 if self.mode == "missing" else 416)
            return
        if self.mode.startswith("http"):
            self.send_response(302)
            self.send_header("Location", self.mode)
            self.end_headers()
            return
        if asked and start == len(CONTENT):
            self.send_error(416)
            return
        if self.mode == "no ranges":
            start = 0
        content = CONTENT[start:] if self.mode != "other" else b"x" * (len(CONTENT) - start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.mode == "drops":
            content = content[: len(content) // 2]
        for place in range(0, len(content), 1 << 18):
            self.wfile.write(content[place : place + (1 << 18)])
            if self.mode == "slow":
                time.sleep(0.1)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A key and a certificate for 127.0.0.1, made here."""
    if not shutil.which("openssl"):
        pytest.skip("the program openssl, which makes the test's certificate, is not here")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return key, certificate


def serve(context: ssl.SSLContext | None):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # clients that hang up: no word of it among what commands say
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def servers(certificate):
    """A server that speaks TLS and one that does not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate[1], certificate[0])
    found = serve(context), serve(None)
    yield found
    for server in found:
        server.shutdown()
        server.server_close()


@pytest.fixture
def wanted(servers, certificate, monkeypatch):
    """The entry `test` of the catalogue, on a server whose certificate is trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[1]))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(Server, "mode", "whole")
    monkeypatch.setattr(Server, "ranges", [])
    url = f"https://127.0.0.1:{servers[0].server_port}/files/weights.bin"
    entry = Published(url, hashlib.sha256(CONTENT).hexdigest(), "a test")
    monkeypatch.setitem(CATALOGUE, "test", entry)
    return entry


def test_a_file_is_fetched_once_and_checked_ever_after(wanted, tmp_path):
    path = downloads.fetch("test", tmp_path / "new" / "models")
    assert path == tmp_path / "new/models/weights.bin" and path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["weights.bin"]
    assert downloads.fetch("test", path.parent) == path and Server.ranges == [None]
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(DownloadError, match="is not the published file.*Remove it"):
        downloads.fetch("test", path.parent)
    assert path.read_bytes() == CONTENT[:-1]  # somebody put it there


def test_the_folder_of_models_is_the_default(wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_MODELS", str(tmp_path))
    assert downloads.fetch("test") == tmp_path / "weights.bin"


def test_a_wrong_hash_is_refused_and_removed(wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "mode", "other")
    with pytest.raises(DownloadError, match=f"was removed.*{wanted.sha256}"):
        downloads.fetch("test", tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_dropped_connection_is_gone_on_from(wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "mode", "drops")
    with pytest.raises(DownloadError, match="ended after .* of .* bytes.*goes on.*copy it to") as error:
        downloads.fetch("test", tmp_path)
    assert wanted.url in str(error.value) and wanted.sha256 in str(error.value)
    assert os.listdir(tmp_path) == ["weights.bin.part"]
    half = (tmp_path / "weights.bin.part").stat().st_size
    assert half == len(CONTENT) // 2
    monkeypatch.setattr(Server, "mode", "whole")
    assert downloads.fetch("test", tmp_path).read_bytes() == CONTENT
    assert Server.ranges == [None, f"bytes={half}-"]


@pytest.mark.parametrize("before", [b"", CONTENT[:1000], CONTENT])
def test_what_came_before_counts_if_it_is_right(wanted, tmp_path, before):
    (tmp_path / "weights.bin.part").write_bytes(before)
    assert downloads.fetch("test", tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("before", [b"another file", CONTENT + b"and more"])
def test_what_came_before_and_is_wrong_is_removed(wanted, tmp_path, before):
    (tmp_path / "weights.bin.part").write_bytes(before)
    with pytest.raises(DownloadError, match="was removed"):
        downloads.fetch("test", tmp_path)
    assert downloads.fetch("test", tmp_path).read_bytes() == CONTENT


def test_a_server_that_knows_no_ranges_starts_again(wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "mode", "no ranges")
    (tmp_path / "weights.bin.part").write_bytes(b"half of something")
    assert downloads.fetch("test", tmp_path).read_bytes() == CONTENT


def test_a_killed_download_goes_on(wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "mode", "slow")
    code = f"from unmask.downloads import *; download({wanted!r}, Path({str(tmp_path)!r}) / {wanted.file!r})"
    process = subprocess.Popen([sys.executable, "-c", code])
    part, patience = tmp_path / "weights.bin.part", time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 1 << 20):
        assert process.poll() is None and time.monotonic() < patience
        time.sleep(0.02)
    with pytest.raises(DownloadError, match="Another process is fetching weights.bin"):
        downloads.fetch("test", tmp_path)
    process.kill()
    process.wait()
    kept = part.stat().st_size
    assert 0 < kept < len(CONTENT) and not (tmp_path / "weights.bin").exists()
    monkeypatch.setattr(Server, "mode", "whole")
    assert downloads.fetch("test", tmp_path).read_bytes() == CONTENT
    assert Server.ranges[-1] == f"bytes={kept}-"


def test_https_and_nothing_else(wanted, servers, tmp_path, monkeypatch):
    plain = f"http://127.0.0.1:{servers[1].server_port}/files/weights.bin"
    monkeypatch.setitem(CATALOGUE, "plain", replace(wanted, url=plain))
    with pytest.raises(DownloadError, match="is not https"):
        downloads.fetch("plain", tmp_path)
    monkeypatch.setattr(Server, "mode", plain)  # TLS first, and then a way out of it
    with pytest.raises(DownloadError, match="is not https"):
        downloads.fetch("test", tmp_path)
    assert Server.ranges == [None]
    monkeypatch.setitem(CATALOGUE, "file", replace(wanted, url=f"file://{__file__}"))
    with pytest.raises(DownloadError, match="is not https"):
        downloads.fetch("file", tmp_path)


def test_a_certificate_that_nobody_signed_is_refused(wanted, tmp_path, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(DownloadError, match="(?i)certificate"):
        downloads.fetch("test", tmp_path)
    assert Server.ranges == []


@pytest.mark.parametrize("mode", ["missing", "nobody"])
def test_without_a_network_it_says_what_to_copy_where(wanted, tmp_path, monkeypatch, capsys, mode):
    monkeypatch.setattr(Server, "mode", mode)
    monkeypatch.setenv("UNMASK_MODELS", str(tmp_path))
    if mode == "nobody":
        wanted = replace(wanted, url="https://127.0.0.1:9/weights.bin")
        monkeypatch.setitem(CATALOGUE, "test", wanted)
    assert cli.main(["fetch", "test"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in (wanted.url, wanted.sha256, f"copy it to {tmp_path / 'weights.bin'}."):
        assert part in said


def test_the_command(wanted, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNMASK_MODELS", str(tmp_path))
    assert cli.main(["fetch", "test"]) == 0
    assert str(tmp_path / "weights.bin") in capsys.readouterr().out
    assert cli.main(["fetch"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed for name in CATALOGUE) and "here" in listed
    assert cli.main(["fetch", "yu-net"]) == 2
    assert "known are yunet, clip-rn50" in capsys.readouterr().err


def test_two_processes_do_not_write_the_same_part(wanted, tmp_path):
    with open(tmp_path / "weights.bin.part", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="Another process"):
            downloads.fetch("test", tmp_path)


@pytest.mark.parametrize("step", ["renamed", "renamed and begun anew"])
def test_a_file_that_another_process_finished_in_between_is_left_alone(wanted, tmp_path, monkeypatch, step):
    """It had the lock when this one opened the part, and gave the file its name before this one locked it."""
    part, path, lock = tmp_path / "weights.bin.part", tmp_path / "weights.bin", fcntl.flock
    part.write_bytes(CONTENT)

    def late(file, how):
        part.rename(path)
        if step != "renamed":
            part.write_bytes(b"")
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    monkeypatch.setattr(Server, "mode", "no ranges")  # which makes a download start from nothing
    with pytest.raises(DownloadError, match="Another process is fetching weights.bin"):
        downloads.fetch("test", tmp_path)
    monkeypatch.undo()
    assert path.read_bytes() == CONTENT


class Full:
    """A file on a disk that is full, or to which a firewall would refuse the way: errors the network has, too."""

    def __init__(self, file, number):
        self.name, self.number, self._file = file.name, number, file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number, said", [(errno.ENOSPC, "No space is left in"), (errno.EACCES, "may not be written")])
def test_a_disk_that_refuses_is_no_fault_of_the_network(wanted, tmp_path, monkeypatch, capsys, number, said):
    receive = downloads._receive
    monkeypatch.setattr(downloads, "_receive", lambda url, file: receive(url, Full(file, number)))
    monkeypatch.setenv("UNMASK_MODELS", str(tmp_path))
    assert cli.main(["fetch", "test"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and said in told and str(tmp_path) in told and "network" not in told


def test_a_network_that_refuses_is_no_fault_of_the_disk(wanted, tmp_path, monkeypatch):
    def refused(url, file):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(downloads, "_receive", refused)
    with pytest.raises(DownloadError, match="Without a network"):
        downloads.fetch("test", tmp_path)


@pytest.mark.parametrize("place", ["afile", "afile/below"])
def test_a_folder_of_models_that_cannot_be_is_said_in_a_sentence(wanted, tmp_path, monkeypatch, capsys, place):
    (tmp_path / "afile").write_text("x")
    monkeypatch.setenv("UNMASK_MODELS", str(tmp_path / place))
    assert cli.main(["fetch", "test"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{tmp_path / place} cannot be a folder" in told and "Errno" not in told


def test_the_catalogue_pins_what_it_offers():
    import open_clip

    files = [entry.file for entry in CATALOGUE.values()]
    assert len(set(files)) == len(files)
    for name, entry in CATALOGUE.items():
        assert (
            entry.url.startswith("https://")
            and len(entry.sha256) == 64
            and set(entry.sha256) <= set("0123456789abcdef")
        )
        if name.startswith("clip-"):
            assert entry.sha256 in entry.url
    assert CATALOGUE["yunet"].file in faces.YUNET_FILES and CATALOGUE["yunet"].sha256 in faces.YUNET_SHA256
    known = {open_clip.get_pretrained_cfg(*pair)["url"] for pair in open_clip.list_pretrained() if pair[1] == "openai"}
    assert known == {entry.url for name, entry in CATALOGUE.items() if name.startswith("clip-")}
