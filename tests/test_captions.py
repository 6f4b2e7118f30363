"""Captioned faces: what a caption says is what the picture was made of, and nothing tells of forgeries."""

from dataclasses import replace

import numpy as np
import pytest

from unmask.data import cameras, captions, subjects
from unmask.data.captions import ATTRIBUTES, attributes, caption, face, prompt


@pytest.fixture
def shown():
    rng = np.random.default_rng(0)
    return subjects.sample_subject(rng), subjects.perform(rng, 1, 25.0, 192)[0], cameras.sample_model("", rng)


def test_every_value_follows_what_is_shown(shown):
    subject, pose, camera = shown
    changes = {
        "length": (replace(subject, long_hair=False), replace(subject, long_hair=True)),
        "glasses": (replace(subject, glasses=False), replace(subject, glasses=True)),
        "beard": (replace(subject, beard=0.0), replace(subject, beard=0.4)),
        "skin": [replace(subject, skin=tone * (1.05, 0.95, 1.0)) for tone in subjects.SKIN],
        "hair": [replace(subject, hair=tone * 1.15) for tone in subjects.HAIR],
    }
    for name, people in changes.items():
        assert [attributes(one, pose, camera)[name] for one in people] == list(range(len(ATTRIBUTES[name])))
    looks = [attributes(subject, replace(pose, yaw=yaw), camera)["direction"] for yaw in (-0.4, 0.0, 0.4)]
    assert [ATTRIBUTES["direction"][value] for value in looks] == ["looking left", "looking ahead", "looking right"]
    assert [attributes(subject, replace(pose, mouth=m), camera)["mouth"] for m in (0.0, 0.9)] == [0, 1]
    casts = [replace(camera, white_balance=(red, 1.0, 1.0)) for red in (0.9, 1.0, 1.1)]
    assert [attributes(subject, pose, one)["camera"] for one in casts] == [0, 1, 2]


def test_left_is_the_left_of_the_picture(shown):
    subject, pose, _ = shown
    points = subjects.canonical_landmarks(subject, pose)
    nose, jaw = 30, [0, 16]
    for yaw, side in ((-0.4, -1), (0.4, 1)):
        seen = subjects.project(points, replace(pose, yaw=yaw, pitch=0.0, roll=0.0))[:, 0]
        assert np.sign(seen[nose] - seen[jaw].mean()) == side


def test_a_caption_tells_true_phrases_once_and_all_of_them_in_the_long_run():
    values, rng, told = {name: 1 for name in ATTRIBUTES}, np.random.default_rng(1), set()
    true = {phrases[1] for phrases in ATTRIBUTES.values()}
    for _ in range(60):
        text = caption(values, rng)
        start = prompt("")
        assert text.startswith(start)
        phrases = text.removeprefix(start).split(", ")
        assert phrases and len(phrases) == len(set(phrases)) and set(phrases) <= true
        told |= set(phrases)
    assert told == true


def test_phrases_are_distinct_and_say_nothing_of_real_or_fake():
    phrases = [phrase for values in ATTRIBUTES.values() for phrase in values]
    assert len(phrases) == len(set(phrases))
    assert not any(word in " ".join(phrases) for word in ("real", "fake", "forged", "swap", "synthetic"))


def test_the_same_number_gives_the_same_face_and_another_another():
    (first, values), (again, same), (other, _) = face(3, 5, 48), face(3, 5, 48), face(3, 6, 48)
    assert np.array_equal(first, again) and values == same and not np.array_equal(first, other)
    assert first.shape == (48, 48, 3) and first.dtype == np.uint8 and set(values) == set(captions.ATTRIBUTES)
