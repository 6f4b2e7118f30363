"""Decoding: the right frames, the same from both decoders, and nothing that hangs."""

import os
import signal
import struct
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import moving_frames
from PIL import Image

from unmask.data import decoding, video
from unmask.data.video import MediaError, encode, probe, read_frames


def with_pyav(path, count, max_side=None):
    facts, frames = decoding.read(str(path), count, max_side, ["pyav"])
    assert facts["decoder"] == "pyav"
    return facts, np.stack(frames)


def rotate_mark(path: Path, degrees: int) -> Path:
    """Set the display matrix in an MP4's track header: clockwise turn in degrees."""
    matrix = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    a, b, c, d = (65536 * v for v in matrix)
    data = bytearray(path.read_bytes())
    start = data.find(b"tkhd") + 44
    data[start : start + 24] = struct.pack(">6i", a, b, 0, c, d, 0)
    turned = path.with_name(f"turned{degrees}.mp4")
    turned.write_bytes(data)
    return turned


def write_vfr(path: Path, ticks: list[int]) -> Path:
    """A clip whose frames are shown at `ticks` milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "2", "crf": "18"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for tick, picture in zip(ticks, moving_frames(len(ticks)), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = tick, stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_decoders_agree_and_give_the_frames_that_were_written(tmp_path, make_clip):
    path = make_clip(tmp_path / "clip.mp4", count=48, bframes=3, gop=12)
    clip = read_frames(path, 8)
    facts, frames = with_pyav(path, 8)
    assert clip.decoder == "decord"
    assert np.array_equal(clip.frames, frames)
    assert np.array_equal(clip.indices, facts["indices"]) and np.allclose(clip.pts, facts["pts"])
    assert np.allclose(clip.pts, clip.indices / 25)


def test_each_index_is_the_frame_that_was_written_there(tmp_path):
    shades = [np.full((64, 64, 3), 20 + 4 * i, np.uint8) for i in range(48)]
    path = encode(tmp_path / "shades.mp4", shades, bframes=3, gop=12, crf=10)
    for clip in (read_frames(path, 16), read_frames(path, 48)):
        assert clip.decoder == "decord"
        assert np.array_equal(np.round((clip.frames.mean((1, 2, 3)) - 20) / 4), clip.indices)


def test_frames_are_spread_over_the_whole_clip(tmp_path, make_clip):
    path = make_clip(tmp_path / "clip.mp4", count=40)
    assert read_frames(path, 4).indices.tolist() == [5, 15, 25, 35]
    assert read_frames(path, 1).indices.tolist() == [20]
    assert read_frames(path, 99).indices.tolist() == list(range(40))
    with pytest.raises(ValueError, match="at least one"):
        read_frames(path, 0)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_marks_are_applied_alike(tmp_path, make_clip, degrees):
    path = make_clip(tmp_path / "clip.mp4")
    upright, turned = read_frames(path, 3), read_frames(rotate_mark(path, degrees), 3)
    assert turned.decoder == "decord"
    assert np.array_equal(turned.frames, np.rot90(upright.frames, -degrees // 90, axes=(1, 2)))
    assert np.array_equal(turned.frames, with_pyav(tmp_path / f"turned{degrees}.mp4", 3)[1])
    assert (turned.height, turned.width) == turned.frames.shape[1:3]


def test_variable_frame_rate_keeps_true_times(tmp_path):
    ticks = [0, 40, 80, 400, 420, 1000, 2000, 2040]
    path = write_vfr(tmp_path / "vfr.mp4", ticks)
    clip = read_frames(path, 99)
    assert np.allclose(clip.pts - clip.pts[0], np.array(ticks) / 1000, atol=2e-3)
    assert np.allclose(clip.pts, with_pyav(path, 99)[0]["pts"], atol=1e-6)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_clip_gives_what_is_decodable(tmp_path, share):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = encode(tmp_path / "clip.mp4", [np.roll(noise, 9 * t, axis=0) for t in range(48)], gop=6)
    whole = read_frames(path, 48).frames
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert not decoding.scan(str(path)).intact
    clip = read_frames(path, 4)
    last = read_frames(path, 99).indices[-1]
    assert clip.decoder == "pyav" and len(clip.frames) == 4 and clip.total > last - 2
    assert last / 2 < clip.indices[-1] <= last < 48
    assert np.abs(clip.frames[:3].astype(int) - whole[clip.indices[:3]]).max() <= 2


def test_overreported_frame_count_goes_to_pyav(tmp_path, make_clip, monkeypatch):
    path = make_clip(tmp_path / "clip.mp4", count=24)
    found = decoding.scan(str(path))
    assert found.intact and len(found.pts) == 24
    found.pts, found.intact = np.arange(30) / 25, False
    assert decoding._with_decord(str(path), 30, None, found) is None
    frames, indices, _ = decoding._with_pyav(str(path), 6, None, found)
    assert len(frames) == 6 and indices.tolist() == [2, 6, 10, 14, 18, 22]


def test_large_frames_are_shrunk_while_decoding(tmp_path, make_clip):
    path = make_clip(tmp_path / "clip.mp4", height=192, width=256)
    clip = read_frames(path, 3, max_side=128)
    assert clip.frames.shape == (3, 96, 128, 3) and clip.scale == 0.5 and (clip.width, clip.height) == (256, 192)
    whole = read_frames(path, 3).frames.reshape(3, 96, 2, 128, 2, 3).mean((2, 4))
    assert np.abs(clip.frames - whole).max() <= 1
    assert read_frames(path, 3, max_side=256).scale == 1.0


def test_missing_decord_falls_back(tmp_path, make_clip, monkeypatch):
    path = make_clip(tmp_path / "clip.mp4")
    monkeypatch.setitem(__import__("sys").modules, "decord", None)
    assert decoding.read(str(path), 2, None, ["decord", "pyav"])[0]["decoder"] == "pyav"


class Hung(video._Decoder):
    """Decoder whose children are stopped at once, for as many starts as told: what a native hang looks like."""

    def __init__(self, hangs, how=signal.SIGSTOP):
        super().__init__()
        self.hangs, self.how, self.starts = hangs, how, 0

    def _start(self):
        process = super()._start()
        self.starts += 1
        if self.starts <= self.hangs:
            os.kill(process.pid, self.how)
        return process


def test_hang_is_killed_and_pyav_takes_over(tmp_path, make_clip, monkeypatch):
    path = make_clip(tmp_path / "clip.mp4")
    decoder = Hung(1)
    monkeypatch.setattr(video, "_decoder", decoder)
    assert read_frames(path, 2, deadline=6).decoder == "pyav"
    assert decoder.starts == 2
    assert read_frames(path, 2).decoder == "decord" and decoder.starts == 2
    decoder.close()


def test_deadline_holds_and_the_next_clip_works(tmp_path, make_clip, monkeypatch):
    path = make_clip(tmp_path / "clip.mp4")
    decoder = Hung(2)
    monkeypatch.setattr(video, "_decoder", decoder)
    start = time.monotonic()
    with pytest.raises(MediaError, match=r"^deadline of 0.5 s exceeded$"):
        read_frames(path, 2, deadline=0.5)
    assert time.monotonic() - start < 2
    assert len(read_frames(path, 2).frames) == 2
    decoder.close()


def test_crash_of_the_decoder_is_a_reason(tmp_path, make_clip, monkeypatch):
    path = make_clip(tmp_path / "clip.mp4")
    decoder = Hung(2, signal.SIGSEGV)
    monkeypatch.setattr(video, "_decoder", decoder)
    with pytest.raises(MediaError, match="decoder crashed"):
        read_frames(path, 2)
    decoder.close()


def test_encode_is_deterministic_and_atomic(tmp_path):
    frames = moving_frames(10)
    first, second = encode(tmp_path / "a.mp4", frames), encode(tmp_path / "b.mp4", iter(frames))
    assert first.read_bytes() == second.read_bytes()
    assert probe(first) == video.MediaInfo(128, 96, 10, 25.0, "h264")
    lossless = encode(tmp_path / "c.mp4", frames, crf=0, pix_fmt="yuv444p", fps=30, bframes=0)
    assert np.abs(read_frames(lossless, 10).frames.astype(int) - frames).max() <= 4

    def broken():
        yield from frames[:3]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        encode(tmp_path / "a.mp4", broken())
    assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "c.mp4"]


@pytest.mark.parametrize("fault", ["none", "odd", "mixed"])
def test_encode_refuses_what_it_cannot_write(tmp_path, fault):
    frames = {"none": [], "odd": moving_frames(2, 95, 128),
              "mixed": [*moving_frames(2), *moving_frames(1, 64, 64)]}[fault]  # fmt: skip
    with pytest.raises(ValueError):
        encode(tmp_path / "x.mp4", frames)
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_every_kind(tmp_path):
    rgb = moving_frames(1, 40, 60)[0]
    Image.fromarray(rgb).save(tmp_path / "plain.png")
    assert np.array_equal(read_frames(tmp_path / "plain.png", 8).frames, rgb[None])

    alpha = np.dstack([rgb, np.where(np.arange(60) < 30, 255, 0) * np.ones((40, 1))]).astype(np.uint8)
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    got = read_frames(tmp_path / "alpha.png", 1).frames[0]
    assert np.array_equal(got[:, :30], rgb[:, :30]) and not got[:, 30:].any()

    deep = (rgb[..., 0].astype(np.uint16) << 8) + 77
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(read_frames(tmp_path / "deep.png", 1).frames[0], np.repeat(rgb[..., :1], 3, 2))

    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    assert np.abs(read_frames(tmp_path / "cmyk.jpg", 1).frames[0].astype(int) - rgb).mean() < 4

    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    turned = read_frames(tmp_path / "turned.png", 1)
    assert np.array_equal(turned.frames[0], np.rot90(rgb, -1)) and (turned.width, turned.height) == (40, 60)


def test_animation_is_a_clip(tmp_path):
    shades = [Image.new("RGB", (32, 32), (v, 0, 0)) for v in (0, 60, 120, 180, 240)]
    shades[0].save(tmp_path / "a.gif", save_all=True, append_images=shades[1:], duration=100)
    clip = read_frames(tmp_path / "a.gif", 2)
    assert clip.decoder == "pillow" and clip.indices.tolist() == [1, 3]
    assert np.allclose(clip.pts, [0.1, 0.3]) and clip.fps == pytest.approx(10)
    assert clip.frames[:, 0, 0, 0].tolist() == [60, 180]


def test_playlists_and_addresses_are_not_followed(tmp_path, make_clip):
    make_clip(tmp_path / "clip.mp4")
    playlist = tmp_path / "list.mp4"
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n")
    with pytest.raises(MediaError, match="not a readable"):
        read_frames(playlist, 1)
    with pytest.raises(MediaError, match="file not found"):
        read_frames("http://localhost/clip.mp4", 1)
