"""A world written under official names comes back through the adapter with the same labels, splits and pairs."""

import json
import os

import pandas as pd
import pytest

from unmask.data import manifest as m
from unmask.data.datasets import index
from unmask.data.layouts import WRITERS, DatasetError, write_layout

SPLIT_OF = {0: "train", 1: "train", 2: "train", 3: "train", 4: "train", 5: "train", 6: "val", 7: "val", 8: "test",
            9: "test"}


def make_world(root):
    """Ten people in five pairs (k, k ^ 1); two real clips each, three donor methods, synthesis as clip or image."""
    rows = []
    for k, split in SPLIT_OF.items():
        me, mate = f"s{k:03d}", f"s{k ^ 1:03d}"
        rows += [{"path": f"real/{me}_{n}.mp4", "split": split, "method": "real", "subject": me} for n in range(2)]
        rows += [{"path": f"{kind}/{me}.mp4", "split": split, "method": kind, "subject": me, "source_id": mate}
                 for kind in ("swap", "reenact", "texture")]
        rows.append({"path": f"synthesis/{me}.{'png' if k % 2 else 'mp4'}", "split": split, "method": "synthesis",
                     "subject": me})
    df = pd.DataFrame(rows).fillna({"source_id": ""})
    df = df.assign(dataset="world-a", item_id=[m.item_id("world-a", p) for p in df["path"]], root=".", camera="",
                   kind=["image" if p.endswith("png") else "video" for p in df["path"]], annotations="",
                   label=(df["method"] != "real").astype("int8"))
    for path in df["path"]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
    m.write_manifest(m.assign_groups(df)[list(m.COLUMNS)], root / "manifest.parquet")
    return root / "manifest.parquet"


def origin(df):
    """The world's path of every indexed row: the placeholder's content says it."""
    paths = [m.media_path(row, "") for _, row in df.iterrows()]
    return pd.Index([p.read_text() for p in paths], name="origin")


@pytest.mark.parametrize("layout", WRITERS)
def test_round_trip_keeps_labels_kinds_and_test_split(layout, tmp_path):
    source = make_world(tmp_path / "world")
    notes = write_layout(source, tmp_path / "out", layout)
    df, found = index(tmp_path / "out", layout)
    m.write_manifest(df, tmp_path / "m.parquet")
    world = m.read_manifest(source).set_index("path")
    back = df.set_index(origin(df))
    assert back.index.is_unique
    world = world.loc[back.index]
    assert (back["label"] == world["label"]).all() and (back["kind"] == world["kind"]).all()
    assert ((back["split"] == "test") == (world["split"] == "test")).all()
    assert set(back["split"]) == {"train", "val", "test"}
    left_out = 10 if layout == "ffpp" else 0
    assert len(back) == 60 - left_out and len(notes) == (layout == "ffpp")
    assert not [n for n in found if "not on disk" in n and layout != "df40" or "no official list" in n]


def test_ffpp_gives_back_all_splits_methods_pairs_and_groups(tmp_path):
    source = make_world(tmp_path / "world")
    notes = write_layout(source, tmp_path / "out", "ffpp")
    assert notes == ["ffpp: 10 clips left out, further clips of the same person or of the same pair and method: "
                     "real/s000_1.mp4, real/s001_1.mp4, real/s002_1.mp4 and 7 more."]
    df, found = index(tmp_path / "out", "ffpp")
    assert len(found) == 1 and found[0].startswith("ffpp: c23 FaceShifter: folder missing")
    world, back = m.read_manifest(source).set_index("path"), df.set_index(origin(df))
    world = world.loc[back.index]
    assert (back["split"] == world["split"]).all()
    official = {"real": "real", "swap": "FaceSwap", "reenact": "Face2Face", "texture": "NeuralTextures",
                "synthesis": "Deepfakes"}
    assert (back["method"] == world["method"].map(official)).all()
    assert (back["subject"].str[-3:] == world["subject"].str[1:]).all()
    with_donor = world["source_id"] != ""
    assert (back["source_id"].str[-3:] == world["source_id"].str[1:])[with_donor].all()
    assert m.check_splits(df).empty and df["group_id"].nunique() == world["group_id"].nunique() == 5
    assert json.loads((tmp_path / "out/splits/val.json").read_text()) == [["006", "007"]]


def test_celebdf2_list_has_one_for_real_and_ids_keep_people_apart(tmp_path):
    write_layout(make_world(tmp_path / "world"), tmp_path / "out", "celebdf2")
    lines = (tmp_path / "out/List_of_testing_videos.txt").read_text().split("\n")[:-1]
    assert len(lines) == 12 and sum(line.startswith("1 Celeb-real/") for line in lines) == 4
    df, found = index(tmp_path / "out", "celebdf2")
    assert not any("identity-disjoint" in n for n in found)
    back = df.set_index(origin(df))
    assert back.loc["swap/s008.mp4", ["subject", "source_id"]].tolist() == ["celebdf:id8", "celebdf:id9"]
    assert df["subject"].nunique() == 10 and m.leakage(df).empty


def test_dfdc_and_df40_keep_the_pairing_their_names_can_say(tmp_path):
    source = make_world(tmp_path / "world")
    write_layout(source, tmp_path / "dfdc", "dfdc")
    df, _ = index(tmp_path / "dfdc", "dfdc")
    back, world = df.set_index(origin(df)), m.read_manifest(source).set_index("path")
    assert (back["split"] == world["split"].loc[back.index]).all()
    assert back.loc["swap/s003.mp4", "group_id"] == back.loc["real/s003_0.mp4", "group_id"]
    write_layout(source, tmp_path / "df40", "df40")
    df, _ = index(tmp_path / "df40", "df40")
    back = df.set_index(origin(df))
    assert back.loc["reenact/s003.mp4", "method"] == "fomm"
    assert back.loc["reenact/s003.mp4", "group_id"] == back.loc["swap/s002.mp4", "group_id"]


def test_media_are_linked_not_copied_and_out_is_complete_or_absent(tmp_path):
    source = make_world(tmp_path / "world")
    write_layout(source, tmp_path / "out", "ffpp")
    assert os.path.samefile(tmp_path / "world/swap/s000.mp4",
                            tmp_path / "out/manipulated_sequences/FaceSwap/c23/videos/000_001.mp4")
    with pytest.raises(DatasetError, match="in use"):
        write_layout(source, tmp_path / "out", "ffpp")
    with pytest.raises(DatasetError, match="choose one of ffpp"):
        write_layout(source, tmp_path / "other", "uadfv")
    (tmp_path / "world/swap/s000.mp4").unlink()
    with pytest.raises(DatasetError, match="1 media.*s000.mp4"):
        write_layout(source, tmp_path / "other", "ffpp")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "world"]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    source = make_world(tmp_path / "world")
    monkeypatch.setattr("unmask.data.layouts.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_layout(source, tmp_path / "out", "dfdc")
    assert [p.name for p in tmp_path.iterdir()] == ["world"]


def test_copies_where_hard_links_are_impossible(tmp_path, monkeypatch):
    source = make_world(tmp_path / "world")
    monkeypatch.setattr("unmask.data.layouts.os.link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    write_layout(source, tmp_path / "out", "celebdf2")
    assert len(index(tmp_path / "out", "celebdf2")[0]) == 60


def test_ffpp_prefers_videos_and_refuses_a_donor_from_another_pair(tmp_path):
    source = make_world(tmp_path / "world")
    df = m.read_manifest(source)
    still = df[df["path"] == "swap/s000.mp4"].assign(path="swap/a_still.png", kind="image")
    stray = df[df["path"] == "swap/s002.mp4"].assign(path="swap/stray.mp4", source_id="s005")
    extra = pd.concat([still, stray])
    for path in extra["path"]:
        (tmp_path / "world" / path).write_text(path)
    df = pd.concat([df, extra.assign(item_id=[m.item_id("world-a", p) for p in extra["path"]])], ignore_index=True)
    m.write_manifest(m.assign_groups(df), source)
    notes = write_layout(source, tmp_path / "out", "ffpp")
    assert any("1 clips left out, their people are in no pair of one split: swap/stray.mp4" in n for n in notes)
    assert any("11 clips left out, further clips" in n for n in notes)
    videos = tmp_path / "out/manipulated_sequences/FaceSwap/c23/videos"
    assert (videos / "000_001.mp4").read_text() == "swap/s000.mp4" and not (videos / "000_001.png").exists()


def test_clips_without_a_place_are_named(tmp_path):
    source = make_world(tmp_path / "world")
    df = m.read_manifest(source)
    df["method"] = df["method"].replace("texture", "morph")
    df = df[~((df["subject"] == "s009") | (df["source_id"] == "s009"))]
    m.write_manifest(df, source)
    notes = write_layout(source, tmp_path / "out", "ffpp")
    assert any("8 clips left out, their method has no name" in n for n in notes)
    assert any("3 clips left out, their people are in no pair of one split" in n and "s008" in n for n in notes)
