"""The linear model of traces: what is missing is silent, what is kept is what was fitted, damage is refused."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from unmask.detectors.base import CheckpointError
from unmask.trace_model import TraceModel

NAMES = ("good", "idle", "never")


def planted(seed=0, count=300):
    """Features of which `good` tells the labels apart, `idle` does not and `never` is missing; a fifth is fake."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < 0.2).astype(int)
    good = 40 + 3 * (labels + rng.normal(0, 0.5, count))
    return pd.DataFrame({"good": good, "idle": rng.normal(0, 1e-3, count), "never": np.nan}), labels


@pytest.fixture(scope="module")
def model():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return TraceModel.fit(*planted(), NAMES)


def test_it_learns_what_tells_and_either_label_counts_alike(model):
    features, labels = planted(seed=1)
    odds = model.logits(features)
    assert odds.shape == (300,) and roc_auc_score(labels, odds) > 0.85
    assert abs(model.weight[0]) > 5 * abs(model.weight[1]) and model.weight[0] > 0
    # With both labels counting alike the odds are even half-way between the two means, 40 and 43.
    even = model.logits(pd.DataFrame({"good": [40.0, 41.5, 43.0], "idle": 0.0, "never": np.nan}))
    assert even[0] < -0.5 < even[1] < 0.5 < even[2]


def test_columns_are_scaled_robustly():
    features, labels = planted()
    wild = features.copy()
    wild.loc[0, "good"] = 1e12
    a, b = TraceModel.fit(features, labels, NAMES), TraceModel.fit(wild, labels, NAMES)
    assert a.median[0] == np.median(features["good"]) and b.median[0] == pytest.approx(a.median[0], rel=1e-2)
    assert b.weight[0] == pytest.approx(a.weight[0], rel=0.1)
    shifted = TraceModel.fit(features.assign(good=7 * features["good"] - 5), labels, NAMES)
    assert np.allclose(shifted.logits(features.assign(good=7 * features["good"] - 5)), a.logits(features))


def test_a_missing_measurement_is_the_middle(model):
    known = {"good": [42.0], "idle": [2e-3], "never": [np.nan]}
    for name, middle in zip(NAMES, model.median, strict=True):
        missing, typical = (pd.DataFrame(known | {name: [value]}) for value in (np.nan, middle))
        assert model.logits(missing) == pytest.approx(model.logits(typical))
    assert model.logits(pd.DataFrame({name: [np.nan] for name in NAMES})) == pytest.approx([model.bias])
    assert np.isfinite(model.logits(pd.DataFrame({name: [np.inf] for name in NAMES}))).all()


def test_one_video_does_not_depend_on_others_or_on_the_order_of_columns(model):
    features, _ = planted(seed=2)
    odds = model.logits(features)
    assert np.allclose([model.logits(features.iloc[[i]])[0] for i in range(5)], odds[:5], rtol=0, atol=1e-12)
    assert np.array_equal(model.logits(features[["never", "good", "idle"]]), odds)


def test_kept_and_read_again_is_the_same_model(model, tmp_path):
    model.save(tmp_path / "traces.json")
    again, (features, _) = TraceModel.load(tmp_path / "traces.json"), planted(seed=3)
    assert again.names == NAMES and np.array_equal(again.logits(features), model.logits(features))
    assert np.array_equal(TraceModel.fit(*planted(), NAMES).weight, model.weight)


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "7", "{}", '{"names": 3}', "no bias", b"\xff\xfe"])
def test_a_damaged_file_is_refused(model, tmp_path, damage):
    path = tmp_path / "traces.json"
    model.save(path)
    if damage == "no bias":
        damage = json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "bias"})
    path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    with pytest.raises(CheckpointError, match="run stage 3 again"):
        TraceModel.load(path)


@pytest.mark.parametrize("key", ["names", "median", "spread", "weight"])
def test_a_model_whose_parts_do_not_fit_is_refused(model, tmp_path, key):
    model.save(tmp_path / "traces.json")
    kept = json.loads((tmp_path / "traces.json").read_text())
    (tmp_path / "traces.json").write_text(json.dumps(kept | {key: kept[key][:2]}))
    with pytest.raises(CheckpointError):
        TraceModel.load(tmp_path / "traces.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError):
        TraceModel.load(tmp_path / "traces.json")
