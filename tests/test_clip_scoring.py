"""Scores of crops at hand: LaRE's error alone, pooled features, and perturbed crops with maps of their own."""

import numpy as np
import pytest
import torch
from test_clip_training import faces, model, profile  # noqa: F401  fixtures

from unmask import clip_scoring, hulls, lare, sbi
from unmask.clip_training import train
from unmask.data.crops import CropStore, read_index
from unmask.detectors import clip_backbone, roi


@pytest.fixture
def rows(faces):  # noqa: F811
    index = read_index(faces.crops)
    return index[index["item_id"].isin(index["item_id"].unique()[:4])]


def test_the_error_alone_is_the_mean_over_the_face_and_small_errors_are_suspicious(faces, rows):  # noqa: F811
    table = clip_scoring.lare_error(faces, rows)
    expected = {}
    for row in rows.to_dict("records"):
        stored = CropStore(faces.crops).image(row)
        box = sbi.crop_box(np.asarray(row["landmarks"], np.float32).reshape(-1, 2))
        cells = torch.from_numpy(lare.read(faces.lare, row["item_id"], row["frame"])).unsqueeze(0)
        moved = roi.Crop(tuple(box.tolist()), 96).maps(cells, stored.shape[1], stored.shape[0])
        expected[row["item_id"], row["frame"]] = np.exp(-moved.mean().item())
    frames = table[table["frame"] >= 0].set_index(["item_id", "frame"])["score"]
    assert frames.to_dict() == pytest.approx(expected)
    for item, own in table.groupby("item_id"):
        assert own.set_index("frame")["score"][-1] == pytest.approx(frames[item].mean())


def test_pooled_features_are_the_backbones_of_the_evaluation_crops(profile, faces, rows):  # noqa: F811
    backbone = clip_backbone.load(profile.clip.backbone)
    found = clip_scoring.pooled(backbone, faces, rows)
    for row, vector in zip(rows.to_dict("records"), found, strict=True):
        box = sbi.crop_box(np.asarray(row["landmarks"], np.float32).reshape(-1, 2))
        crop = hulls.crop(CropStore(faces.crops).image(row), box, backbone.input_size) / 255
        pixels = torch.tensor((crop - backbone.mean) / backbone.std).float().permute(2, 0, 1).unsqueeze(0)
        with torch.no_grad():
            np.testing.assert_allclose(vector, backbone.pooled(pixels)[0].numpy(), atol=1e-4)


def test_perturbed_crops_are_scored_with_maps_of_their_own(profile, faces, model, rows, tmp_path):  # noqa: F811
    out = train("clip-lare:F2c", profile, faces, tmp_path / "out", 0)
    settings = lare.Settings(str(model), "", 200, 1, 64, "a b")
    table = clip_scoring.robustness([out], faces, rows, ["jpeg-30"], tmp_path / "robust", settings)
    assert table.groupby("variant").size().to_dict() == {"none": len(rows) + 4, "jpeg-30": len(rows) + 4}
    wide = table.pivot(index=["item_id", "frame"], columns="variant", values="score")
    assert (wide["none"] != wide["jpeg-30"]).all()
    plain = clip_scoring.score(out, faces, rows).set_index(["item_id", "frame"])["score"]
    assert wide["none"].to_dict() == plain.to_dict()
    row = rows.iloc[0]
    own, old = (lare.read(f, row["item_id"], row["frame"]) for f in (tmp_path / "robust/jpeg-30/lare", faces.lare))
    assert not np.array_equal(own, old)
