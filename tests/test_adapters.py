"""The adapters of the public data sets, on fabricated trees with the real names and on the official lists."""

import json

import pandas as pd
import pytest
from trees import (
    PAIRS,
    SHARED,
    by_path,
    make_celebdf,
    make_df40,
    make_dfd,
    make_dfdc,
    make_dfo,
    make_ffiw,
    make_ffpp,
    make_preview,
    make_uadfv,
    needs_shared,
    put,
    put_text,
    said,
)

from unmask.data import manifest as m
from unmask.data.adapters_ffpp import DF40_KNOWN, DF40_UNKNOWN, FFPP_METHODS
from unmask.data.datasets import DatasetError, index

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
    assert said(notes, "2 of 20 groups", "celebdf:id0, celebdf:id4")
    assert said(notes, "not identity-disjoint: 2 of its 3")


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
    assert said(notes, "not identity-disjoint: 54 of its 124 target identities")


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
