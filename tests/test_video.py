"""Decoding: the right frames, the same from both decoders, and nothing that hangs."""

import io
import os
import signal
import struct
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.sidedata.sidedata import Type
from conftest import moving_frames, textured_frames
from PIL import Image

from unmask.data import decoding, video
from unmask.data.frames import in_a_row
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


@pytest.mark.parametrize(
    ("count", "fps", "expected"),  # of 48 frames, 25 a second: the middle lies at frame 23.5
    [
        (8, 0, [20, 21, 22, 23, 24, 25, 26, 27]),
        (3, 0, [22, 23, 24]),
        (4, 5, [16, 21, 26, 31]),
        (5, 12.5, [19, 21, 23, 25, 27]),  # 19.5 onwards, and of two frames as near the earlier
        (5, 10, [18, 20, 23, 25, 28]),  # every two and a half frames, without drift
        (4, 60, [22, 23, 24, 25]),  # faster than the clip
        (1, 5, [23]),
        (8, 2, [5, 17, 30, 42]),  # 1.88 s hold four points half a second apart
        (99, 0, list(range(48))),
    ],
)
def test_dense_frames_follow_each_other_in_the_middle(tmp_path, count, fps, expected):
    shades = [np.full((64, 64, 3), 20 + 4 * i, np.uint8) for i in range(48)]
    path = encode(tmp_path / "shades.mp4", shades, bframes=3, gop=12, crf=10)
    clip = read_frames(path, count, sampling="dense", fps=fps)
    facts, frames = decoding.read(str(path), count, None, ["pyav"], sampling="dense", fps=fps)
    assert (clip.decoder, facts["decoder"]) == ("decord", "pyav")
    for indices, pts, pictures in ((clip.indices, clip.pts, clip.frames), (facts["indices"], facts["pts"], frames)):
        assert np.asarray(indices).tolist() == expected and np.allclose(pts, np.array(expected) / 25)
        assert [round((picture.mean() - 20) / 4) for picture in pictures] == expected


def test_dense_frames_of_a_variable_rate_keep_the_stride_in_seconds(tmp_path):
    ticks = [0, 100, 200, 300, 320, 340, 360, 380, 400, 500, 640, 700, 800]
    path = write_vfr(tmp_path / "vfr.mp4", ticks)
    clip = read_frames(path, 5, sampling="dense", fps=5)
    assert clip.decoder == "decord" and clip.indices.tolist() == [0, 2, 8, 10, 12]
    assert decoding.read(str(path), 5, None, ["pyav"], sampling="dense", fps=5)[0]["indices"] == [0, 2, 8, 10, 12]
    assert np.allclose(clip.pts - clip.pts[0], [0, 0.2, 0.4, 0.64, 0.8], atol=2e-3)


def test_dense_frames_are_the_nearest_in_time():
    rng = np.random.default_rng(0)
    for _ in range(200):
        times = rng.uniform(0, 9) + np.cumsum(rng.choice([0.01, 0.04, 0.1, 2.0], rng.integers(2, 80)))
        count, fps = int(rng.integers(1, 12)), float(rng.uniform(0.2, 0.9) / np.median(np.diff(times)))
        chosen = in_a_row(times, count, fps)
        grid = times[chosen[0]] + np.arange(count) / fps
        nearest = {int(np.abs(times - t).argmin()) for t in grid if t <= times[-1]}
        assert nearest <= set(chosen) <= nearest | {len(times) - 1} and (np.diff(chosen) > 0).all()
        assert len(chosen) <= min(count, (times[-1] - times[0]) * fps + 1.1)


def test_dense_frames_of_a_shorter_clip_than_promised(tmp_path, make_clip):
    path = make_clip(tmp_path / "clip.mp4", count=24)
    found = decoding.scan(str(path))
    found.pts, found.intact = np.arange(40) / 25, False
    view = decoding.View(sampling="dense", fps=12.5)
    assert decoding._with_pyav(str(path), 4, None, found, view)[1].tolist() == [8, 10, 12, 14]


def test_dense_frames_of_pictures(tmp_path):
    shades = [Image.new("RGB", (32, 32), (20 * v, 0, 0)) for v in range(10)]
    shades[3].save(tmp_path / "still.png")
    still = read_frames(tmp_path / "still.png", 4, sampling="dense", fps=5)
    assert still.frames.shape == (1, 32, 32, 3) and still.frames[0, 0, 0, 0] == 60
    times = [40] * 4 + [200] * 6  # milliseconds: frames at 0, 40, 80, 120, 160, 360, 560, 760, 960, 1160
    shades[0].save(tmp_path / "a.gif", save_all=True, append_images=shades[1:], duration=times)
    clip = read_frames(tmp_path / "a.gif", 3, sampling="dense", fps=2.5)
    assert clip.indices.tolist() == [4, 6, 8] and clip.frames[:, 0, 0, 0].tolist() == [80, 120, 160]
    assert np.allclose(clip.pts, [0.16, 0.56, 0.96])
    assert read_frames(tmp_path / "a.gif", 3, sampling="dense").indices.tolist() == [3, 4, 5]


@pytest.mark.parametrize("request_", [{"sampling": "densely"}, {"sampling": "dense", "fps": -1},
                                      {"sampling": "dense", "fps": float("nan")}])  # fmt: skip
def test_senseless_sampling_is_refused(tmp_path, make_clip, request_):
    with pytest.raises(ValueError, match="sampling"):
        read_frames(make_clip(tmp_path / "clip.mp4"), 1, **request_)
    with pytest.raises(ValueError, match="Key frames"):
        read_frames(tmp_path / "clip.mp4", 1, keyframes=True, sampling="dense")


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


def test_what_decord_cannot_do_has_the_whole_deadline(tmp_path, make_clip, monkeypatch):
    path = make_clip(tmp_path / "clip.mp4")
    decoder = Hung(1)
    monkeypatch.setattr(video, "_decoder", decoder)
    with pytest.raises(MediaError, match=r"^deadline of 0.5 s exceeded$"):
        read_frames(path, 2, deadline=0.5, keyframes=True)
    assert decoder.starts == 1
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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_pictures_as_stored_ignore_their_orientation(tmp_path, suffix, orientation):
    rgb, exif = moving_frames(1, 41, 60)[0], Image.Exif()
    exif[0x0112] = orientation
    plain, marked = tmp_path / f"plain.{suffix}", tmp_path / f"marked.{suffix}"
    Image.fromarray(rgb).save(plain)
    Image.fromarray(rgb).save(marked, exif=exif)
    expected = np.asarray(Image.open(plain))
    stored, shown = read_frames(marked, 1, upright=False), read_frames(marked, 1)
    assert np.array_equal(stored.frames[0], expected) and (stored.width, stored.height) == (60, 41)
    turned = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
              6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
              8: np.rot90}[orientation](expected)  # fmt: skip
    assert np.array_equal(shown.frames[0], turned) and (shown.width, shown.height) == turned.shape[1::-1]


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("keyframes", [False, True])
def test_videos_as_stored_ignore_their_rotation_mark(tmp_path, degrees, keyframes):
    path = encode(tmp_path / "clip.mp4", textured_frames(12, 98, 130), gop=4)
    marked, plain = rotate_mark(path, degrees), read_frames(path, 3, keyframes=keyframes)
    clip = read_frames(marked, 3, upright=False, keyframes=keyframes)
    assert clip.decoder == ("pyav" if keyframes else "decord")
    assert np.array_equal(clip.frames, plain.frames) and (clip.width, clip.height) == (130, 98)
    assert clip.scale == 1.0
    by_pyav = decoding.read(str(marked), 3, None, ["pyav"], upright=False)[1]
    assert keyframes or np.array_equal(np.stack(by_pyav), plain.frames)
    cut = read_frames(marked, 3, upright=False, crop=32, keyframes=keyframes)
    assert np.array_equal(cut.frames, plain.frames[:, 32:64, 48:80])  # (98 - 32) / 2 = 33 and (130 - 32) / 2 = 49


def test_motion_jpeg_as_stored_ignores_the_mark_in_its_pictures(tmp_path):
    rgb, exif, data = moving_frames(1, 48, 64)[0], Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(rgb).save(data, "JPEG", exif=exif)
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for i in range(3):
            packet = av.Packet(data.getvalue())
            packet.pts = packet.dts = i
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 5), stream, True
            container.mux(packet)
    for clip in (read_frames(path, 3, upright=False), read_frames(path, 3, upright=False, keyframes=True, qp=True)):
        assert (clip.width, clip.height) == (64, 48) and clip.frames.shape == (3, 48, 64, 3)
        assert np.abs(clip.frames.astype(int) - rgb).mean() < 4 and np.isnan(clip.qp).all()


@pytest.mark.parametrize(
    ("height", "width", "crop", "rows", "columns"),
    [
        (96, 128, 40, (28, 68), (44, 84)),
        (97, 131, 40, (28, 68), (44, 84)),  # 28.5 and 45.5
        (98, 130, 40, (28, 68), (44, 84)),  # 29 and 45
        (97, 131, 33, (32, 65), (48, 81)),  # 32 and 49
        (40, 131, 50, (0, 40), (40, 90)),  # fewer rows than the crop
        (41, 59, 60, (0, 41), (0, 59)),
        (97, 131, 1, (48, 49), (64, 65)),  # 48 and 65
    ],
)
def test_crop_is_the_centre_from_an_even_origin(tmp_path, height, width, crop, rows, columns):
    noise = np.random.default_rng(0).integers(0, 256, (4, height, width, 3), np.uint8)
    Image.fromarray(noise[0]).save(tmp_path / "noise.png")
    clip = read_frames(tmp_path / "noise.png", 1, crop=crop)
    assert np.array_equal(clip.frames[0], noise[0, slice(*rows), slice(*columns)])
    assert (clip.width, clip.height, clip.scale) == (width, height, 1.0)

    path = encode(tmp_path / "noise.mkv", noise, crf=0, pix_fmt="yuv444p", gop=2)
    whole = read_frames(path, 4).frames[:, slice(*rows), slice(*columns)]
    for asked in ({}, {"qp": True}, {"keyframes": True}):
        clip = read_frames(path, 4, crop=crop, **asked)
        assert clip.decoder == ("pyav" if asked else "decord")
        assert np.array_equal(clip.frames, whole[clip.indices])
        assert (clip.width, clip.height, clip.scale) == (width, height, 1.0)


def test_crops_do_not_hide_a_change_of_size(tmp_path):
    parts = []
    for name, height, width in (("a", 96, 128), ("b", 64, 96)):
        with av.open(str(tmp_path / f"{name}.h264"), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for picture in moving_frames(6, height, width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        parts.append((tmp_path / f"{name}.h264").read_bytes())
    (tmp_path / "both.h264").write_bytes(b"".join(parts))
    assert read_frames(tmp_path / "a.h264", 9, crop=32, keyframes=True).frames.shape == (1, 32, 32, 3)
    for keyframes in (False, True):
        with pytest.raises(MediaError, match="frame size changes"):
            read_frames(tmp_path / "both.h264", 9, crop=32, keyframes=keyframes)


@pytest.mark.parametrize("request_", [{"crop": 0}, {"crop": 32, "max_side": 64}])
def test_senseless_crops_are_refused(tmp_path, make_clip, request_):
    with pytest.raises(ValueError, match="crop"):
        read_frames(make_clip(tmp_path / "clip.mp4"), 1, **request_)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_key_frames_are_spread_alone(tmp_path, make_clip, suffix):
    path = make_clip(tmp_path / f"clip.{suffix}", count=50, gop=10, bframes=3)
    whole = read_frames(path, 50)
    for count, expected in ((99, [0, 10, 20, 30, 40]), (5, [0, 10, 20, 30, 40]), (2, [10, 30]), (1, [20])):
        clip = read_frames(path, count, keyframes=True)
        assert clip.indices.tolist() == expected and clip.total == 50
        assert np.array_equal(clip.frames, whole.frames[expected])
        assert np.allclose(clip.pts, np.array(expected) / 25, atol=1e-3)
    single = make_clip(tmp_path / "single.mp4", count=20, gop=99)
    assert read_frames(single, 4, keyframes=True).indices.tolist() == [0]
    Image.fromarray(whole.frames[0]).save(tmp_path / "still.png")
    assert np.array_equal(read_frames(tmp_path / "still.png", 4, keyframes=True).frames, whole.frames[:1])


def test_key_frames_of_open_groups_have_their_place_in_display_order(tmp_path):
    path = write_x264(tmp_path / "open.mp4", {"g": "10", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}, count=30)
    with av.open(str(path)) as container:  # B-frames that are shown before a key frame follow it in the file.
        keys = [i for i, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    clip = read_frames(path, 99, keyframes=True)
    assert keys[1] < 10 and clip.indices.tolist() == [0, 10, 20]
    assert np.array_equal(clip.frames, read_frames(path, 99).frames[[0, 10, 20]])


def _overwrite(path: Path, damaged, keep: int = 0) -> None:
    """Fill with zeros, but for `keep` bytes, the packets of a video that `damaged(place in the file, packet)` names."""
    with av.open(str(path)) as container:
        places = [(p.pos, p.size) for i, p in enumerate(container.demux(video=0)) if p.size and damaged(i, p)]
    data = bytearray(path.read_bytes())
    for position, size in places:
        data[position + keep : position + size] = bytes(size - keep)
    path.write_bytes(data)


def test_key_frames_need_no_other_frame(tmp_path, make_clip):
    path = make_clip(tmp_path / "clip.mp4", count=50, gop=10)
    whole = read_frames(path, 50).frames
    _overwrite(path, lambda i, packet: not packet.is_keyframe)
    clip = read_frames(path, 99, keyframes=True)
    assert clip.indices.tolist() == [0, 10, 20, 30, 40] and np.array_equal(clip.frames, whole[::10])


@pytest.mark.parametrize("keep", [0, 5])  # five bytes still say that a key frame follows
def test_damaged_key_frames_are_passed_over(tmp_path, make_clip, keep):
    path = make_clip(tmp_path / "clip.mp4", count=50, gop=10)
    whole = read_frames(path, 50).frames
    _overwrite(path, lambda i, packet: i == 20, keep)
    assert (20 in decoding.scan(str(path)).keys) == (keep == 5)
    assert read_frames(path, 1, keyframes=True).indices.tolist() == [30]  # the middle one of 0, 10, 30, 40
    clip = read_frames(path, 5, keyframes=True)
    assert clip.indices.tolist() == [0, 10, 30, 40] and np.array_equal(clip.frames, whole[[0, 10, 30, 40]])

    _overwrite(path, lambda i, packet: packet.is_keyframe, keep)
    with pytest.raises(MediaError, match="no decodable"):
        read_frames(path, 5, keyframes=True)


def test_a_key_frame_that_is_cut_short_is_not_used(tmp_path):
    path = write_x264(tmp_path / "clip.avi", {"g": "10", "x264-params": "scenecut=0"}, count=40)
    with av.open(str(path)) as container:
        packet = list(container.demux(video=0))[30]
        end = packet.pos + packet.size // 2
    path.write_bytes(path.read_bytes()[:end])
    assert read_frames(path, 9, keyframes=True).indices.tolist() == [0, 10, 20]


def write_x264(path: Path, options: dict[str, str], count: int = 12, pix_fmt: str = "yuv420p") -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 130, 98, pix_fmt
        for picture in textured_frames(count, 98, 130):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_quantiser_tells_how_coarse_a_clip_is(tmp_path):
    frames = textured_frames(12, 96, 128)
    fine = read_frames(encode(tmp_path / "fine.mp4", frames, crf=10), 12, qp=True)
    coarse = read_frames(encode(tmp_path / "coarse.mp4", frames, crf=35), 12, qp=True)
    assert fine.qp.dtype == np.float32 and fine.qp.shape == coarse.qp.shape == (12,)
    assert (coarse.qp - fine.qp).min() > 15 and abs((coarse.qp - fine.qp).mean() - 25) < 4
    assert np.isnan(read_frames(tmp_path / "fine.mp4", 12).qp).all()
    assert np.array_equal(fine.frames, read_frames(tmp_path / "fine.mp4", 12).frames)
    keys = read_frames(tmp_path / "fine.mp4", 12, keyframes=True, qp=True)
    assert np.array_equal(keys.qp, fine.qp[keys.indices])


def test_quantiser_is_the_one_of_the_encoder(tmp_path):
    path = write_x264(tmp_path / "p.mp4", {"qp": "20", "bf": "0", "g": "6", "x264-params": "scenecut=0"})
    # x264 makes I-frames finer than P-frames by the factor 1.4 in step size; six steps of QP double it.
    wanted = np.where(np.arange(12) % 6 == 0, round(20 - 6 * np.log2(1.4)), 20)
    assert np.array_equal(read_frames(path, 12, qp=True).qp, wanted)
    assert np.array_equal(read_frames(path, 12, keyframes=True, qp=True).qp, [17, 17])
    even = {"qp": "31", "x264-params": "ipratio=1:pbratio=1"}
    assert (read_frames(write_x264(tmp_path / "even.mp4", even), 12, qp=True).qp == 31).all()


def test_quantiser_is_unknown_without_h264(tmp_path):
    path = tmp_path / "mpeg4.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for picture in moving_frames(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    Image.fromarray(moving_frames(1)[0]).save(tmp_path / "still.png")
    for name, count in (("mpeg4.mp4", 4), ("still.png", 1)):
        clip = read_frames(tmp_path / name, 4, qp=True)
        assert clip.qp.shape == (count,) and np.isnan(clip.qp).all()


class _SideData(bytes):
    type = Type.VIDEO_ENC_PARAMS


def _exported(blocks=(3, -5, 8), count=None, offset=64, stride=20, kind=1, bits=8, keep=None) -> SimpleNamespace:
    """A frame with FFmpeg's struct as on a 64-bit machine: base 25, and one difference for each block."""
    head = struct.pack("<I4xQQii8i", len(blocks) if count is None else count, offset, stride, kind, 25, *[0] * 8)
    body = b"".join(struct.pack("<5i", 0, 0, 16, 16, delta).ljust(stride, b"\xff") for delta in blocks)
    component = SimpleNamespace(bits=bits)
    side_data = [_SideData((head.ljust(offset, b"\xff") + body)[:keep])]
    return SimpleNamespace(side_data=side_data, format=SimpleNamespace(components=[component]))


@pytest.mark.skipif(struct.calcsize("P") != 8, reason="the struct of a 64-bit machine")
def test_exported_quantisers_are_read_with_care():
    assert decoding.mean_qp(_exported()) == 25 + 2
    assert decoding.mean_qp(_exported(offset=72, stride=32)) == 27  # A later FFmpeg may add fields.
    assert decoding.mean_qp(_exported(blocks=())) == 25
    assert decoding.mean_qp(_exported(bits=10)) == 27 - 12
    wrong = [{"keep": 0}, {"keep": 63}, {"keep": 123}, {"count": 4}, {"count": 2**32 - 1}, {"kind": 0}, {"kind": -1},
             {"stride": 19, "blocks": ()}, {"blocks": (90, 90)}, {"blocks": (-60,)}]  # fmt: skip
    assert all(np.isnan(decoding.mean_qp(_exported(**change))) for change in wrong)
