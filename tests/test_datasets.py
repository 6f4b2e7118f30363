"""What every layout has in common, your own folders and the world. Media are placeholders: adapters never open them."""

import os
from pathlib import Path

import pandas as pd
import pytest
from trees import MAKERS, SHARED, by_path, make_world, needs_shared, put, put_text, said

from unmask.data import manifest as m
from unmask.data.datasets import LAYOUTS, DatasetError, index


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
