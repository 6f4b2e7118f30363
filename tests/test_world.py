"""The synthetic world: the same bytes by every road, a label that only the pixels know, and simulated physics."""

import dataclasses
import hashlib
import re
import shutil

import cv2
import numpy as np
import pytest
from conftest import tiny_profile

from unmask.data import cameras, forgeries, scenes, subjects, world
from unmask.data.manifest import leakage, read_manifest
from unmask.data.video import probe, read_frames
from unmask.profile import ProfileError


def files(folder, below=""):
    """Path -> sha256 of all files."""
    found = {}
    for path in sorted((folder / below).rglob("*")):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def manifest(tiny_world):
    return read_manifest(tiny_world / "manifest.parquet")


@pytest.fixture
def copy(tiny_world, tmp_path):
    return shutil.copytree(tiny_world, tmp_path / "world")


def spec(**changes):
    return dict(tiny_profile().world) | changes


def test_two_workers_make_the_same_bytes(tiny_world, manifest, tmp_path):
    df = world.generate(tmp_path, spec(), seed=3, workers=2)
    assert files(tmp_path) == files(tiny_world) and df.equals(manifest)
    for path in manifest["path"].iloc[::7]:
        one, two = (read_frames(folder / path, 99).frames for folder in (tmp_path, tiny_world))
        assert np.array_equal(one, two)


def test_a_world_goes_on_where_it_was_killed(tiny_world, manifest, copy, capsys):
    whole = files(tiny_world)
    untouched = copy / manifest.loc[manifest["group_id"] == "world-a:p001", "path"].iloc[0]
    stamp = untouched.stat().st_mtime_ns
    (copy / ".parts/00000.json").unlink()
    (copy / ".parts/00003.json").unlink()
    media = manifest.groupby("group_id")["path"].agg(list)
    for path in (*media["world-a:p000"][::2], media["world-a:p002"][0]):
        (copy / path).unlink()
    half = copy / media["world-a:p000"][1]  # its pair was not finished
    half.write_bytes(half.read_bytes()[:100])
    (copy / manifest.loc[manifest["group_id"] == "world-b:p005", "annotations"].iloc[0]).unlink()
    (copy / "manifest.parquet").unlink()
    assert world.generate(copy, spec(), seed=3).equals(manifest)
    assert files(copy) == whole and untouched.stat().st_mtime_ns == stamp
    assert "making it anew" not in capsys.readouterr().out


def test_other_settings_or_another_simulator_replace_the_world(tiny_world, copy, monkeypatch, capsys):
    (copy / "notes.txt").write_text("mine")
    small = spec(pairs_train=1, pairs_val=0, pairs_test=0)
    before = set(files(copy, "world-a"))
    df = world.generate(copy, small, seed=4)
    assert "making it anew" in capsys.readouterr().out
    assert not before & set(files(copy, "world-a")) and (copy / "notes.txt").read_text() == "mine"
    media = {p for p in files(copy) if "/videos/" in p or "/images/" in p}
    assert media == set(df["path"]) and df["path"].str.startswith("world-b").sum() == 14
    monkeypatch.setattr(world, "source_hash", lambda *modules: "another version")
    world.generate(copy, small, seed=4)
    assert "making it anew" in capsys.readouterr().out
    assert {m.__name__.split(".")[-1] for m in world.SOURCES} >= {"world", "cameras", "forgeries", "scenes", "subjects"}


def test_one_world_does_not_depend_on_the_size_of_the_other(tiny_world, tmp_path):
    world.generate(tmp_path, spec(pairs_b=0), seed=3)
    assert files(tmp_path, "world-a") == files(tiny_world, "world-a") and not files(tmp_path, "world-b")


@pytest.mark.parametrize("size", [65, 30, 0])
def test_a_size_that_no_video_can_have_is_refused(tmp_path, size):
    with pytest.raises(ProfileError, match=f"even number of pixels from 32 on, not {size}"):
        world.generate(tmp_path / "out", spec(size=size))
    assert not (tmp_path / "out").exists()


def test_pairs_are_the_units_that_splits_keep_apart(manifest):
    assert leakage(manifest).empty
    assert (manifest.groupby("group_id")["subject"].nunique() == 2).all()
    assert (manifest.groupby("subject")["group_id"].nunique() == 1).all()
    splits = manifest.groupby(["dataset", "split"])["group_id"].nunique().to_dict()
    assert splits == {("world-a", "train"): 2, ("world-a", "val"): 1, ("world-a", "test"): 2, ("world-b", "test"): 1}
    per_person = manifest.groupby("subject")[["kind", "method"]].value_counts().unstack("subject")
    assert per_person.min(axis=1).to_dict() == per_person.max(axis=1).to_dict() == {
        ("image", "real"): 1, ("image", "synthesis"): 1, **{("video", m): 1 for m in ("real", *world.METHODS)},
    }  # fmt: skip


def test_donors_are_the_other_person_of_the_pair(manifest):
    partner = {}
    for _, pair in manifest.groupby("group_id"):
        a, b = sorted(set(pair["subject"]))
        partner |= {a: b, b: a}
    borrowed = manifest["method"].isin(["swap", "reenact"])
    assert (manifest.loc[borrowed, "source_id"] == manifest.loc[borrowed, "subject"].map(partner)).all()
    assert (manifest.loc[~borrowed, "source_id"] == "").all()


def test_the_worlds_share_no_camera_and_a_forgery_keeps_that_of_its_target(manifest):
    by_world = manifest.groupby("dataset")["camera"].agg(set)
    assert not by_world["world-a"] & by_world["world-b"] and len(by_world["world-a"]) == 3
    assert (manifest.groupby("subject")["camera"].nunique() == 1).all()


def test_the_file_does_not_tell_the_label(tiny_world, manifest):
    videos = manifest[manifest["kind"] == "video"]
    facts, options, sizes = {}, {}, {}
    for row in manifest.itertuples():
        path = tiny_world / row.path
        assert re.fullmatch(r"world-[ab]/(videos|images)/[0-9a-f]{12}\.(mp4|png)", row.path)
        facts.setdefault((row.kind, row.dataset), set()).add(probe(path))
        sizes.setdefault((row.kind, row.group_id), set()).add(path.stat().st_size)
        if row.kind == "video":
            found = re.search(rb"x264 - core .*?options: ([^\0\x80]+)", path.read_bytes())
            options.setdefault(row.subject, set()).add(found[1].decode())
    assert all(len(found) == 1 for found in (*facts.values(), *options.values(), *sizes.values()))
    assert len(set.union(*options.values())) > 1, "settings differ between people"
    # The order of the manifest is that of the hashes, so labels come mixed.
    assert 1 < videos["label"].diff().abs().sum() < len(videos)
    assert len(set(manifest["path"].str[-16:])) == len(manifest)


def test_landmarks_and_masks_belong_to_every_frame(tiny_world, manifest):
    masks = {p for p in files(tiny_world) if "/masks/" in p}
    assert len(masks) == (manifest["label"] == 1).sum()
    for row in manifest.itertuples():
        count = 5 if row.kind == "video" else 1
        landmarks = np.load(tiny_world / row.annotations)["landmarks"]
        assert landmarks.shape == (count, 81, 2) and landmarks.dtype == np.float32
        assert 0 < landmarks.min() and landmarks.max() < 95, "faces are inside the picture"
        mask = row.path.replace("/videos/", "/masks/").replace("/images/", "/masks/")[:-4] + ".npz"
        assert (mask in masks) == (row.label == 1)
        if row.label:
            painted = np.load(tiny_world / mask)["mask"]
            assert painted.shape == (count, 96, 96) and painted.dtype == np.uint8
            assert (painted.max((1, 2)) > 250).all() and (painted == 0).mean() > 0.5


def test_a_forgery_changes_the_file_inside_its_mask(tiny_world, manifest):
    """After encoding too, the difference to the real clip of the same take is where the mask is."""
    for subject, own in manifest[(manifest["kind"] == "video") & (manifest["dataset"] == "world-a")].groupby("subject"):
        paths = own.set_index("method")["path"]
        real = read_frames(tiny_world / paths["real"], 99).frames.astype(float)
        for method in world.METHODS:
            mask = np.load(tiny_world / paths[method].replace("/videos/", "/masks/").replace(".mp4", ".npz"))["mask"]
            change = np.abs(read_frames(tiny_world / paths[method], 99).frames - real).mean(3)
            assert change[mask > 200].mean() > 1.15 * change[mask == 0].mean(), (subject, method)


@pytest.fixture(scope="module")
def takes():
    found = []
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        take = scenes.film(subjects.sample_subject(rng), rng, 6, 25, 96)
        frames = (255 * np.clip(take.radiance, 0, 1) ** (1 / 2.2)).astype(np.uint8)
        found.append((frames, take.landmarks))
    return found


def forge(method, takes, difficulty, seed=0, blend="alpha"):
    (frames, points), (source, source_points) = takes
    rng = np.random.default_rng(seed)
    if method == "swap":
        return forgeries.swap(frames, points, source, source_points, rng, difficulty, blend)
    if method == "reenact":
        return forgeries.reenact(frames, points, source_points, rng, difficulty)
    if method == "texture":
        return forgeries.texture(frames, points, rng, difficulty)
    noise = np.random.default_rng(5).uniform(0, 255, (6, 96, 96, 3)).astype(np.float32)
    return forgeries.synthesise(frames, points, lambda i, side: noise[i, :side, :side], rng, difficulty)


@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("method", [*world.METHODS, "multiband"])
def test_a_forgery_equals_its_target_outside_the_mask(takes, method, difficulty):
    blend = "multiband" if method == "multiband" else "alpha"
    fake = forge("swap" if method == "multiband" else method, takes, difficulty, blend=blend)
    frames, points = takes[0]
    assert fake.frames.shape == frames.shape and fake.frames.dtype == np.uint8
    assert fake.mask.shape == frames.shape[:3] and fake.mask.min() == 0 and 0.9 < fake.mask.max() <= 1
    assert fake.landmarks.shape == points.shape and fake.landmarks.dtype == np.float32
    outside = fake.mask == 0
    assert outside.mean() > 0.4 and np.array_equal(fake.frames[outside], frames[outside])
    assert (fake.frames[~outside] != frames[~outside]).any(1).mean() > 0.3
    again = forge("swap" if method == "multiband" else method, takes, difficulty, blend=blend)
    assert np.array_equal(again.frames, fake.frames)


@pytest.mark.parametrize("method", world.METHODS)
def test_a_careful_forgery_is_closer_to_its_target(takes, method):
    def change(difficulty):
        fakes = [forge(method, takes, difficulty, seed) for seed in range(3)]
        return np.mean([np.abs(f.frames.astype(float) - takes[0][0])[f.mask > 0.9].mean() for f in fakes])

    assert change(1.0) < change(0.0)


def test_an_uneven_kernel_leaves_the_checkerboard_of_transposed_convolutions():
    flat = np.full((24, 24, 3), 100, np.float32)
    inner = (slice(8, -8), slice(8, -8))
    np.testing.assert_allclose(forgeries.upsample(flat, 96, 0.0)[inner], 100, rtol=1e-5)
    uneven = forgeries.upsample(flat, 48, 0.2)[inner][..., 0]
    assert np.ptp(uneven[::2, ::2]) < 1e-3 and uneven[0, 0] / uneven[1, 1] == pytest.approx(1.2)


POSES = [
    subjects.Pose(0, 0, 0, 64.3, 60.8, 24.0, 0.2, 0.1, 1.0),
    subjects.Pose(0.35, -0.15, 0.2, 58.0, 66.5, 22.0, 0.8, 0.5, 0.6),
    subjects.Pose(-0.3, 0.2, -0.15, 70.2, 63.1, 26.0, 0.0, -0.2, 0.9),
]


def person(**changes):
    subject = subjects.sample_subject(np.random.default_rng(11))
    return dataclasses.replace(subject, glasses=False, beard=0.0, **changes)


def draw(subject, pose):
    light = np.array([0.2, -0.3, 0.9]) / np.linalg.norm([0.2, -0.3, 0.9])
    return subjects.render_head(subject, subjects.base_texture(subject), pose, light, 128)


@pytest.mark.parametrize("pose", POSES)
def test_landmarks_are_where_the_head_shows_them(monkeypatch, pose):
    """A soft dot painted on the texture at a landmark is seen at that landmark of the picture."""
    subject = person()
    textures = subjects.base_texture(subject)[0], np.zeros((subjects.TEXTURE, subjects.TEXTURE, 2), np.float32)
    y, x = np.mgrid[:128, :128]
    rows, columns = np.mgrid[: subjects.TEXTURE, : subjects.TEXTURE]
    errors = []
    for k in range(17, 68):

        def dot(subject, base, pose, points, k=k):
            at = (points[k] + subjects.EXTENT) * subjects.TEXTURE / (2 * subjects.EXTENT) - 0.5
            distance = (columns - at[0]) ** 2 + (rows - at[1]) ** 2
            return np.repeat(np.exp(-distance / (2 * 6**2))[..., None], 3, 2).astype(np.float32)

        monkeypatch.setattr(subjects, "frame_texture", dot)
        light = np.array([0.0, 0.0, 1.0])
        radiance, _, landmarks = subjects.render_head(subject, textures, pose, light, 128)
        seen = np.maximum(radiance[..., 0] - 0.08, 0)  # gloss adds 0.05 at most
        errors.append(np.array([(seen * x).sum(), (seen * y).sum()]) / seen.sum() - landmarks[k])
    assert np.abs(errors).max() < 0.35 and np.abs(np.mean(errors, 0)).max() < 0.1


@pytest.mark.parametrize("pose", POSES)
def test_lips_and_eyes_are_inside_their_landmarks(pose):
    picture, _, points = draw(person(), pose)

    def changed(**colours):
        other, _, _ = draw(person(**colours), pose)
        rows, columns = np.nonzero(np.abs(other - picture).max(2) > 0.02)
        return np.stack([columns, rows], 1)

    lips, mouth = changed(lips=np.array([0.0, 1.0, 0.0])), points[48:60]
    np.testing.assert_allclose([lips.min(0), lips.max(0)], [mouth.min(0), mouth.max(0)], atol=1.6)
    irises, nose = changed(iris=np.array([0.0, 1.0, 0.0])), points[27, 0]
    for eye, iris in ((points[36:42], irises[irises[:, 0] < nose]), (points[42:48], irises[irises[:, 0] > nose])):
        assert (iris >= eye.min(0) - 1).all() and (iris <= eye.max(0) + 1).all()
        np.testing.assert_allclose(iris.mean(0), eye.mean(0), atol=1)


def test_points_have_the_order_of_ibug():
    _, cover, points = draw(person(), POSES[0])
    assert (np.diff(points[0:17, 0]) > 0).all() and points[:68, 1].argmax() == 8
    assert (np.diff(points[17:27, 0]) > 0).all() and (np.diff(points[27:31, 1]) > 0).all()
    assert points[36, 0] < points[39, 0] < points[42, 0] < points[45, 0]
    assert points[37, 1] < points[41, 1] and points[44, 1] < points[46, 1], "upper lids above lower lids"
    assert (
        points[48, 0] < points[51, 0] < points[54, 0] and points[51, 1] < points[62, 1] < points[66, 1] < points[57, 1]
    )
    assert (np.diff(points[68:81, 0]) > 0).all() and (points[68:81, 1] <= points[[0, 16], 1].max()).all()
    assert all(cover[round(y), round(x)] == 1 for x, y in points[17:68])


def camera(rng, **changes):
    model = dataclasses.replace(cameras.sample_model("M", rng), **changes)
    return cameras.Camera("M1", model, np.zeros((64, 64), np.float32))


@pytest.mark.parametrize("bayer", sorted(cameras.BAYER))
def test_colours_and_places_survive_every_bayer_order(bayer):
    plain = {"blur": 0.3, "vignetting": 0.0, "shot": 0.0, "read": 0.0, "white_balance": (1.0,) * 3, "gamma": 1.0}
    device = camera(np.random.default_rng(0), bayer=bayer, **plain)
    colour = np.float32([0.8, 0.4, 0.15])
    flat = cameras.expose(np.broadcast_to(colour, (64, 64, 3)).copy(), device, np.random.default_rng(0))
    np.testing.assert_allclose(flat[4:-4, 4:-4].reshape(-1, 3) - 255 * 0.9 * colour, 0, atol=1)
    ramp = np.linspace(0.1, 0.9, 64, dtype=np.float32)[:, None] * np.linspace(0.5, 1, 64, dtype=np.float32)
    sloped = cameras.expose(np.repeat(ramp[..., None], 3, 2), device, np.random.default_rng(0))
    np.testing.assert_allclose(sloped[4:-4, 4:-4] - 255 * 0.9 * ramp[4:-4, 4:-4, None], 0, atol=1.5)


def test_light_falls_off_noise_grows_and_white_balance_and_gamma_apply():
    rng = np.random.default_rng(1)
    grey = np.full((64, 64, 3), 0.4, np.float32)
    quiet = {"shot": 0.0, "read": 0.0, "white_balance": (1.0,) * 3, "gamma": 1.0}
    dark = cameras.expose(grey, camera(rng, vignetting=0.3, **quiet), rng)
    assert dark[2, 2].mean() / dark[32, 32].mean() == pytest.approx(0.7, abs=0.05)
    noisy = camera(rng, vignetting=0.0, gamma=1.0, white_balance=(1.0,) * 3, shot=1.5, read=4.0)
    low, high = (cameras.expose(np.full_like(grey, v), noisy, rng).std() for v in (0.05, 0.8))
    assert high > 2 * low > 0
    warm = camera(rng, **quiet | {"vignetting": 0.0, "white_balance": (1.1, 1.0, 0.9)})
    red, green, blue = cameras.expose(grey, warm, rng)[8:-8, 8:-8].reshape(-1, 3).mean(0)
    assert (red / green, blue / green) == pytest.approx((1.1, 0.9), abs=0.02)
    bright = cameras.expose(grey, camera(rng, **quiet | {"vignetting": 0.0, "gamma": 2.0}), rng)
    assert bright[32, 32].mean() == pytest.approx(255 * np.sqrt(0.36), abs=2)


def test_a_camera_is_known_by_its_pattern():
    devices = cameras.make_cameras("A", 5, 96, 0.02, np.random.default_rng(4))
    assert [d.name for d in devices] == ["AA1", "AA2", "AB1", "AB2", "AC1"]
    assert devices[0].model == devices[1].model != devices[2].model
    rng = np.random.default_rng(5)

    def fingerprint(device):
        frames = [cameras.expose(np.full((96, 96, 3), v, np.float32), device, rng) for v in rng.uniform(0.2, 0.7, 8)]
        grey = np.array(frames, np.float32)[..., 1]
        return np.mean([g - cv2.GaussianBlur(g, (0, 0), 1.5) for g in grey], 0)[8:-8, 8:-8].ravel()

    first, second = ([fingerprint(d) for d in devices] for _ in range(2))
    likeness = np.corrcoef(first, second)[:5, 5:]
    others = likeness[~np.eye(5, dtype=bool)]
    assert np.diag(likeness).min() > 0.6 and np.abs(others).max() < 0.25
    clean = dataclasses.replace(devices[0], prnu=np.zeros((96, 96), np.float32))
    assert np.corrcoef(fingerprint(clean), first[0])[0, 1] < 0.25, "without the pattern nothing is left of it"


def test_a_take_is_metered_and_repeatable():
    rng = np.random.default_rng(9)
    subject = subjects.sample_subject(rng)
    one, two = (scenes.film(subject, np.random.default_rng(3), 5, 25, 64) for _ in range(2))
    assert np.array_equal(one.radiance, two.radiance) and np.array_equal(one.landmarks, two.landmarks)
    assert one.radiance.shape == (5, 64, 64, 3) and one.radiance.dtype == np.float32
    assert np.isfinite(one.radiance).all() and one.radiance.min() >= 0 and 0.28 <= one.radiance[0].mean() <= 0.4
    assert len(one.poses) == 5 and np.abs(np.diff(one.landmarks, axis=0)).max() > 0, "the head moves"
    other = scenes.film(subject, np.random.default_rng(4), 5, 25, 64)
    assert not np.allclose(other.radiance[0], one.radiance[0], atol=0.05)


def test_the_contact_sheet_has_a_row_per_person(tiny_world, manifest):
    assert world.contact_sheet(tiny_world, manifest, people=3).shape == (3 * 96, 5 * 96, 3)
