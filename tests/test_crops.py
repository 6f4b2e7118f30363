"""Crop shards: byte-identical after any interruption, readable by others, validated."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pandera.pandas as pa
import pytest

from unmask.data import crops as module
from unmask.data.crops import CropError, CropStore, CropWriter, collate, encode_crop, read_index, read_items

IDS = [hashlib.sha256(str(i).encode()).hexdigest()[:16] for i in range(9)]
KEYS = [(item_id, f"{i}:1") for i, item_id in enumerate(IDS)]


def image(i, frame):
    return np.random.default_rng([i, frame]).integers(0, 255, (24, 24, 3), np.uint8)


def add(writer, i, encoding="png"):
    """Item i with i % 4 crops; those without any are failures."""
    count = i % 4
    row = {"item_id": IDS[i], "status": "ok" if count else "failed", "reason": "" if count else "no face found",
           "frames": 4, "faces": count, "decoder": "decord", "seconds": 0.1 * i}  # fmt: skip
    found = [{"item_id": IDS[i], "frame": 3 * f, "pts": f / 8, "x0": 1.5, "y0": -2.0, "x1": 30.25, "y1": 26.75,
              "landmarks": np.linspace(0, 23, 162).round(3).tolist(), "locator": "annotations", "locator_hash": "ab",
              "data": encode_crop(image(i, f), encoding)} for f in range(count)]  # fmt: skip
    writer.add(KEYS[i], row, found, encoding)


def write(out, shard=0, of=1, stop=None, keys=KEYS):
    """Write or go on with one shard; stop before item number `stop` as an exception would."""
    with CropWriter(out, shard, of) as writer:
        mine = keys[shard::of]
        for key in mine[writer.resume(mine) :]:
            if stop is not None and KEYS.index(key) >= stop:
                return
            add(writer, KEYS.index(key))
        writer.finish()


def digest(out):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(out).glob("shards/*.tar"))}


@pytest.fixture
def whole(tmp_path):
    write(tmp_path / "whole")
    return digest(tmp_path / "whole")


@pytest.mark.parametrize("stop", range(10))
@pytest.mark.parametrize("damage", ["none", "half an item", "torn journal", "lost tar bytes", "after the end"])
def test_interrupted_at_any_item_gives_the_same_bytes(tmp_path, whole, stop, damage):
    write(tmp_path / "out", stop=stop)
    part, journal = (tmp_path / "out" / "shards" / f"crops-00000-of-00001.{e}" for e in ("tar.part", "jsonl"))
    if stop < 9:
        if damage == "half an item":
            part.write_bytes(part.read_bytes() + b"x" * 700)
        elif damage == "torn journal":
            journal.write_bytes(journal.read_bytes()[:-40])
        elif damage == "lost tar bytes":
            part.write_bytes(part.read_bytes()[:-300])
        elif damage == "after the end":
            part.write_bytes(part.read_bytes() + b"\0" * 200_000)
    write(tmp_path / "out")
    assert digest(tmp_path / "out") == whole
    assert collate(tmp_path / "out", 1) == []
    assert read_items(tmp_path / "out")["item_id"].tolist() == IDS


def slow_writer(out, reached):
    with CropWriter(out, 0, 1) as writer:
        for i in range(writer.resume(KEYS), len(KEYS)):
            add(writer, i)
            reached.put(i)
            if i == 5:
                multiprocessing.Event().wait(60)


def test_kill_while_writing(tmp_path, whole):
    context = multiprocessing.get_context("fork")
    reached = context.Queue()
    process = context.Process(target=slow_writer, args=(tmp_path / "out", reached))
    process.start()
    while reached.get(timeout=20) < 5:
        pass
    process.kill()
    process.join()
    with open(tmp_path / "out" / "shards" / "crops-00000-of-00001.jsonl") as lines:
        assert len(lines.readlines()) == 6
    write(tmp_path / "out")
    assert digest(tmp_path / "out") == whole


def test_complete_shard_is_left_alone_and_changes_are_redone(tmp_path, whole):
    write(tmp_path / "whole")
    tar = tmp_path / "whole" / "shards" / "crops-00000-of-00001.tar"
    before = tar.stat().st_mtime_ns
    with CropWriter(tmp_path / "whole", 0, 1) as writer:
        assert writer.resume(KEYS) == 9
        writer.finish()
    assert tar.stat().st_mtime_ns == before
    changed = [*KEYS[:4], (KEYS[4][0], "other file"), *KEYS[5:]]
    with CropWriter(tmp_path / "whole", 0, 1) as writer:
        assert writer.resume(changed) == 4
    assert not tar.exists()
    write(tmp_path / "whole", keys=KEYS[:6])
    write(tmp_path / "whole")  # a manifest that grew: only the new items are added
    assert digest(tmp_path / "whole") == whole


def test_shards_together_hold_what_one_holds_in_manifest_order(tmp_path, whole):
    for i in (2, 0, 1):
        assert i in collate(tmp_path / "three", 3)
        write(tmp_path / "three", i, 3)
    assert collate(tmp_path / "three", 3) == [] and collate(tmp_path / "whole", 1) == []
    one, three = (read_index(tmp_path / name) for name in ("whole", "three"))
    columns = ["item_id", "frame", "pts", "x0", "sha256", "size"]
    pd.testing.assert_frame_equal(one[columns], three[columns])
    pd.testing.assert_frame_equal(read_items(tmp_path / "whole"), read_items(tmp_path / "three"))
    assert three["shard"].nunique() == 3


def test_tables_have_the_declared_columns(tmp_path, whole):
    collate(tmp_path / "whole", 1)
    index, items = read_index(tmp_path / "whole"), read_items(tmp_path / "whole")
    assert list(index.columns) == ["item_id", "frame", "pts", "x0", "y0", "x1", "y1", "landmarks", "locator",
                                   "locator_hash", "shard", "offset", "size", "sha256"]  # fmt: skip
    assert list(items.columns) == ["item_id", "status", "reason", "frames", "faces", "decoder", "seconds"]
    assert index.dtypes[["frame", "pts", "x0", "offset", "size"]].astype(str).tolist() == [
        "int32", "float64", "float32", "int64", "int64"]  # fmt: skip
    assert index["landmarks"][0].dtype == np.float32 and len(index["landmarks"][0]) == 162
    assert items["faces"].tolist() == [i % 4 for i in range(9)]
    assert items.loc[items["faces"] == 0, "reason"].eq("no face found").all()


def test_pictures_come_back(tmp_path, whole):
    collate(tmp_path / "whole", 1)
    index, store = read_index(tmp_path / "whole"), CropStore(tmp_path / "whole")
    for row in index.itertuples():
        assert np.array_equal(store.image(row, check=True), image(IDS.index(row.item_id), row.frame // 3))
    assert np.array_equal(store.image(index.iloc[0]), pickle.loads(pickle.dumps(store)).image(index.iloc[0]))
    with tarfile.open(tmp_path / "whole" / "shards" / index["shard"][0]) as tar:
        names = [f"{i}.{f:06d}.png" for i, f in zip(index["item_id"], index["frame"], strict=True)]
        assert tar.getnames() == names
        assert all(m.mtime == 0 and m.offset_data == o for m, o in zip(tar, index["offset"], strict=True))


def test_damage_is_noticed(tmp_path, whole):
    collate(tmp_path / "whole", 1)
    index, tar = read_index(tmp_path / "whole"), tmp_path / "whole" / "shards" / "crops-00000-of-00001.tar"
    data = bytearray(tar.read_bytes())
    row = index.iloc[3]
    data[row["offset"] + row["size"] - 3] ^= 255  # in the trailer of the PNG: decodes all the same
    tar.write_bytes(data)
    CropStore(tmp_path / "whole").image(row)
    with pytest.raises(CropError, match="damaged"):
        CropStore(tmp_path / "whole").image(row, check=True)
    tar.write_bytes(data[:600])
    with pytest.raises(CropError, match="damaged"):
        CropStore(tmp_path / "whole").image(row)
    tar.unlink()
    with pytest.raises(CropError, match="run the preprocessing again"):
        CropStore(tmp_path / "whole").image(row)


def test_tables_are_validated(tmp_path, whole):
    with pytest.raises(CropError, match="Run the preprocessing"):
        read_index(tmp_path)
    collate(tmp_path / "whole", 1)
    items = read_items(tmp_path / "whole")
    with pytest.raises(pa.errors.SchemaError):
        module.write_table(items.assign(reason="why"), tmp_path / "items.parquet", module.ITEMS_SCHEMA)
    items.assign(status="maybe").to_parquet(tmp_path / "items.parquet")
    with pytest.raises(CropError, match="another version"):
        read_items(tmp_path)
    (tmp_path / "items.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(CropError, match="damaged"):
        read_items(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["items.parquet", "whole"]


def test_one_writer_per_shard(tmp_path):
    with CropWriter(tmp_path, 0, 2), CropWriter(tmp_path, 1, 2):
        with pytest.raises(CropError, match="Another process"):
            CropWriter(tmp_path, 0, 2)
    CropWriter(tmp_path, 0, 2).__exit__()


def test_jpeg_is_4_4_4_at_quality_95():
    from PIL import Image

    smooth = np.repeat(np.repeat(image(0, 0)[:6, :6], 8, 0), 8, 1)
    picture = Image.open(io.BytesIO(encode_crop(smooth, "jpg")))
    assert {layer[1:3] for layer in picture.layer} == {(1, 1)}
    table = picture.quantization[0]
    assert table[0] == 2 and max(table) < 13  # the standard luminance table at quality 95
    assert np.abs(np.asarray(picture).astype(int) - smooth).mean() < 3
    with pytest.raises(ValueError, match="png"):
        encode_crop(smooth, "webp")


def test_empty_shard(tmp_path):
    write(tmp_path, 0, 1, keys=[])
    assert collate(tmp_path, 1) == [] and len(read_index(tmp_path)) == len(read_items(tmp_path)) == 0
    assert json.loads(json.dumps(digest(tmp_path))) and os.listdir(tmp_path / "shards")


def test_missing_shards_are_named(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"shards": 3}))
    write(tmp_path, 1, 3)
    with pytest.raises(CropError, match=r"no crops\.parquet.*Shard 0/3, 2/3 is not complete\."):
        read_index(tmp_path)


def test_shards_of_another_manifest_are_not_merged(tmp_path):
    """The manifest lost an item after shard 0 was made: everything after it moved to another shard."""
    write(tmp_path, 0, 2)
    fewer = KEYS[:3] + KEYS[4:]
    write(tmp_path, 1, 2, keys=fewer)
    ids = [key[0] for key in fewer]
    assert collate(tmp_path, 2, fewer) == [0] and not list(tmp_path.glob("*.parquet"))
    write(tmp_path, 0, 2, keys=fewer)
    assert collate(tmp_path, 2, iter(fewer)) == [] and read_items(tmp_path)["item_id"].tolist() == ids
    assert collate(tmp_path, 2, fewer[:-1]) == [1], "one item too many"
    assert collate(tmp_path, 2, [*fewer[:4], fewer[6], fewer[5], fewer[4], fewer[7]]) == [0], "two have changed places"
    touched = [*fewer[:5], (fewer[5][0], "another size"), *fewer[6:]]
    assert collate(tmp_path, 2, touched) == [1], "a file has changed"
    with CropWriter(tmp_path, 1, 2) as writer:
        assert [row["item_id"] for row in writer.kept(touched[1::2])] == [key[0] for key in fewer[1:5:2]]
        assert writer.resume(fewer[1::2], 3) == 3 and not list(tmp_path.glob("*.parquet"))


def test_a_shard_that_is_written_anew_takes_the_old_tables_away(tmp_path, whole):
    collate(tmp_path / "whole", 1)
    with CropWriter(tmp_path / "whole", 0, 1) as writer:
        writer.resume(KEYS)
        assert read_items(tmp_path / "whole")["item_id"].tolist() == IDS, "nothing was to be done"
    with CropWriter(tmp_path / "whole", 0, 1) as writer:
        writer.resume([(KEYS[0][0], "other file"), *KEYS[1:]])
    with pytest.raises(CropError, match="to its end first"):
        read_index(tmp_path / "whole")


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_an_index_merged_in_blocks_is_the_same(tmp_path, monkeypatch, block):
    for i in range(2):
        write(tmp_path, i, 2)
    collate(tmp_path, 2)
    index, items = read_index(tmp_path), read_items(tmp_path)
    monkeypatch.setattr("unmask.data.crops.BLOCK", block)
    monkeypatch.setattr("unmask.data.journals.SLAB", block)
    collate(tmp_path, 2)
    pd.testing.assert_frame_equal(read_index(tmp_path), index)
    pd.testing.assert_frame_equal(read_items(tmp_path), items)
