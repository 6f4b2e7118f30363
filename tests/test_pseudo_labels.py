"""Pseudo-labels: planted fingerprints and cues whose answer is known; nothing leaks from version to version."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import logit
from sklearn.metrics import roc_auc_score

from unmask.pseudo_labels import (
    AGREEMENT,
    CUE,
    face_agreement,
    masked_ncc,
    pseudo_labels,
    recordings,
    robust_scale,
    second_view,
    single_feature,
    standardise,
    two_halves,
)

SIDE = 64


def filmed(rng, cameras=2, takes=6, noise=1.0, shared=0.0):
    """Fingerprints of `takes` recordings per camera, each a real video and a fake whose face lacks the camera.

    The two versions share noise of strength `shared`. Returns what face_agreement takes, and which are fake.
    """
    patterns, face = [], np.zeros((SIDE, SIDE), bool)
    face[16:48, 20:44] = True
    count = cameras * takes * 2
    sensors = rng.standard_normal((cameras, SIDE, SIDE))
    for i in range(count):
        if i % 2 == 0:
            common = shared * rng.standard_normal((SIDE, SIDE))
        sensor = sensors[i // (2 * takes)] * ~(face & (i % 2 == 1))
        patterns.append(sensor + common + noise * rng.standard_normal((SIDE, SIDE)))
    patterns, keep = np.stack(patterns).astype(np.float32), np.broadcast_to(face, (count, SIDE, SIDE))
    regions = (np.where(keep, 0, patterns), ~keep, np.where(keep, patterns, 0), keep)
    return regions, np.arange(count) // (2 * takes), np.arange(count) // 2, np.arange(count) % 2


def test_only_a_face_that_carries_the_sensor_agrees_with_it():
    regions, clusters, recording, fake = filmed(np.random.default_rng(0))
    table = face_agreement(*regions, clusters, recording)
    assert list(table) == list(AGREEMENT) and len(table) == 24
    pixels = 32 * 24
    # The sum of 10 other videos holds the sensor 5 times in the face (their fakes lack it) and noise of variance 10.
    expected = 5 / np.sqrt(2 * (25 + 10))
    assert table["face_ncc"][fake == 0].mean() == pytest.approx(expected, abs=0.03)
    assert (table["face_ncc"][fake == 1].abs() < 5 / np.sqrt(pixels)).all()
    assert np.allclose(table["face_z"], table["face_ncc"] * np.sqrt(pixels))
    background = 10 / np.sqrt(2 * (100 + 10)) * np.sqrt(SIDE**2 - pixels)
    assert (table["face_z"] - table["delta"]).mean() == pytest.approx(background, rel=0.03)
    assert (table["delta"][fake == 0].mean() - table["delta"][fake == 1].mean()) == pytest.approx(
        expected * np.sqrt(pixels), rel=0.1
    )


def test_versions_of_one_recording_do_not_vouch_for_each_other():
    regions, clusters, recording, _ = filmed(np.random.default_rng(1), shared=2.0)
    for part in regions[0], regions[2]:
        part[::2] = part[1::2]  # to the last bit
    own = face_agreement(*regions, clusters, recording)["face_ncc"]
    assert own.abs().max() < 5 / np.sqrt(32 * 24)
    alone = face_agreement(*regions, clusters, np.arange(len(clusters)))["face_ncc"]
    assert alone.mean() == pytest.approx(1 / np.sqrt(1 + 4 * 5), abs=0.03), "its twin among two each of five others"


def test_agreement_by_hand():
    rng = np.random.default_rng(2)
    regions, clusters, recording, _ = filmed(rng, cameras=1, takes=3)
    background, background_keep, face, face_keep = (np.array(x) for x in regions)
    background_keep[4, :8], face_keep[5, :20] = False, False  # pixels of other videos that count for nothing
    table = face_agreement(background, background_keep, face, face_keep, clusters, recording)
    whole = sum(np.where(background_keep[i], background[i], face[i]).astype(float) for i in (2, 3, 4, 5))
    inside = face_keep[0] & (whole != 0)
    x, y = face[0][inside].astype(float), whole[inside]
    assert table["face_ncc"][0] == pytest.approx((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()), abs=1e-6)


def test_no_answer_without_face_camera_or_second_recording():
    regions, clusters, recording, _ = filmed(np.random.default_rng(3), takes=2)
    regions = tuple(np.array(x) for x in regions)
    regions[3][0] = False  # no face
    clusters[[2, 3]] = -1
    recording[4:] = 7  # all of the second camera is one recording
    table = face_agreement(*regions, clusters, recording)
    assert table.isna().all(axis=1).tolist() == [True] * 8, "what is left of the first camera is one recording too"
    recording[1] = 9
    assert face_agreement(*regions, clusters, recording).notna().all(axis=1).tolist() == [False, True] + [False] * 6


def test_masked_ncc_counts_only_pixels_the_camera_knows():
    x, y = np.array([1.0, 2, 3, 4]), np.array([2.0, 4, 0, -1])
    assert masked_ncc(x, y, np.array([True, True, True, False])) == (pytest.approx(1.0), 2)
    assert masked_ncc(x, y, np.zeros(4, bool)) == (0.0, 0) and masked_ncc(x * 0, y, np.ones(4, bool)) == (0.0, 0)


def test_versions_are_connected_even_through_a_third():
    similarity = np.eye(6) + 0.02
    for i, j in ((0, 3), (3, 5), (1, 2)):
        similarity[i, j] = similarity[j, i] = 0.7
    found = recordings(similarity)
    assert found[0] == found[3] == found[5] != found[1] == found[2] and len(set(found)) == 3


# ---- standardising and splitting


def test_standardising_takes_away_what_a_camera_adds_and_scales():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 7, 2))
    features = pd.DataFrame(np.concatenate([x[0], 40 * x[0] + 9, x[2]]), columns=["a", "b"])
    clusters = np.repeat([4, 2, 8], 7)
    scaled = standardise(features, clusters)
    assert np.allclose(scaled[:7], scaled[7:14].to_numpy())
    median = np.median(x[0][:, 0])
    spread = np.median(np.abs(x[0][:, 0] - median)) / 0.6744897501960817  # the 75 % point of the normal distribution
    assert np.allclose(scaled["a"][:7], np.clip((x[0][:, 0] - median) / spread, -8, 8), rtol=1e-3)


def test_small_cameras_and_unattributed_media_are_standardised_together():
    values = np.random.default_rng(1).standard_normal(15) * 3
    clusters = np.array([0] * 6 + [1] * 4 + [2] * 3 + [-1] * 2)
    scaled = standardise(pd.DataFrame({"a": values}), clusters)["a"].to_numpy()
    together = standardise(pd.DataFrame({"a": values[6:]}), np.full(9, 5))["a"].to_numpy()
    assert np.allclose(scaled[6:], together)
    assert not np.allclose(scaled[6:10], standardise(pd.DataFrame({"a": values[6:10]}), np.full(4, -1))["a"])
    assert np.allclose(scaled[:6], standardise(pd.DataFrame({"a": values[:6]}), np.zeros(6))["a"])


def test_missing_constant_and_wild_values():
    features = pd.DataFrame({"a": [1, 2, 3, np.nan, 1e9, -1e9], "b": [5.0] * 6, "c": [np.nan] * 6})
    scaled = standardise(features, np.zeros(6, int))
    assert scaled["a"].tolist()[3:] == [0, 8, -8] and (scaled[["b", "c"]] == 0).all(axis=None)
    assert robust_scale(features["c"]) == (0, 1) and robust_scale(features["b"]) == (5, 1)


def test_two_halves_rise_with_the_value_and_follow_bayes():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(-1, 0.7, 30000), rng.normal(2, 0.7, 10000)])
    p = two_halves(values, seed=0)
    order = np.argsort(values)
    assert (np.diff(p[order]) >= 0).all() and p.min() < 0.01 and p.max() > 0.99
    for x in (0.2, 0.6, 0.9, 1.3):
        low, high = 3 * np.exp(-((x + 1) ** 2) / 0.98), np.exp(-((x - 2) ** 2) / 0.98)
        assert np.interp(x, values[order], p[order]) == pytest.approx(high / (low + high), abs=0.03)
    assert np.allclose(two_halves(values[::-1], 0)[::-1], p, atol=1e-3)
    assert np.array_equal(two_halves(values, seed=0), p)


@pytest.mark.parametrize("values", [[], [1, 2, 3], [4.0] * 9])
def test_nothing_to_split_is_a_half(values):
    assert two_halves(np.array(values, float), 0).tolist() == [0.5] * len(values)


# ---- the second view


def test_the_second_view_learns_from_the_cue():
    rng = np.random.default_rng(0)
    fake = rng.integers(0, 2, 200)
    traces = np.c_[2 * fake + rng.normal(0, 0.5, 200), rng.normal(0, 1, 200)]
    cue = np.where(rng.random(200) < 0.15, 1 - fake, fake) * 0.9 + 0.05  # a cue that errs now and then
    p = second_view(traces, cue, np.arange(200), seed=0)
    assert roc_auc_score(fake, p) > 0.9 and ((p > 0.5) == fake).mean() > 0.9 > 0.87 > ((cue > 0.5) == fake).mean()


def test_the_second_view_cannot_know_a_video_by_its_versions():
    rng = np.random.default_rng(0)
    recording = np.repeat(np.arange(20), 5)
    fake = np.repeat(rng.permutation(20) % 2, 5)  # says nothing that holds for another recording
    traces = 4 * np.eye(20)[recording]  # what tells recordings apart, and nothing else
    cue = 0.02 + 0.96 * fake
    assert roc_auc_score(fake, second_view(traces, cue, np.arange(100), 0)) > 0.99, "a leak would show"
    assert roc_auc_score(fake, second_view(traces, cue, recording, 0)) <= 0.5


def test_the_second_view_is_silent_without_two_halves_or_recordings():
    traces = np.random.default_rng(0).standard_normal((12, 2))
    halves = np.tile([0.1, 0.9], 6)
    assert (second_view(traces, halves, np.zeros(12), 0) == 0.5).all()
    assert (second_view(traces, np.full(12, 0.2), np.arange(12), 0) == 0.5).all()


# ---- labels


def collection(seed=0, count=150, blind=0):
    """Features of a collection of three cameras, and the truth: fakes agree less; `tilt` is higher for fakes.

    The cue of the last `blind` videos is missing.
    """
    rng = np.random.default_rng(seed)
    fake, clusters = rng.integers(0, 2, count), np.arange(count) % 3
    level, scale = np.array([0.1, 0.3, 0.6])[clusters], np.array([0.01, 0.05, 0.1])[clusters]
    features = pd.DataFrame({
        CUE: level + scale * ((1 - 2 * fake) * 2 + rng.normal(0, 0.7, count)),
        "tilt": 5 * clusters + 2 * fake + rng.normal(0, 0.7, count), "idle": rng.normal(0, 1, count),
    })  # fmt: skip
    features.loc[count - blind :, CUE] = np.nan
    return features, clusters, fake


def test_faces_that_agree_less_are_fake_whatever_the_traces_are_called():
    features, clusters, fake = collection()
    names, recording = ["tilt", "idle"], np.arange(len(fake))
    found = pseudo_labels(features, clusters, recording, names, seed=0)
    assert (found["label"] == fake).mean() > 0.97 and (found["agree"]).mean() > 0.85
    assert roc_auc_score(fake, found["cue"]) > 0.97 and roc_auc_score(fake, found["traces"]) > 0.95
    turned = pseudo_labels(features.assign(tilt=-features["tilt"]), clusters, recording, names, seed=0)
    assert np.allclose(turned["p_fake"], found["p_fake"], atol=1e-6)
    assert pseudo_labels(features, clusters, recording, names, seed=0).equals(found)
    negative = pseudo_labels(features.assign(**{CUE: -features[CUE]}), clusters, recording, names, seed=0)
    assert (negative["label"] == fake).mean() < 0.03, "the cue alone says which half is which"


def test_the_views_count_alike_and_confidence_is_their_distance_from_a_half():
    features, clusters, _ = collection(count=60)
    found = pseudo_labels(features, clusters, np.arange(60), ["tilt", "idle"], seed=0)
    a, b = (np.clip(found[view], 0.01, 0.99) for view in ("cue", "traces"))
    assert np.allclose(logit(found["p_fake"]), (np.log(a / (1 - a)) + np.log(b / (1 - b))) / 2)
    assert np.allclose(found["confidence"], abs(2 * found["p_fake"] - 1))
    assert (found["label"] == (found["p_fake"] > 0.5)).all()
    assert (found["agree"] == ((found["cue"] > 0.5) == (found["traces"] > 0.5))).all()


def test_a_missing_cue_says_nothing_and_changes_no_other_video():
    features, clusters, fake = collection(count=120, blind=80)
    names = ["tilt", "idle"]
    found = pseudo_labels(features, clusters, np.arange(120), names, seed=0)
    assert (found["cue"][40:] == 0.5).all()
    assert np.allclose(logit(found["p_fake"][40:]), logit(np.clip(found["traces"][40:], 0.01, 0.99)) / 2)
    assert ((found["cue"][:40] > 0.5) == fake[:40]).mean() > 0.95
    without = pseudo_labels(features[:40], clusters[:40], np.arange(40), names, seed=0)
    assert np.allclose(found["cue"][:40], without["cue"])
    assert (found["label"][40:] == fake[40:]).mean() > 0.9, "the traces speak for it"


def test_a_missing_cue_contradicts_neither_label():
    features, clusters, _ = collection(count=120, blind=80)
    blind = pseudo_labels(features, clusters, np.arange(120), ["tilt", "idle"], seed=0)[40:]
    assert set(blind["label"]) == {0, 1} and blind["agree"].all()


@pytest.mark.parametrize("count", [1, 3, 40])
def test_without_any_cue_nothing_is_said(count):
    features, clusters, _ = collection(count=count, blind=count)
    found = pseudo_labels(features, clusters, np.arange(count), ["tilt", "idle"], seed=0)
    assert (found["p_fake"] == 0.5).all() and (found["confidence"] == 0).all() and (found["label"] == 0).all()


def test_without_cameras_frames_that_agree_more_are_fake_and_the_second_view_is_another():
    features, clusters, fake = collection(count=150, blind=150)
    rng = np.random.default_rng(3)
    steps = features.assign(spearman=0.8 + 0.05 * fake + rng.normal(0, 0.01, 150))
    found = pseudo_labels(steps, clusters, np.arange(150), ["tilt", "idle", "spearman"], seed=0)
    assert roc_auc_score(fake, found["cue"]) > 0.97 and (found["label"] == fake).mean() > 0.9
    others = pseudo_labels(steps, clusters, np.arange(150), ["tilt", "idle"], seed=0)
    assert np.array_equal(found["traces"], others["traces"]), "what made the cue may not second it"
    few = steps.assign(**{CUE: collection(count=150)[0][CUE].where(np.arange(150) < 40)})
    judged = pseudo_labels(few, clusters, np.arange(150), ["tilt", "idle", "spearman"], seed=0)
    assert (judged["cue"][40:] == 0.5).all(), "a quarter of the videos is enough for the camera to decide"


def test_one_feature_alone_is_turned_towards_its_guide():
    rng = np.random.default_rng(0)
    fake = rng.integers(0, 2, 200)
    values, guide = fake + rng.normal(0, 0.2, 200), fake + rng.normal(0, 1, 200)
    for sign in (1, -1):
        assert roc_auc_score(fake, single_feature(sign * values, guide, 0)) > 0.99
        assert roc_auc_score(fake, single_feature(sign * values, -guide, 0)) < 0.01
    assert (single_feature(np.zeros(9), np.arange(9), 0) == 0.5).all()
