"""Every adapter on a fabricated tree with the real names. Media are placeholders: adapters never open them."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest

from unmask.data import manifest as m
from unmask.data.adapters_ffpp import DF40_KNOWN, DF40_UNKNOWN, FFPP_METHODS
from unmask.data.datasets import LAYOUTS, DatasetError, index

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not (SHARED / "splits").is_dir(),
                                  reason="official lists not found in ../shared/data/splits")
PAIRS = {"train": [["071", "054"], ["087", "081"]], "val": [["720", "672"]], "test": [["953", "974"]]}


def put(root, *paths, content=b"not a video"):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


def put_text(root, path, text):
    put(root, path, content=text.encode())


def said(notes, *parts):
    return any(all(p in n for p in parts) for n in notes)


def by_path(df):
    return df.set_index("path")


def make_ffpp(root, pairs=PAIRS, comp="c23", methods=FFPP_METHODS):
    for split in ("train", "val", "test"):
        put_text(root, f"splits/{split}.json", json.dumps(pairs[split]))
    for a, b in sum(pairs.values(), []):
        put(root, *(f"original_sequences/youtube/{comp}/videos/{i}.mp4" for i in (a, b)))
        put(root, *(f"manipulated_sequences/{k}/{comp}/videos/{x}_{y}.mp4" for k in methods
                    for x, y in ((a, b), (b, a))))
    return root


def make_celebdf(root):
    put(root, *(f"Celeb-real/id{i}_{n:04d}.mp4" for i in range(12) for n in range(3)))
    put(root, *(f"Celeb-synthesis/id{i}_id{(i + d) % 12}_{n:04d}.mp4" for i in range(12) for d in (1, 5)
                for n in range(2)))
    put(root, *(f"YouTube-real/{n:05d}.mp4" for n in range(8)))
    put_text(root, "List_of_testing_videos.txt",
             "1 Celeb-real/id0_0000.mp4\n1 YouTube-real/00003.mp4\n0 Celeb-synthesis/id0_id1_0000.mp4\n"
             "0 Celeb-synthesis/id4_id9_0001.mp4\n")
    return root


def make_dfdc(root, parts=4, labels=True):
    for k in range(parts):
        entries = {}
        for n in range(3):
            entries[f"real{k}{n}.mp4"] = {"label": "REAL", "split": "train"}
            for j in range(2):
                entries[f"fake{k}{n}{j}.mp4"] = {"label": "FAKE", "split": "train", "original": f"real{k}{n}.mp4"}
        put_text(root, f"dfdc_train_part_{k}/metadata.json", json.dumps(entries))
        put(root, *(f"dfdc_train_part_{k}/{name}" for name in entries))
    if labels:
        put_text(root, "test/labels.csv", "filename,label\naa.mp4,0\nbb.mp4,1\n")
        put(root, "test/videos/aa.mp4", "test/videos/bb.mp4")
    return root


def make_preview(root):
    entries = {}
    for k in range(6):
        target, donor, kind = 1000 + k, 1000 + (k + 1) % 6, "test" if k == 5 else "train"
        entries[f"original_videos/{target}/{target}_A_001.mp4"] = {"label": "real", "set": kind, "target_id": target,
                                                                   "swapped_id": None}
        entries[f"method_{'AB'[k % 2]}/{target}/{target}_A/{donor}_{target}_A_001.mp4"] = {
            "label": "fake", "set": kind, "target_id": target, "swapped_id": donor}
    put_text(root, "dataset.json", json.dumps(entries))
    put(root, *entries)
    return root


def make_dfo(root):
    for split, names in {"train": ["071_W010", "054_M101"], "val": ["720_W010"], "test": ["953_M004"]}.items():
        put_text(root, f"lists/splits/{split}.txt", "".join(f"{n}.mp4\n" for n in names))
        put(root, *(f"manipulated_videos/{v}/{n}.mp4" for v in ("end_to_end", "reenact_postprocess") for n in names))
    put(root, "source_videos/W010/light_up/happy/camera_front/W010_light_up_happy_camera_front.mp4")
    return root


def make_df40(root):
    put(root, *(f"test/simswap/{d}/frames/{c}/{f:03d}.png" for d, c in (("ff", "071_054"), ("cdf", "id3_id4_0001"))
                for f in range(2)))
    put(root, *(f"train/simswap/ff/frames/{c}/000.png" for c in ("087_081", "081_087", "100_200", "300_400")))
    put(root, "test/mraa/ff/frames/071_054/000.png", "test/whichisreal/fake/1.png", "test/whichisreal/real/1.jpg",
        "test/heygen/fake/clip one.mp4", "test/e4e/ff/071/00001.jpg", "test/FSAll_ff/x.png", "test/e4e/ff/latents.pt",
        "test/simswap/ff/landmarks/071_054/000.npy", "test/simswap/ff/masks/071_054/000.png")
    (root / "test/StyleGAN2/ff").mkdir(parents=True)
    return root


def make_folder(root):
    put(root, *(f"real/{n}.mp4" for n in "abcdef"), *(f"fake/swap/{n}.mp4" for n in "abcdef"))
    return root


def make_world(root):
    df = pd.DataFrame([{"path": f"v/{k}.mp4", "split": "train", "label": k % 2, "subject": f"s{k}"} for k in range(4)])
    df = df.assign(item_id=[m.item_id("world-a", p) for p in df["path"]], root="media", kind="video", camera="cam1",
                   dataset="world-a", method=["real", "swap"] * 2, source_id="", annotations="v/a.npz")
    put(root, *(f"media/v/{k}.mp4" for k in range(4)))
    m.write_manifest(m.assign_groups(df.astype({"label": "int8"}))[list(m.COLUMNS)], root / "manifest.parquet")
    return root


def make_dfd(root):
    put(root, "original_sequences/actors/c23/videos/01__kitchen_pan.mp4",
        "manipulated_sequences/DeepFakeDetection/c23/videos/01_02__kitchen_pan__ABCDEFGH.mp4",
        "manipulated_sequences/DeepFakeDetection/c23/videos/notes.txt")
    return root


def make_uadfv(root):
    put(root, "real/0000.mp4", "fake/0000_fake.mp4", "real/0001.mp4")
    return root


def make_ffiw(root):
    put(root, *(f"{side}/val/videos/val_{n:08d}.mp4" for side in ("source", "target") for n in range(3)))
    return root


MAKERS = {"folder": make_folder, "ffpp": make_ffpp, "dfd": make_dfd, "celebdf1": make_celebdf,
          "celebdf2": make_celebdf, "uadfv": make_uadfv, "dfdc": make_dfdc, "dfdc-preview": make_preview,
          "deeperforensics": make_dfo, "ffiw": make_ffiw, "df40": make_df40, "world": make_world}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_a_storable_manifest_that_the_disk_order_does_not_change(layout, tmp_path, monkeypatch):
    root = MAKERS[layout](tmp_path / "data set ü")
    df, notes = index(root, layout)
    m.write_manifest(df, tmp_path / "m.parquet")
    assert all(m.media_path(row, tmp_path / "m.parquet").is_file() for _, row in df.iterrows())
    assert all(isinstance(n, str) and n.endswith(".") for n in notes)
    listing = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda p: iter(sorted(listing(p), reverse=True)))
    again, notes_again = index(root, layout)
    pd.testing.assert_frame_equal(df, again)
    assert notes == notes_again


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_or_empty_root_is_an_error_that_says_what_was_looked_for(layout, tmp_path):
    with pytest.raises(DatasetError, match=f"no folder .*absent.*{layout}"):
        index(tmp_path / "absent", layout)
    with pytest.raises(m.ManifestError, match=str(tmp_path)):
        index(tmp_path, layout)


def test_unknown_layouts_and_options_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="celebdf2"):
        index(tmp_path, "celeb")
    with pytest.raises(DatasetError, match="compression"):
        index(tmp_path, "ffpp", compresion="c40")
    with pytest.raises(DatasetError, match="raw, c23, c40"):
        index(tmp_path, "ffpp", compression="c41")


# folder

def test_folder_pairs_names_and_indexes_whatever_is_there(tmp_path):
    put(tmp_path, "real/ö b.mp4", "real/.hidden", "fake/x/ö b.mp4", "fake/y/ö b.webm", "fake/notes.mp4",
        "real/c/0001.png", "real/c/0002.png", "real/k/0001.png", "fake/z/c/0001.png", "real/noext")
    put(tmp_path, "real/empty.mp4", content=b"")
    (tmp_path / "real" / "dead.mp4").symlink_to(tmp_path / "gone.mp4")
    os.mkfifo(tmp_path / "real" / "pipe.mp4")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
    df, notes = index(tmp_path, "folder", dataset="mine")
    rows = by_path(df)
    assert set(rows.index) == {"real/ö b.mp4", "fake/x/ö b.mp4", "fake/y/ö b.webm", "fake/notes.mp4",
                               "real/c/0001.png", "real/c/0002.png", "real/k/0001.png", "fake/z/c/0001.png",
                               "real/noext", "real/empty.mp4",
                               "real/dead.mp4"}
    assert rows.loc["fake/x/ö b.mp4", "method"] == "x" and rows.loc["fake/notes.mp4", "method"] == "fake"
    assert rows.loc["real/c/0001.png", "kind"] == "image" and rows.loc["real/noext", "kind"] == "video"
    assert rows.loc[["real/ö b.mp4", "fake/x/ö b.mp4", "fake/y/ö b.webm"], "group_id"].nunique() == 1
    assert rows.loc[["real/c/0001.png", "real/c/0002.png", "fake/z/c/0001.png"], "group_id"].nunique() == 1
    assert rows.loc["real/c/0001.png", "group_id"] != rows.loc["real/k/0001.png", "group_id"]
    assert m.leakage(df).empty and df["item_id"].is_unique
    assert said(notes, "1 entries in ROOT/real", "pipe.mp4") and said(notes, "loop", "not entered again")


def test_folder_names_that_are_not_utf8_are_noted(tmp_path):
    put(tmp_path, "real/a.mp4", "fake/b.mp4")
    with open(os.fsencode(tmp_path) + b"/real/\xff.mp4", "wb"):
        pass
    df, notes = index(tmp_path, "folder")
    assert len(df) == 2 and sum("1 names in ROOT/real are not valid UTF-8" in n for n in notes) == 1


def test_folder_splits_depend_on_the_seed_and_hold_both_classes(tmp_path):
    put(tmp_path, *(f"{k}/{n:02d}.mp4" for k in ("real", "fake") for n in range(30)))
    one, two = index(tmp_path, "folder", 1)[0], index(tmp_path, "folder", 2)[0]
    assert one["split"].value_counts().to_dict() == {"train": 42, "test": 12, "val": 6}
    assert not one["split"].equals(two["split"])
    assert (one.groupby("split")["label"].nunique() == 2).all()


def test_folder_with_one_class_says_so(tmp_path):
    put(tmp_path, "fake/a.mp4")
    _, notes = index(tmp_path, "folder")
    assert said(notes, "folder missing", "ROOT/real") and said(notes, "split train has no real item")


def test_media_csv_overrides_and_keeps_missing_files(tmp_path):
    put(tmp_path, "real/a.mp4", "real/b.mp4", "odd/c.mp4", "real/unlisted.mp4")
    put_text(tmp_path, "media.csv", "\ufeffpath,label,method,group,split,subject,source,camera,junk\n"
             "real/a.mp4,FAKE,swap,g1,test,s1,s2,cam,1\nodd/c.mp4,0,,g2,train,,,,\ngone.mp4,1,,,train,,,,\n")
    df, notes = index(tmp_path, "folder", dataset="mine")
    rows = by_path(df)
    assert rows.loc["real/a.mp4", ["label", "method", "group_id", "split", "subject", "source_id", "camera"]].tolist() \
        == [1, "swap", "mine:g1", "test", "s1", "s2", "cam"]
    assert rows.loc["odd/c.mp4", ["label", "method", "group_id"]].tolist() == [0, "real", "mine:g2"]
    assert rows.loc["gone.mp4", "method"] == "fake" and len(df) == 3
    assert said(notes, "1 of 3 files listed in media.csv are missing", "gone.mp4")
    assert said(notes, "2 files under real/ and fake/ are not in media.csv", "real/unlisted.mp4")


def test_media_csv_frames_outside_real_and_fake_stay_with_their_clip(tmp_path):
    put_text(tmp_path, "media.csv", "path,label\nodd/a/1.png,0\nodd/a/2.png,0\nodd/b/1.png,1\nfake/m/c.mp4,1\n")
    rows = by_path(index(tmp_path, "folder")[0])
    assert rows.loc["odd/a/1.png", "group_id"] == rows.loc["odd/a/2.png", "group_id"]
    assert rows.loc["odd/a/1.png", "group_id"] != rows.loc["odd/b/1.png", "group_id"]
    assert rows.loc["odd/b/1.png", "method"] == "fake" and rows.loc["fake/m/c.mp4", "method"] == "m"


@pytest.mark.parametrize(("text", "named"), [
    ("path,label\n../x.mp4,1\n", "line 2.*inside"), ("path,label\n/etc/passwd,1\n", "line 2.*inside"),
    ("path,label\nreal/../../x,1\n", "inside"), ("path,label\n,1\n", "line 2"),
    ("path,label\na.mp4,2\n", "line 2.*label"), ("path,label\na.mp4,0\na.mp4,1\n", "line 3.*second time"),
    ("path,label\na.mp4,0\n./a.mp4,1\n", "second time"), ("path,kind\na.mp4,0\n", "no column label"),
    ("path,label\na.mp4\n", "line 2.*2 fields"), ("path,label\na.mp4,0,9\n", "line 2.*2 fields"),
    ("path,label,split\na,0,dev\n", "split must be"), ("path,label,split\na,0,test\nb,1,\n", "1 rows have no split"),
    ("path,label,method\na,1,real\n", "method 'real'"), ('path,label\n"a,0\n', "not valid CSV"), ("", "no column"),
    ("path,label\n", "Nothing found"),
])
def test_malformed_media_csv_is_refused_with_line_and_fault(tmp_path, text, named):
    put_text(tmp_path, "media.csv", text)
    with pytest.raises(DatasetError, match=f"(?s){named}"):
        index(tmp_path, "folder")


def test_media_csv_that_is_not_text_is_refused_and_endless_names_are_only_missing(tmp_path):
    put(tmp_path, "media.csv", content=b"path,label\n\xff\xfe,1\n")
    with pytest.raises(DatasetError, match="UTF-8"):
        index(tmp_path, "folder")
    put_text(tmp_path, "media.csv", f"path,label\n{'x' * 3000},1\n")
    assert said(index(tmp_path, "folder")[1], "1 of 1 files")


def test_a_leak_in_a_given_split_is_counted(tmp_path):
    put_text(tmp_path, "media.csv", "path,label,group,split\na,0,g,train\nb,1,g,test\nc,1,h,test\n")
    df, notes = index(tmp_path, "folder", dataset="mine")
    assert said(notes, "1 of 2 groups (2 items)", "mine:g")
    with pytest.raises(m.ManifestError):
        m.check_splits(df)


@needs_shared
def test_the_real_media_folder_keeps_its_groups_and_splits():
    df, notes = index(SHARED / "media", "folder")
    assert df["label"].value_counts().to_dict() == {0: 40, 1: 28} and notes == []
    assert m.leakage(df).empty and (df.groupby("split")["label"].nunique() == 2).all()


# FaceForensics++ and its relatives

def test_ffpp_pairs_methods_and_groups(tmp_path):
    df, notes = index(make_ffpp(tmp_path), "ffpp")
    assert df["split"].value_counts().to_dict() == {"train": 24, "val": 12, "test": 12} and notes == []
    row = by_path(df).loc["manipulated_sequences/FaceSwap/c23/videos/071_054.mp4"]
    assert row[["split", "label", "method", "subject", "source_id"]].tolist() == ["train", 1, "FaceSwap", "ffpp:071",
                                                                                 "ffpp:054"]
    assert df["group_id"].nunique() == 4 and m.check_splits(df).empty
    assert (df["method"] == "real").sum() == 8


def test_ffpp_names_what_is_missing_or_odd(tmp_path):
    make_ffpp(tmp_path, methods=FFPP_METHODS[:4])
    (tmp_path / "manipulated_sequences/Deepfakes/c23/videos/071_054.mp4").unlink()
    put(tmp_path, "original_sequences/youtube/c23/videos/999.mp4")
    df, notes = index(tmp_path, "ffpp")
    assert said(notes, "c23 FaceShifter: folder missing (expected ROOT/manipulated_sequences/FaceShifter/c23/videos)")
    assert said(notes, "c23 Deepfakes: 1 of 8 listed files not on disk: 071_054")
    assert said(notes, "c23 real: 1 files are in no official list", "999")
    assert len(df) == 8 + 4 * 8 - 1
    with pytest.raises(DatasetError, match="original_sequences/youtube/c40/videos"):
        index(tmp_path, "ffpp", compression="c40")


@pytest.mark.parametrize("text", ["{}", "[", "[[1, 2]]", '[["071"]]', '[["071", "../x"]]', "[" * 100_000])
def test_ffpp_split_lists_must_be_pairs_of_ids(tmp_path, text):
    make_ffpp(tmp_path)
    put_text(tmp_path, "splits/val.json", text)
    with pytest.raises(DatasetError, match="val.json"):
        index(tmp_path, "ffpp")
    (tmp_path / "splits/val.json").unlink()
    with pytest.raises(DatasetError, match="not found: expected at .*val.json"):
        index(tmp_path, "ffpp")


def test_an_overlapping_official_split_is_counted_not_refused(tmp_path):
    df, notes = index(make_ffpp(tmp_path, PAIRS | {"test": [["054", "974"]]}), "ffpp")
    assert said(notes, "1 of 3 groups", "ffpp:054")
    assert len(m.check_splits(df, allow_official=["ffpp"])) == 1


@needs_shared
def test_ffpp_official_lists_give_the_official_counts(tmp_path):
    pairs = {s: json.loads((SHARED / "splits/ffpp" / f"{s}.json").read_text()) for s in PAIRS}
    df, notes = index(make_ffpp(tmp_path, pairs, methods=("Deepfakes",)), "ffpp")
    counts = df.groupby(["split", "label"]).size().to_dict()
    assert counts == {(s, k): n for s, n in (("train", 720), ("val", 140), ("test", 140)) for k in (0, 1)}
    assert m.leakage(df).empty and df["group_id"].nunique() == 500 and len(notes) == 4


def test_dfd_is_all_test(tmp_path):
    df, notes = index(make_dfd(tmp_path), "dfd")
    assert df[["split", "label", "subject", "source_id"]].to_numpy().tolist() == [
        ["test", 1, "dfd:01", "dfd:02"], ["test", 0, "dfd:01", ""]]
    assert said(notes, "1 files have names unlike the release", "notes")


def test_deeperforensics_takes_its_reals_from_ffpp_and_never_from_source_videos(tmp_path):
    root, ff = make_dfo(tmp_path / "dfo"), make_ffpp(tmp_path / "ffpp")
    df, notes = index(root, "deeperforensics")
    assert len(df) == 8 and set(df["label"]) == {1} and said(notes, "no real class", "ffpp_root")
    assert said(notes, "end_to_end_level_3: folder missing")
    df, notes = index(root, "deeperforensics", ffpp_root=ff)
    reals = df[df["label"] == 0]
    assert dict(zip(reals["subject"], reals["split"], strict=True)) == {
        "ffpp:071": "train", "ffpp:054": "train", "ffpp:720": "val", "ffpp:953": "test"}
    assert set(reals["root"]) == {str(ff)} and not df["path"].str.contains("source_videos").any()
    both = m.assign_groups(pd.concat([df, index(ff, "ffpp")[0]], ignore_index=True))
    assert both.loc[both["subject"] == "ffpp:071", "group_id"].nunique() == 1 and m.leakage(both).empty
    put_text(root, "lists/splits/val.txt", "oops\n")
    with pytest.raises(DatasetError, match="val.txt, line 1"):
        index(root, "deeperforensics")


def test_df40_reads_frames_names_and_counts_holes(tmp_path):
    df, notes = index(make_df40(tmp_path), "df40")
    rows = by_path(df)
    frame = rows.loc["test/simswap/ff/frames/071_054/001.png"]
    assert frame[["kind", "label", "method", "split", "subject", "source_id"]].tolist() == [
        "image", 1, "simswap", "test", "ffpp:071", "ffpp:054"]
    assert rows.loc["test/simswap/cdf/frames/id3_id4_0001/000.png", ["subject", "source_id"]].tolist() == [
        "celebdf:id3", "celebdf:id4"]
    assert rows.loc["test/mraa/ff/frames/071_054/000.png", "method"] == "MRAA"
    assert rows.loc["test/whichisreal/real/1.jpg", ["label", "method"]].tolist() == [0, "real"]
    assert rows.loc["test/whichisreal/fake/1.png", "method"] == "whichfaceisreal"
    assert rows.loc["test/heygen/fake/clip one.mp4", ["kind", "source_id"]].tolist() == [
        "video", "df40:heygen/clip one"]
    assert rows.loc["test/e4e/ff/071/00001.jpg", "subject"] == "ffpp:071"
    train = df[df["path"].str.startswith("train/")]
    assert set(train["split"]) == {"train", "val"} and m.leakage(df).empty
    assert rows.loc["train/simswap/ff/frames/087_081/000.png", "split"] == \
        rows.loc["train/simswap/ff/frames/081_087/000.png", "split"]
    assert said(notes, "test simswap: 2 files in ROOT/test/simswap/ff", "side files") and len(df) == 13
    assert said(notes, "ROOT/test: 1 folders are no DF40 method", "FSAll_ff")
    assert said(notes, "test StyleGAN2: folder ROOT/test/StyleGAN2/ff is empty")
    assert said(notes, "test heygen: folder missing (expected ROOT/test/heygen/real)")
    assert said(notes, "ROOT/test: 34 of 40 methods not on disk", "CollabDiff")


def test_df40_without_download_folders_is_test_and_lists_forty_methods(tmp_path):
    put(tmp_path, "simswap/ff/frames/071_054/0.png")
    df, notes = index(tmp_path, "df40")
    assert df["split"].tolist() == ["test"] and said(notes, "all of ROOT is taken as test")
    assert said(notes, "no real items") and said(notes, "39 of 40 methods")
    assert (len(DF40_KNOWN), len(DF40_UNKNOWN)) == (31, 9)


# Celeb-DF, UADFV, DFDC, FFIW

def test_celebdf_list_means_one_is_real(tmp_path):
    df, notes = index(make_celebdf(tmp_path), "celebdf2")
    rows = by_path(df)
    test = df[df["split"] == "test"]
    assert dict(zip(test["path"], test["label"], strict=True)) == {
        "Celeb-real/id0_0000.mp4": 0, "YouTube-real/00003.mp4": 0, "Celeb-synthesis/id0_id1_0000.mp4": 1,
        "Celeb-synthesis/id4_id9_0001.mp4": 1}
    assert rows.loc["Celeb-synthesis/id4_id9_0001.mp4", ["subject", "source_id"]].tolist() == [
        "celebdf:id4", "celebdf:id9"]
    rest = df[df["split"] != "test"]
    assert (rest.groupby("split")["label"].nunique() == 2).all() and m.leakage(rest).empty
    assert said(notes, "2 of 20 groups", "celebdf:id0, celebdf:id4") and said(notes, "not identity-disjoint")


@pytest.mark.parametrize(("line", "named"), [
    ("0 Celeb-real/id0_0000.mp4", "line 1.*1 means real"), ("1 Celeb-synthesis/id0_id1_0000.mp4", "1 means real"),
    ("real Celeb-real/id0_0000.mp4", "line 1: expected"), ("1 ../x/id0_0000.mp4", "expected"), ("1", "expected")])
def test_celebdf_list_that_contradicts_its_folders_is_refused(tmp_path, line, named):
    make_celebdf(tmp_path)
    put_text(tmp_path, "List_of_testing_videos.txt", line + "\n")
    with pytest.raises(DatasetError, match=named):
        index(tmp_path, "celebdf2")


def test_celebdf_counts_listed_videos_that_are_missing_and_odd_names(tmp_path):
    make_celebdf(tmp_path)
    (tmp_path / "Celeb-real/id0_0000.mp4").unlink()
    put(tmp_path, "Celeb-real/readme.txt")
    _, notes = index(tmp_path, "celebdf1")
    assert said(notes, "1 of 4 listed test videos not on disk: Celeb-real/id0_0000")
    assert said(notes, "Celeb-real: 1 files have names unlike the release", "readme")


@needs_shared
def test_celebdf_official_test_list_has_178_reals_and_340_fakes(tmp_path):
    text = (SHARED / "splits/celebdf_v2/List_of_testing_videos.txt").read_text()
    put_text(tmp_path, "List_of_testing_videos.txt", text)
    put(tmp_path, *(line.split()[1] for line in text.splitlines()))
    put(tmp_path, *(f"Celeb-real/id{k}_9999.mp4" for k in range(59)),
        *(f"Celeb-synthesis/id{k}_id99_9999.mp4" for k in range(59)))
    df, notes = index(tmp_path, "celebdf2")
    test = df[df["split"] == "test"]
    folders = test["path"].str.split("/").str[0]
    assert folders.value_counts().to_dict() == {"Celeb-synthesis": 340, "Celeb-real": 108, "YouTube-real": 70}
    assert test.groupby(folders)["label"].unique().map(list).to_dict() == {
        "Celeb-synthesis": [1], "Celeb-real": [0], "YouTube-real": [0]}
    assert said(notes, "groups", "lie in more than one split")


def test_uadfv_pairs(tmp_path):
    df, notes = index(make_uadfv(tmp_path), "uadfv")
    rows = by_path(df)
    assert rows.loc["fake/0000_fake.mp4", "group_id"] == rows.loc["real/0000.mp4", "group_id"]
    assert set(df["split"]) == {"test"} and said(notes, "1 clips have no partner", "0001")


def test_dfdc_splits_by_part_and_groups_by_original(tmp_path):
    df, notes = index(make_dfdc(tmp_path), "dfdc")
    part = df["path"].str.split("/").str[0]
    assert (df.groupby(part)["split"].nunique() == 1).all() and m.leakage(df).empty
    assert set(df["split"]) == {"train", "val", "test"} and said(notes, "4 of 50 training parts")
    rows = by_path(df)
    assert rows.loc["dfdc_train_part_0/fake010.mp4", "group_id"] == rows.loc["dfdc_train_part_0/real01.mp4", "group_id"]
    assert rows.loc["test/videos/bb.mp4", ["label", "split"]].tolist() == [1, "test"]


def test_dfdc_originals_that_cross_parts_pull_the_parts_together(tmp_path):
    make_dfdc(tmp_path, parts=3)
    data = json.loads((tmp_path / "dfdc_train_part_0/metadata.json").read_text())
    data["fake000.mp4"]["original"] = "real10.mp4"
    put_text(tmp_path, "dfdc_train_part_0/metadata.json", json.dumps(data))
    for seed in range(4):
        df = index(tmp_path, "dfdc", seed)[0]
        assert m.leakage(df).empty and set(df["split"]) == {"train", "val", "test"}


def test_dfdc_single_part_is_split_by_original_and_holds_out_a_test(tmp_path):
    df, notes = index(make_dfdc(tmp_path, parts=1, labels=False), "dfdc")
    assert set(df["split"]) == {"train", "val", "test"} and m.leakage(df).empty
    assert said(notes, "labels.csv", "test is cut")


@pytest.mark.parametrize("text", ["[]", '{"a.mp4": {"label": "fake"}}', '{"a.mp4": 1}', "{",
                                  '{"a.mp4": {"label": "FAKE", "original": 3}}'])
def test_dfdc_metadata_must_be_well_formed(tmp_path, text):
    put_text(tmp_path, "dfdc_train_part_0/metadata.json", text)
    with pytest.raises(DatasetError, match="metadata.json"):
        index(tmp_path, "dfdc")


def test_dfdc_counts_what_is_missing(tmp_path):
    make_dfdc(tmp_path)
    (tmp_path / "dfdc_train_part_1/real10.mp4").unlink()
    (tmp_path / "dfdc_train_part_2/metadata.json").unlink()
    put_text(tmp_path, "dfdc_train_part_0/metadata.json", json.dumps({"../../x.mp4": {"label": "REAL"}}))
    df, notes = index(tmp_path, "dfdc")
    assert said(notes, "dfdc_train_part_1: 1 of 9 listed files not on disk: real10.mp4")
    assert said(notes, "dfdc_train_part_2: metadata.json missing; its 9 files")
    assert said(notes, "dfdc_train_part_0: 1 of 1 listed files not on disk: ../../x.mp4")
    assert len(df) == 8 + 9 + 2


@needs_shared
def test_dfdc_official_metadata_excerpt(tmp_path):
    text = (SHARED / "splits/dfdc/metadata_part_10.json").read_text()
    put_text(tmp_path, "dfdc_train_part_10/metadata.json", text)
    put(tmp_path, "dfdc_train_part_10/widuwuoiur.mp4")
    df, notes = index(tmp_path, "dfdc")
    assert df[["label", "subject"]].to_numpy().tolist() == [[1, "dfdc:ybqmttnept"]]
    assert said(notes, "1 of 2 listed files not on disk: yhffcuhhjy.mp4")


def test_dfdc_preview_cuts_val_from_train_by_target(tmp_path):
    df, notes = index(make_preview(tmp_path), "dfdc-preview")
    assert set(df["split"]) == {"train", "val", "test"} and m.leakage(df).empty and notes == []
    assert df.loc[df["subject"] == "dfdc-preview:1005", "split"].unique().tolist() == ["test"]
    assert set(df["method"]) == {"real", "method_A", "method_B"}
    put_text(tmp_path, "dataset.json", json.dumps({"../x.mp4": {"label": "real", "set": "train"}}))
    with pytest.raises(DatasetError, match="inside ROOT"):
        index(tmp_path, "dfdc-preview")


def test_ffiw_source_is_real_and_target_is_fake(tmp_path):
    df, _ = index(make_ffiw(tmp_path), "ffiw")
    assert set(df["split"]) == {"test"} and df["group_id"].nunique() == 3
    assert df.loc[df["label"] == 1, "path"].str.startswith("target/").all() and df["label"].sum() == 3


# world

def test_world_is_read_validated_and_made_absolute(tmp_path):
    df, notes = index(make_world(tmp_path), "world")
    stored = m.read_manifest(tmp_path / "manifest.parquet")
    assert notes == [] and set(df["root"]) == {str((tmp_path / "media").resolve())}
    pd.testing.assert_frame_equal(df.drop(columns="root"), stored.drop(columns="root"), check_dtype=False)
    (tmp_path / "media/v/2.mp4").unlink()
    assert said(index(tmp_path, "world")[1], "1 of 4 listed files are missing: v/2.mp4")
    (tmp_path / "manifest.parquet").write_bytes(b"PAR1")
    with pytest.raises(m.ManifestError):
        index(tmp_path, "world")
