"""The camera chapter: from files to clusters, what must not matter, controls that must fail, and judging by hand."""

import json
from dataclasses import replace

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import moving_frames, tiny_profile
from PIL import Image
from test_clustering import same_partition

from unmask import camera_clustering as cc
from unmask import camera_figures, cli
from unmask import fingerprints as fp
from unmask.data.manifest import COLUMNS, ManifestError, assign_groups, item_id, read_manifest, write_manifest
from unmask.data.video import encode
from unmask.fingerprints import FingerprintError

SETTINGS = fp.Settings(frames=4, crop=0, sigma=5.0)
SIZE = (96, 128)


def sensor(seed, size=SIZE):
    return np.random.default_rng(1000 + seed).normal(0, 0.03, size)


def soft(values, size):
    return cv2.resize(values, size[::-1], interpolation=cv2.INTER_CUBIC)


def expose(pattern, seed):
    """A picture uint8[H,W,3] of a soft scene of its own through a sensor's pattern, with 2 grey levels of noise."""
    rng = np.random.default_rng(seed)
    scene = soft(rng.uniform(70, 200, (4, 5, 3)), pattern.shape)
    return np.clip(scene * (1 + pattern[..., None]) + rng.normal(0, 2, scene.shape), 0, 255).astype(np.uint8)


def film(folder, count=3, each=6, suffix="png"):
    """Pictures of `count` cameras in mixed order; returns the camera of each by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    truth = {}
    for k in range(count * each):
        name = f"{k * 7 % (count * each):02d}.{suffix}"
        cv2.imwrite(str(folder / name), expose(sensor(k % count), k))
        truth[name] = f"camera {k % count}"
    return dict(sorted(truth.items()))


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """A folder of 18 pictures of three cameras, its truth, and the fingerprints and rows; not to be changed."""
    folder = tmp_path_factory.mktemp("filmed")
    truth = film(folder / "media")
    rows = cc.cluster_files(folder / "media", folder / "clusters.csv", SETTINGS)
    return folder, truth, rows


def as_manifest(folder, truth, **more):
    """A manifest of the pictures in `folder`, beside it."""
    rows = [
        dict.fromkeys(COLUMNS, "")
        | {"item_id": item_id("own", name), "root": folder.name, "path": name, "kind": "image", "dataset": "own",
           "split": "train", "label": k % 2, "method": ["real", "swap"][k % 2], "camera": camera, "subject": f"s{k}"}
        for k, (name, camera) in enumerate(truth.items())
    ]  # fmt: skip
    df = assign_groups(pd.DataFrame(rows).assign(**more).astype({"label": "int8"}))[list(COLUMNS)]
    write_manifest(df, path := folder.parent / "manifest.parquet")
    return path


# Files to clusters


def test_a_folder_is_clustered_by_camera(filmed):
    folder, truth, rows = filmed
    table = pd.read_csv(folder / "clusters.csv")
    assert list(table.columns) == ["path", "cluster"] and table["path"].tolist() == list(truth)
    assert same_partition(table["cluster"], list(truth.values())) and (table["cluster"] >= 0).all()
    assert rows["path"].tolist() == list(truth)
    document = json.loads((folder / "clusters.json").read_text())
    assert document["method"] == "linkage" and document["settings"]["frames"] == 4
    assert [medium["path"] for medium in document["media"]] == list(truth)
    assert str(folder) not in (folder / "clusters.json").read_text() + (folder / "clusters.csv").read_text()


@pytest.mark.parametrize("method", cc.METHODS)
def test_every_method_finds_them(filmed, method):
    folder, truth, rows = filmed
    buckets = cc.similarities(folder / "clusters.fingerprints", rows)
    assert same_partition(cc.cluster_rows(buckets, len(rows), method), list(truth.values()))


def test_failures_are_minus_one_and_folders_are_searched(tmp_path):
    truth = film(tmp_path / "media" / "a", count=2, each=4)
    (tmp_path / "media" / "bad.mp4").write_text("no video")
    (tmp_path / "media" / "notes.txt").write_text("not a medium")
    cc.cluster_files(tmp_path / "media", tmp_path / "c.csv", SETTINGS)
    table = pd.read_csv(tmp_path / "c.csv")
    assert table["path"].tolist() == [f"a/{name}" for name in truth] + ["bad.mp4"]
    assert table["cluster"].iloc[-1] == -1 and same_partition(table["cluster"][:-1], list(truth.values()))
    bad = json.loads((tmp_path / "c.json").read_text())["media"][-1]
    assert bad["status"] == "failed" and bad["reason"] == "not a readable picture or video"


def test_labels_and_cameras_of_a_manifest_change_nothing(tmp_path):
    truth = film(tmp_path / "media", each=4)
    found = []
    others = [f"c{i % 5}" for i in range(12)]
    swapped = {"label": [1, 0] * 6, "method": ["swap", "real"] * 6, "camera": others}
    for k, more in enumerate(({}, {"label": 0, "method": "real"}, {"camera": "", "split": "test"}, swapped)):
        manifest = as_manifest(tmp_path / "media", truth, **more)
        cc.cluster_files(manifest, tmp_path / f"{k}.csv", SETTINGS)
        found.append(((tmp_path / f"{k}.csv").read_bytes(), (tmp_path / f"{k}.json").read_bytes()))
    assert found[0] == found[1] == found[2] == found[3]
    table = pd.read_csv(tmp_path / "0.csv")
    assert table["path"].tolist() == list(truth) and same_partition(table["cluster"], list(truth.values()))


def test_a_folder_without_media_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ManifestError, match="no picture or video"):
        cc.cluster_files(tmp_path, tmp_path / "c.csv", SETTINGS)


def test_turned_pictures_stay_on_their_sensor(tmp_path):
    """A viewer's turn is a mark in the file; the stored pixels stay where the sensor had them."""
    truth = film(tmp_path / "media", count=2, each=5)
    for k, name in enumerate(truth):
        exif = Image.Exif()
        exif[0x0112] = [1, 6, 3, 8, 2][k % 5]
        with Image.open(tmp_path / "media" / name) as picture:
            picture.copy().save(tmp_path / "media" / name, exif=exif)
    rows = cc.cluster_files(tmp_path / "media", tmp_path / "c.csv", SETTINGS)
    assert set(rows["bucket"]) == {"128x96"} and same_partition(rows["cluster"], list(truth.values()))


def test_sizes_never_mix(tmp_path):
    (tmp_path / "media").mkdir()
    for k in range(12):  # of one camera, half of them cut at the bottom: the same sensor, but other frames
        picture = expose(sensor(0), k)
        cv2.imwrite(str(tmp_path / "media" / f"{k:02d}.png"), picture if k % 2 else picture[:80])
    rows = cc.cluster_files(tmp_path / "media", tmp_path / "c.csv", SETTINGS)
    assert rows["bucket"].tolist() == ["128x80", "128x96"] * 6
    assert same_partition(rows["cluster"], rows["bucket"]) and (rows["cluster"] >= 0).all()
    buckets = cc.similarities(tmp_path / "c.fingerprints", rows)
    for name, start in (("128x80", 0), ("128x96", 1)):
        assert buckets[name].where.tolist() == list(range(start, 12, 2)) and buckets[name].matrix.shape == (6, 6)


@pytest.mark.parametrize("seed", range(8))
def test_two_pictures_alone_are_one_camera_only_if_they_are(tmp_path, seed):
    """With two media there is a single pair, and nothing but moved fingerprints to learn chance from."""
    for name, cameras in (("same", (0, 0)), ("other", (0, 1))):
        (tmp_path / name).mkdir()
        for k, camera in enumerate(cameras):
            cv2.imwrite(str(tmp_path / name / f"{k}.png"), expose(sensor(10 * seed + camera), 100 * seed + k))
        found = cc.cluster_files(tmp_path / name, tmp_path / f"{name}.csv", SETTINGS)["cluster"].tolist()
        assert found == ([0, 0] if name == "same" else [-1, -1])


def test_numbers_of_buckets_do_not_meet():
    noise = np.random.default_rng(0).normal(0, 0.01, (4, 4))
    matrix = np.array([[1, 0.6, 0, 0], [0.6, 1, 0, 0], [0, 0, 1, 0.3], [0, 0, 0.3, 1]]) + (noise + noise.T) / 2
    buckets = {
        "a": cc.Compared(np.array([0, 1, 2, 3]), matrix, 0.01),
        "b": cc.Compared(np.array([8, 7, 6, 5]), matrix, 0.01),
    }
    labels = cc.cluster_rows(buckets, 10)
    assert same_partition(labels, [0, 0, 1, 1, -1, 3, 3, 2, 2, -1]) and labels[4] == labels[9] == -1
    recordings = cc.recording_rows(buckets, 10)  # 0.6 is more than a sensor alone gives
    assert same_partition(recordings, [0, 0, 1, 2, -1, 5, 4, 3, 3, -1]) and recordings[4] == recordings[9] == -1


def test_the_faces_of_chapter_one_are_kept_apart(tiny_world, tiny_crops, tmp_path):
    manifest = read_manifest(tiny_world / "manifest.parquet").iloc[:8]
    rows = cc.take(manifest, tiny_world / "manifest.parquet", tmp_path, cc.settings_of(tiny_profile()), tiny_crops)
    assert rows["item_id"].tolist() == manifest["item_id"].tolist() and (rows["face"] > 100).all()
    without = cc.take(manifest, tiny_world / "manifest.parquet", tmp_path, cc.settings_of(tiny_profile()))
    assert (without["face"] == 0).all()


def test_settings_come_from_the_profile():
    profile = tiny_profile(cameras__frames=7, cameras__keyframes=True)
    assert cc.settings_of(profile) == fp.Settings(7, 512, 5.0, True, False)
    assert cc.settings_of(profile, {"frames": None, "crop": 64}) == fp.Settings(7, 64, 5.0, True, False)


# The command


def test_the_command_clusters_a_folder(tmp_path, capsys):
    truth = film(tmp_path / "media", count=2, each=4)
    (tmp_path / "media" / "bad.png").write_text("x")
    arguments = ["cluster", str(tmp_path / "media"), "--out", str(tmp_path / "c.csv"), "--profile", "tiny"]
    assert cli.main([*arguments, "--crop", "80", "--method", "spectral", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "9 media: 2 cameras, 0 unattributed, 1 failed" in said
    document = json.loads((tmp_path / "c.json").read_text())
    assert document["method"] == "spectral" and document["settings"]["crop"] == 80
    assert same_partition(pd.read_csv(tmp_path / "c.csv")["cluster"][:-1], list(truth.values()))


@pytest.mark.parametrize("target", ["nowhere.parquet", "empty"])
def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys, target):
    (tmp_path / "empty").mkdir()
    assert cli.main(["cluster", str(tmp_path / target), "--out", str(tmp_path / "c.csv")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("unmask: There is no ") and said.err.count("\n") == 1 and said.out == ""
    assert not (tmp_path / "c.csv").exists()


# Controls


def test_controls_fail_where_the_sensor_does_not_speak(filmed):
    folder, truth, rows = filmed
    found = cc.controls(folder / "clusters.fingerprints", rows, "linkage", seed=0)
    again = cc.controls(folder / "clusters.fingerprints", rows, "linkage", seed=0)
    assert all(np.array_equal(found[name], again[name]) for name in found)
    table = cc.judge(list(truth.values()), found).set_index("method")
    assert list(table.index) == ["shifted", "scene", "random"]
    assert (found["random"] == -1).all() and table.loc["shifted", "recall"] < 0.2
    assert abs(table["ari"]).max() < 0.25  # the scenes were drawn without regard to the camera


def test_scenes_are_grouped_by_scene(tmp_path):
    """Three scenes, each taken twice by each of two cameras: scenes find scenes, whatever number they are told."""
    (tmp_path / "media").mkdir()
    for k in range(12):
        light = soft(np.random.default_rng(k).normal(0, 6, (4, 5, 3)), SIZE)
        picture = np.clip(expose(sensor(k % 2), 50 + k // 4) + light, 0, 255).astype(np.uint8)
        cv2.imwrite(str(tmp_path / "media" / f"{k:02d}.png"), picture)
    rows = cc.cluster_files(tmp_path / "media", tmp_path / "c.csv", SETTINGS)
    scenes, cameras = np.arange(12) // 4, [f"c{k % 2}" for k in range(12)]
    out = tmp_path / "c.fingerprints"
    assert same_partition(cc.controls(out, rows, "linkage", 0)["scene"], scenes)
    told = cc.scenes_with_known_count(out, rows, cameras)
    assert len(set(told)) == 2 and all(len(set(told[scenes == k])) == 1 for k in range(3))
    three = cc.scenes_with_known_count(out, rows, [f"c{k}" for k in np.arange(12) % 3])
    assert same_partition(three, scenes)


# Judging


def test_judging_by_hand():
    """Cameras aabb, found 0 0 0 -1: of six pairs two are of one camera; three were joined, one of them rightly."""
    table = cc.judge(["a", "a", "", "b", "b"], {"x": np.array([0, 0, 5, 0, -1]), "y": np.array([1, 1, 1, 0, 0])})
    x, y = table.to_dict("records")
    assert (x["method"], x["precision"], x["recall"], x["unattributed"]) == ("x", pytest.approx(1 / 3), 0.5, 0.25)
    assert x["purity"] == 0.75 and x["cameras"] == 2 and x["clusters"] == 1
    assert y["ari"] == 1 and y["clusters"] == 2  # the medium of an unknown camera does not count
    assert cc.judge(["", ""], {"x": np.array([0, 0])}).empty


def test_pairs_leave_out_versions_of_one_recording():
    matrix = np.array([[1, 0.9, 0.2, 0.0], [0.9, 1, 0.3, -0.1], [0.2, 0.3, 1, 0.25], [0, -0.1, 0.25, 1]])
    got = cc.pairs(matrix, ["a", "a", "a", "b"], [7, 7, 8, 9])
    found = sorted(zip(got["ncc"], got["same"], strict=True))
    assert found == [(-0.1, False), (0.0, False), (0.2, True), (0.25, False), (0.3, True)]
    # 0.2 beats two of the three others, 0.3 all of them.
    assert cc.separation(got) == pytest.approx(5 / 6)
    assert np.isnan(cc.separation(got[got["same"]]))


def test_matching_ends_with_a_shift():
    a, b, other = (np.random.default_rng(k).normal(0, 1, (64, 70)) for k in range(3))
    patterns, valid = np.stack([a, a + 2 * b, other]), np.ones((3, 64, 70), bool)
    valid[1, :10] = False
    table = cc.matching(patterns, valid, ["same", "other"], [(0, 0), (1, 0), (0, -2)], noise=0.02)
    assert table["pair"].tolist() == ["same"] * 3 + ["other"] * 3
    assert table["shift"].tolist() == ["0, 0", "1, 0", "0, -2"] * 2
    assert table["ncc"][0] == pytest.approx(1 / np.sqrt(5), abs=0.05) and (table["ncc"][1:].abs() < 0.08).all()
    np.testing.assert_allclose(table["deviations"], table["ncc"] / 0.02)
    assert table["pce"][0] > 60 > table["pce"][1:].max() and table["false_alarm"][0] < 1e-10
    kept = np.corrcoef(a[10:].ravel(), patterns[1][10:].ravel())[0, 1]
    assert table["ncc"][0] == pytest.approx(kept)


def test_the_first_readable_medium(tmp_path):
    (tmp_path / "bad.mp4").write_text("x")
    cv2.imwrite(str(tmp_path / "small.png"), np.zeros((40, 90, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "good.png"), expose(sensor(0), 0))
    files = [tmp_path / name for name in ("gone.png", "bad.mp4", "small.png", "good.png")]
    place, frames = cc.first_readable(files, SETTINGS)
    assert place == 3 and frames.shape == (1, 96, 128, 3)
    with pytest.raises(FingerprintError, match="None of the 3 media"):
        cc.first_readable(files[:3], SETTINGS)


def test_compression_takes_the_pattern_away(tmp_path):
    paths, cameras = [], [0, 0, 1, 1]
    for k, camera in enumerate(cameras):
        frames = np.stack([expose(sensor(camera), 10 * k + t) for t in range(4)])
        paths.append(encode(tmp_path / f"{k}.mkv", frames, crf=4))
    table = cc.quality(paths, cameras, [10, 45], [1, 4], SETTINGS)
    assert table[["crf", "frames"]].values.tolist() == [[10, 1], [10, 4], [45, 1], [45, 4]]
    ncc = table.set_index(["crf", "frames"])["ncc"]
    assert (table.loc[table["crf"] == 10, "auc"] == 1).all()
    assert ncc[10, 4] > ncc[10, 1] > 0.05 and abs(ncc[45, 4]) < ncc[10, 4] / 3


# Fingerprints by several jobs


@pytest.fixture
def photos(tmp_path):
    """A folder of eight pictures of two cameras and one file that is none."""
    film(tmp_path / "photos", count=2, each=4)
    (tmp_path / "photos" / "bad.mp4").write_text("no video")
    return tmp_path / "photos"


def left(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def test_fingerprints_by_several_jobs_are_those_of_one(tmp_path, photos, capsys):
    def take(name, shard=(0, 1)):
        return cc.fingerprint_files(photos, tmp_path / name, SETTINGS, shard=shard)

    whole = take("one")
    for i in (2, 0, 1):
        assert not (tmp_path / "three" / cc.FINGERPRINTS).exists()
        part = take("three", (i, 3))
    again = take("three", (1, 3))
    assert "Still to do: shard 0/3, 1/3." in capsys.readouterr().err
    one, three = (pd.read_parquet(tmp_path / name / cc.FINGERPRINTS) for name in ("one", "three"))
    for rows in (part, again, three, whole):
        pd.testing.assert_frame_equal(rows.drop(columns="seconds"), one.drop(columns="seconds"), check_dtype=False)
    assert left(tmp_path / "one") == left(tmp_path / "three") and (one["status"] == "ok").any()


def test_clusters_come_from_fingerprints_taken_before(tmp_path, photos, monkeypatch):
    direct = cc.cluster_files(photos, tmp_path / "direct.csv", SETTINGS)
    cc.fingerprint_files(photos, tmp_path / "prints", SETTINGS, shard=(0, 2))
    with pytest.raises(FingerprintError, match="to its end first"):
        cc.cluster_files(photos, tmp_path / "later.csv", SETTINGS, fingerprints=tmp_path / "prints")
    cc.fingerprint_files(photos, tmp_path / "prints", SETTINGS, shard=(1, 2))
    monkeypatch.setattr(cc, "take", None)  # nothing is decoded
    cc.cluster_files(photos, tmp_path / "later.csv", SETTINGS, fingerprints=tmp_path / "prints")
    assert (tmp_path / "later.csv").read_bytes() == (tmp_path / "direct.csv").read_bytes() and len(direct)
    (photos / "new.png").write_bytes(next(photos.glob("*.png")).read_bytes())
    with pytest.raises(FingerprintError, match="of other media"):
        cc.cluster_files(photos, tmp_path / "later.csv", SETTINGS, fingerprints=tmp_path / "prints")


def test_a_shard_taken_with_other_settings_is_taken_again(tmp_path, photos):
    cc.fingerprint_files(photos, tmp_path / "out", SETTINGS, shard=(0, 2))
    other = replace(SETTINGS, sigma=3.0)
    assert len(cc.fingerprint_files(photos, tmp_path / "out", other, shard=(1, 2))) < len(list(photos.iterdir()))
    assert not (tmp_path / "out" / cc.FINGERPRINTS).exists()
    assert len(cc.fingerprint_files(photos, tmp_path / "out", other, shard=(0, 2))) == len(list(photos.iterdir()))


def test_a_medium_of_another_share_that_has_changed_is_noticed(tmp_path, photos, capsys):
    def take(i):
        return cc.fingerprint_files(photos, tmp_path / "out", SETTINGS, shard=(i, 2))

    take(0)
    names = sorted(path.name for path in photos.iterdir())
    (photos / names[0]).write_text("no picture any more")
    take(1)
    assert "Still to do: shard 0/2." in capsys.readouterr().err and not (tmp_path / "out" / cc.FINGERPRINTS).exists()
    rows = take(0)
    assert len(rows) == len(names) and rows["status"][0] == "failed"


def test_a_share_taken_with_other_faces_is_taken_again(tiny_world, tiny_crops, tmp_path, capsys):
    def take(i, crops):
        return cc.fingerprint_files(tmp_path / "four.parquet", tmp_path / "out", SETTINGS, crops, shard=(i, 2))

    four = read_manifest(tiny_world / "manifest.parquet").iloc[:4]
    write_manifest(four.assign(root=str(tiny_world)), tmp_path / "four.parquet")
    take(0, None)
    take(1, tiny_crops)
    assert "Still to do: shard 0/2." in capsys.readouterr().err and not (tmp_path / "out" / cc.FINGERPRINTS).exists()
    assert (take(0, tiny_crops)["face"] > 0).tolist() == [True] * 4


# Figures


@pytest.fixture
def blocks():
    """A matrix of two cameras and a loner, its labels and cameras, in mixed order."""
    labels = np.array([1, 0, -1, 0, 1, 0])
    matrix = np.where((labels[:, None] == labels) & (labels >= 0), 0.4, 0.0)
    np.fill_diagonal(matrix, 1)
    return matrix, labels, ["b", "a", "", "a", "b", "a"]


def test_the_matrix_is_ordered_by_cluster(blocks):
    matrix, labels, cameras = blocks
    fig, ax = plt.subplots()
    order = camera_figures.draw_matrix(ax, matrix, labels, cameras)
    assert order.tolist() == [1, 3, 5, 0, 4, 2]
    np.testing.assert_array_equal(ax.images[0].get_array(), matrix[np.ix_(order, order)])
    borders = sorted({float(line.get_ydata()[0]) for line in ax.lines if line.get_ydata()[0] == line.get_ydata()[1]})
    assert borders == [2.5, 4.5] and ax.images[0].get_clim() == pytest.approx((-0.4, 0.4))
    strip = ax.child_axes[0].images[0].get_array()[0]
    assert len(np.unique(strip, axis=0)) == 3 and np.allclose(strip[5], camera_figures.UNKNOWN)
    assert (strip[0] == strip[2]).all() and (strip[3] == strip[4]).all() and (strip[0] != strip[3]).any()
    plt.close(fig)


def test_the_tree_has_every_medium_once(blocks):
    matrix, _, cameras = blocks
    for most in (100, 3):
        fig, ax = plt.subplots()
        leaves = camera_figures.draw_tree(ax, matrix, cameras, most)
        assert sorted(i for leaf in leaves for i in leaf) == list(range(6)) and len(leaves) == min(most, 6)
        assert len(ax.child_axes[0].images[0].get_array()[0]) == len(leaves)
        if most == 3:
            assert sorted(map(sorted, leaves)) == [[0, 4], [1, 3, 5], [2]]
        plt.close(fig)


def test_means_are_over_the_pixels_that_count():
    patterns, valid = np.arange(12.0).reshape(3, 2, 2), np.ones((3, 2, 2), bool)
    valid[0, 0, 0] = valid[2, 1, 1] = valid[0, 0, 1] = valid[2, 0, 1] = False
    found = camera_figures.camera_means(patterns, valid, np.array([0, -1, 0]))
    assert list(found) == ["cluster 0, 2 media"]
    np.testing.assert_allclose(found["cluster 0, 2 media"], [[8, 0], [(2 + 10) / 2, 3]])
    assert camera_figures.camera_means(patterns, valid, np.array([-1, -1, -1])) == {}


def test_panels_show_the_same_window():
    pattern = np.random.default_rng(0).normal(0, 1, (200, 300))
    fig = camera_figures.draw_patterns({"a": pattern, "b": pattern[:50, :60], "c": moving_frames(1)[0]}, window=40)
    shown = [ax.images[0].get_array() for ax in fig.axes]
    np.testing.assert_array_equal(shown[0], pattern[30:70, 55:95])
    np.testing.assert_array_equal(shown[1], pattern[:40, :40])
    assert shown[2].shape == (40, 40, 3)
    low, high = fig.axes[0].images[0].get_clim()
    assert low == -high and high == pytest.approx(3 * pattern[30:70, 55:95].std())
    plt.close(fig)


def test_histogram_and_curves():
    table = pd.DataFrame({"ncc": [0.0, 0.01, -0.01, 0.3], "same": [False, False, False, True]})
    fig, (left, right) = plt.subplots(1, 2)
    camera_figures.draw_pairs(left, table, 0.01, bins=31)
    different, same = (np.array([bar.get_height() for bar in bars]) for bars in left.containers)
    assert (different.sum(), same.sum(), same[-1]) == (3, 1, 1) and left.get_xlim()[1] > 30
    quality = pd.DataFrame({"crf": [17, 40] * 2, "frames": [1, 1, 4, 4], "auc": [0.9, 0.5, 1.0, 0.6]})
    camera_figures.draw_quality(right, quality)
    assert [line.get_label() for line in right.lines] == ["1 frame", "4 frames", "chance"]
    assert right.lines[1].get_ydata().tolist() == [1.0, 0.6]
    plt.close(fig)


def test_figures_of_next_to_nothing():
    fig, ax = plt.subplots()
    camera_figures.draw_matrix(ax, np.ones((1, 1)), np.array([-1]))
    camera_figures.draw_pairs(ax, pd.DataFrame({"ncc": [], "same": []}, dtype=float).astype({"same": bool}), 0.0)
    fig.canvas.draw()
    plt.close(fig)
