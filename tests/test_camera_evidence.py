"""Evidence of known cameras: planted sensors are found again, foreign ones are not, and damage is refused."""

import json

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save

from unmask.camera_evidence import CARD, WEIGHTS, CameraEvidence
from unmask.detectors.base import CheckpointError
from unmask.fingerprints import FingerprintError
from unmask.pseudo_labels import CUE, masked_ncc

SIDE = 48
FACE = np.zeros((SIDE, SIDE), bool)
FACE[12:36, 14:34] = True
SENSORS = np.random.default_rng(99).standard_normal((4, SIDE, SIDE))


def video(rng, sensor, fake, noise=1.0):
    """One fingerprint float[H,W]: the face of a fake does not carry the sensor."""
    return 0.02 * (SENSORS[sensor] * ~(FACE & fake) + noise * rng.standard_normal((SIDE, SIDE)))


def regions(pattern, face=FACE):
    """What `judge` takes."""
    return {"background": (np.where(face, 0, pattern), ~face), "face": (np.where(face, pattern, 0), face)}


def keep(folder, item, pattern, face=FACE):
    """Store a fingerprint as `unmask.fingerprints` keeps it: background, face, lower face."""
    planes = np.stack([np.where(~face, pattern, 0), np.where(face, pattern, 0), 0 * pattern]).astype(np.float16)
    valid = np.packbits(np.stack([~face, face, np.zeros_like(face)]))
    (folder / f"{item}.safetensors").write_bytes(save({"pattern": planes, "valid": valid}))


def row(item, cluster, bucket="48x48"):
    return {"item_id": item, "status": "ok", "bucket": bucket, "height": SIDE, "width": SIDE, "cluster": cluster}


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """A folder of fingerprints of two cameras (numbers 7 and 3) and of unattributed media, their rows and the truth."""
    folder, rng, rows = tmp_path_factory.mktemp("fingerprints"), np.random.default_rng(0), []
    for i in range(44):
        sensor, fake = (i % 2, i % 4 > 1) if i < 40 else (2, False)
        keep(folder, f"{i:02}", video(rng, sensor, fake))
        rows.append(row(f"{i:02}", (7, 3)[sensor] if i < 40 else -1) | {"fake": fake})
    rows = pd.DataFrame(rows, index=np.arange(100, 144))
    # Reals show about half of what the camera's mean has in the face, as other videos would find it.
    cue = pd.Series(np.where(rows["fake"], 0.0, 0.7) + rng.normal(0, 0.15, 44), rows.index).where(rows["cluster"] >= 0)
    return folder, rows, cue


@pytest.fixture(scope="module")
def evidence(collection):
    return CameraEvidence.fit(*collection, seed=0)


def test_the_fingerprint_of_a_camera_is_the_mean_of_its_videos(collection, evidence):
    assert set(evidence.patterns) == {7, 3} and evidence.bucket == {7: "48x48", 3: "48x48"}
    for camera, sensor in ((7, 0), (3, 1)):
        ncc, pixels = masked_ncc(evidence.patterns[camera], SENSORS[sensor], ~FACE)
        assert ncc == pytest.approx(1 / np.sqrt(1 + 1 / 20), abs=0.01) and pixels == (~FACE).sum()
        assert masked_ncc(evidence.patterns[camera], SENSORS[sensor], FACE)[0] > 0.8
        cues = collection[2][collection[1]["cluster"] == camera]
        assert evidence.median[camera] == pytest.approx(np.median(cues))
    assert evidence.slope < 0, "more of the camera in the face is less likely a fake"


@pytest.mark.parametrize(("sensor", "camera"), [(0, 7), (1, 3)])
def test_a_video_is_given_to_its_camera_and_its_face_decides(evidence, sensor, camera):
    rng = np.random.default_rng(5)
    real, fake = (evidence.judge("48x48", regions(video(rng, sensor, f))) for f in (False, True))
    assert real[0] == fake[0] == camera
    assert real[1] > 0.5 and abs(fake[1]) < 5 / np.sqrt(FACE.sum())
    assert real[2] < -1 and fake[2] > 1
    low, high = (evidence.judge("48x48", regions(video(np.random.default_rng(6), sensor, False, n))) for n in (2, 0.5))
    assert high[1] > low[1] and high[2] < low[2], "log odds fall as the face agrees more"


def test_a_foreign_camera_is_none_of_them_and_says_nothing(evidence):
    rng = np.random.default_rng(7)
    for sensor in (2, 3):
        for fake in (False, True):
            camera, cue, odds = evidence.judge("48x48", regions(video(rng, sensor, fake)))
            assert camera == -1 and np.isnan(cue) and odds == 0


def test_frames_of_another_size_are_never_compared(evidence):
    pattern = video(np.random.default_rng(8), 0, False)
    assert evidence.judge("48x48", regions(pattern))[0] == 7
    assert evidence.judge("96x48", regions(pattern))[0] == -1
    cut = {name: (x[:40], keep[:40]) for name, (x, keep) in regions(pattern).items()}
    assert evidence.judge("48x48", cut)[0] == -1, "the same frames, cropped otherwise"


def test_without_a_face_the_camera_is_named_and_no_more_said(evidence):
    camera, cue, odds = evidence.judge("48x48", regions(video(np.random.default_rng(9), 1, False), FACE & False))
    assert camera == 3 and np.isnan(cue) and odds == 0


def test_a_table_judges_every_video_by_itself(collection, evidence, tmp_path):
    folder, rows, _ = collection
    whole = evidence.table(folder, rows)
    assert list(whole) == ["camera", CUE, "logit"] and whole.index.tolist() == rows["item_id"].tolist()
    assert whole["camera"].tolist() == rows["cluster"].tolist()
    attributed = whole[whole["camera"] >= 0].assign(fake=rows.set_index("item_id")["fake"])
    assert ((attributed["logit"] > 0) == attributed["fake"]).all() and (whole["logit"][40:] == 0).all()
    for item in ("00", "17", "41"):
        alone = evidence.table(folder, rows[rows["item_id"] == item])
        pd.testing.assert_frame_equal(alone, whole.loc[[item]], check_dtype=False, check_exact=True)
    shuffled = evidence.table(folder, rows.sample(frac=1, random_state=0)).loc[whole.index]
    pd.testing.assert_frame_equal(shuffled, whole, check_exact=True)


def test_failed_media_and_missing_fingerprints(collection, evidence):
    folder, rows, _ = collection
    failed = rows.iloc[:3].assign(status=["ok", "failed", "ok"])
    assert evidence.table(folder, failed).index.tolist() == ["00", "02"]
    nothing = evidence.table(folder, rows.iloc[:2].assign(status="failed"))
    assert list(nothing) == ["camera", CUE, "logit"] and nothing.empty
    with pytest.raises(FingerprintError):
        evidence.table(folder, rows.iloc[:1].assign(item_id="gone"))


def test_measured_cues_give_the_same_odds_as_judging(collection, evidence):
    found = evidence.table(collection[0], collection[1])
    features = pd.DataFrame({"cluster": found["camera"], CUE: found[CUE]})
    assert np.allclose(evidence.logits(features), found["logit"].astype(float))
    silent = pd.DataFrame({"cluster": [7, -1, 55], CUE: [np.nan, 0.3, 0.3]})
    assert evidence.logits(silent).tolist() == [0, 0, 0]


# ---- cameras of which little is known


def grown(collection, tmp_path, more):
    """Evidence of the collection with further videos: (camera number, sensor, cue) each."""
    folder, rows, cue = collection
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rng, extra = np.random.default_rng(3), []
    for k, (camera, sensor, _) in enumerate(more):
        keep(tmp_path, f"x{k}", video(rng, sensor, False))
        extra.append(row(f"x{k}", camera))
    rows = pd.concat([rows, pd.DataFrame(extra, index=np.arange(500, 500 + len(more)))])
    return CameraEvidence.fit(tmp_path, rows, pd.concat([cue, pd.Series([m[2] for m in more], rows.index[44:])]), 0)


def test_cameras_of_few_videos_are_measured_together(collection, tmp_path):
    found = grown(collection, tmp_path, [(8, 2, 0.60), (8, 2, 0.61), (9, 3, 0.1), (9, 3, 0.7)])
    pooled = np.array([0.60, 0.61, 0.1, 0.7])
    for camera in (8, 9):
        assert found.median[camera] == pytest.approx(np.median(pooled))
        assert found.spread[camera] == pytest.approx(1.4826 * np.median(abs(pooled - np.median(pooled))))


def test_a_camera_of_one_recording_has_no_cue_and_says_nothing(collection, tmp_path):
    found = grown(collection, tmp_path, [(8, 2, np.nan)] * 6)
    found.save(tmp_path / "kept")
    for known in found, CameraEvidence.load(tmp_path / "kept"):
        for fake in (False, True):
            camera, cue, odds = known.judge("48x48", regions(video(np.random.default_rng(4), 2, fake)))
            assert camera == 8 and np.isnan(cue) and odds == 0
        assert known.logits(pd.DataFrame({"cluster": [8], CUE: [0.4]})).tolist() == [0]


def test_no_camera_at_all(collection, tmp_path):
    folder, rows, cue = collection
    unknown = rows.assign(cluster=-1)
    for part in (unknown, unknown.iloc[:0]):
        found = CameraEvidence.fit(folder, part, cue.loc[part.index] * np.nan, 0)
        found.save(tmp_path)
        again = CameraEvidence.load(tmp_path)
        assert again.patterns == {} and again.judge("48x48", regions(video(np.random.default_rng(1), 0, True)))[2] == 0
        assert (again.table(folder, rows)["camera"] == -1).all()


# ---- on disk


def test_kept_and_read_again(collection, evidence, tmp_path):
    evidence.save(tmp_path)
    again = CameraEvidence.load(tmp_path)
    for name in ("bucket", "median", "spread", "slope", "intercept"):
        assert getattr(again, name) == getattr(evidence, name)
    for camera, pattern in evidence.patterns.items():
        assert again.patterns[camera].dtype == np.float32
        assert np.allclose(again.patterns[camera], pattern, rtol=1e-3, atol=1e-6)
    for a, b in zip(*(e.table(*collection[:2]).itertuples() for e in (evidence, again)), strict=True):
        assert a[1] == b[1] and a[3] == pytest.approx(b[3], rel=1e-3, abs=0.02)
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    again.save(tmp_path)
    CameraEvidence.fit(*collection, seed=0).save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first and set(first) == {WEIGHTS, CARD}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"bucket": 3}', "no slope", "null slope"])
def test_a_damaged_card_is_refused(evidence, tmp_path, text):
    evidence.save(tmp_path)
    card = json.loads((tmp_path / CARD).read_text())
    if text == "no slope":
        text = json.dumps({k: v for k, v in card.items() if k != "slope"})
    elif text == "null slope":
        text = json.dumps(card | {"slope": None})
    (tmp_path / CARD).write_text(text)
    with pytest.raises(CheckpointError, match="run stage 1 again"):
        CameraEvidence.load(tmp_path)


@pytest.mark.parametrize("how", ["missing", "cut", "empty", "other cameras"])
def test_damaged_fingerprints_are_refused(evidence, tmp_path, how):
    evidence.save(tmp_path)
    path = tmp_path / WEIGHTS
    if how == "missing":
        path.unlink()
    else:
        kept = path.read_bytes()
        other = save({"1": np.zeros((4, 4), np.float16)})
        path.write_bytes({"cut": kept[: len(kept) // 2], "empty": b"", "other cameras": other}[how])
    with pytest.raises(CheckpointError):
        CameraEvidence.load(tmp_path)
