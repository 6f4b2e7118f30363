"""Files that nobody would write: whatever is in them, a reader gives a result or its own error, nothing else.

The seeds are fixed, so that a run is the same every time. `tests/fuzz/fuzz.py` searches further, guided by coverage;
what either found is kept in KEPT.
"""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from unmask import evaluation, exported, lare_maps, panel
from unmask.data import crops, datasets, faces
from unmask.data.manifest import COLUMNS, ManifestError, item_id, read_manifest, write_manifest
from unmask.detectors import base
from unmask.evaluation import ScoreError
from unmask.preprocessing import Item, Settings, process_item
from unmask.profile import Profile, ProfileError, load_profile, parse_changes

KEPT = Path(__file__).parent / "fuzz" / "kept"


def fuzz(examples):
    """So many examples, always the same, however slow the machine."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


def texts(size=12):
    """Text with all that UTF-8 can hold."""
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=size)


def numbers():
    """Numbers of all kinds, as JSON and YAML can hold them."""
    return st.one_of(st.integers(-(10**30), 10**30), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 1e308]))


def values(leaves=12):
    """What JSON can say."""
    scalars = st.one_of(st.none(), st.booleans(), numbers(), texts())
    return st.recursive(
        scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts(), inner, max_size=4)),
        max_leaves=leaves,
    )  # fmt: skip


@st.composite
def damaged(draw, data):
    """Bytes like `data`, with some changed, cut out or put in."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(out)))
        kind = draw(st.sampled_from(["change", "cut", "insert", "end"]))
        if kind == "change" and place < len(out):
            out[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del out[place : place + draw(st.integers(1, 64))]
        elif kind == "insert":
            out[place:place] = draw(st.binary(max_size=32))
        elif kind == "end":
            del out[place:]
    return bytes(out)


@st.composite
def changed(draw, document):
    """A JSON document in which one value, somewhere, is another or gone, or has company."""
    found = json.loads(json.dumps(document))
    here, places = found, []
    while isinstance(here, (dict, list)) and here:
        key = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        places.append((here, key))
        here = here[key]
    at, key = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(["other", "gone", "more"]))
    if kind == "gone":
        del at[key]
    elif kind == "more" and isinstance(at, dict):
        at[draw(texts())] = draw(values())
    else:
        at[key] = draw(values())
    return found


def read(reader, expected, *given):
    """Call a reader; its own errors say something in one paragraph, others fail the test."""
    try:
        return reader(*given)
    except expected as error:
        assert str(error).strip() and len(str(error)) < 2000
        return None


def kept(kind):
    """The contents of the files that once were read wrongly, of one reader."""
    return [path.read_bytes() for path in sorted((KEPT / kind).glob("*"))]


def every_kept(kind):
    """Decorator: the kept files of a reader are examples of its test's `data` in every run."""

    def decorate(test):
        for data in kept(kind):
            test = example(data=data)(test)
        return test

    return decorate


# --- Manifests and lists of media


def manifest_rows(count=3):
    rows = [dict.fromkeys(COLUMNS, "") for _ in range(count)]
    for i, row in enumerate(rows):
        row |= {"item_id": item_id("d", str(i)), "root": ".", "path": f"{i}.mp4", "kind": "video", "dataset": "d",
                "split": "test", "label": i % 2, "method": "swap" if i % 2 else "real", "group_id": str(i)}  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"label": "int8"})


def parquet(df, **metadata):
    buffer = io.BytesIO()
    table = pyarrow.Table.from_pandas(df, preserve_index=False)
    pq.write_table(table.replace_schema_metadata(metadata or table.schema.metadata), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def manifest_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "manifest.parquet"
    write_manifest(manifest_rows(), path)
    return path.read_bytes()


def column_of(draw, count):
    """A column of `count` values, of any type."""
    kind = draw(st.sampled_from(["text", "number", "int", "bytes", "list", "mixed", "date", "nothing"]))
    if kind == "date":
        return pd.Series(pd.date_range("1900", periods=count))
    if kind == "bytes":
        return pd.Series([draw(st.binary(max_size=8)) for _ in range(count)], dtype=object)
    if kind == "list":
        return pd.Series([draw(st.lists(st.floats(width=32), max_size=3)) for _ in range(count)], dtype=object)
    if kind == "mixed":
        return pd.Series([draw(st.one_of(st.none(), texts())) for _ in range(count)], dtype=object)
    if kind == "nothing":
        return pd.Series([None] * count, dtype=object)
    if kind == "number":
        return pd.Series([draw(st.floats()) for _ in range(count)], dtype=float)
    if kind == "int":
        return pd.Series([draw(st.integers(-(2**63), 2**63 - 1)) for _ in range(count)], dtype="int64")
    return pd.Series([draw(texts()) for _ in range(count)], dtype="str")


@st.composite
def odd_table(draw, df):
    """A table like `df` with one column, or one value, that is another; or a column less, or one more."""
    df = df.copy()
    name = draw(st.sampled_from([*df.columns]))
    kind = draw(st.sampled_from(["column", "value", "less", "more", "rows"]))
    if kind == "column":
        df[name] = column_of(draw, len(df))
    elif kind == "less":
        df = df.drop(columns=name)
    elif kind == "more":
        df[draw(texts())] = column_of(draw, len(df))
    elif kind == "rows":
        df = df.iloc[draw(st.lists(st.integers(0, len(df) - 1), max_size=5))]
    elif df[name].dtype.kind not in "fiu":
        df[name] = df[name].astype(object)
        df.loc[df.index[0], name] = draw(st.one_of(texts(), st.none()))
    else:
        like = df[name].dtype
        number = draw(st.floats(width=32)) if like.kind == "f" else draw(st.integers(*_range(like)))
        df[name] = df[name].astype(object)
        df.loc[df.index[0], name] = number
        df[name] = df[name].astype(like)
    return df


def _range(kind):
    info = np.iinfo(kind)
    return int(info.min), int(info.max)


@every_kept("manifest")
@fuzz(60)
@given(data=st.data())
def test_manifests(data, tmp_path, manifest_bytes):
    path = tmp_path / "m.parquet"
    if not isinstance(data, bytes):
        kind = data.draw(st.sampled_from(["bytes", "table"]))
        data = data.draw(damaged(manifest_bytes)) if kind == "bytes" else parquet(data.draw(odd_table(manifest_rows())))
    path.write_bytes(data)
    found = read(read_manifest, ManifestError, path)
    assert found is None or len(found)


@every_kept("media_csv")
@fuzz(60)
@given(data=st.data())
def test_lists_of_media(data, tmp_path):
    text = b"path,label,method,group,split\nreal/a.mp4,real,,1,train\nfake/b.mp4,1,swap,2,test\n"
    cells = st.sampled_from(
        ["real/a.mp4", "/etc/passwd", "../a.mp4", "real", "0", "1", "train", "", '"', "\0", "a,b", "C:\\a.mp4", "\r"]
    )
    if not isinstance(data, bytes):
        kind = data.draw(st.sampled_from(["damaged", "cells", "binary"]))
        if kind == "cells":
            rows = data.draw(st.lists(st.lists(st.one_of(cells, texts()), max_size=5), max_size=4))
            data = "\n".join(["path,label,split", *map(",".join, rows)]).encode()
        else:
            data = data.draw(damaged(text) if kind == "damaged" else st.binary(max_size=60))
    (tmp_path / "media.csv").write_bytes(data)
    found = read(datasets.index, ManifestError, tmp_path, "folder")
    if found:
        for path in found[0]["path"]:
            assert os.path.abspath(tmp_path / path).startswith(f"{tmp_path}{os.sep}"), path
        write_manifest(found[0], tmp_path / "m.parquet")


# --- Crops


@every_kept("crop_index")
@fuzz(50)
@given(data=st.data())
def test_crop_indexes(data, tmp_path, tiny_crops):
    index = pq.read_table(tiny_crops / "crops.parquet").to_pandas().head(3)
    if not isinstance(data, bytes):
        kind = data.draw(st.sampled_from(["bytes", "table", "table"]))
        if kind == "bytes":
            data = data.draw(damaged(parquet(index)))
        else:
            data = parquet(data.draw(odd_table(index)))
    folder = tmp_path / "crops"
    folder.mkdir(exist_ok=True)
    if not (folder / "shards").exists():
        (folder / "shards").symlink_to(tiny_crops / "shards")
    (folder / "crops.parquet").write_bytes(data)
    found = read(crops.read_index, crops.CropError, folder)
    store = crops.CropStore(folder)
    for row in [] if found is None else found.to_dict("records"):
        image = read(store.image, crops.CropError, row)
        assert image is None or (image.ndim == 3 and image.dtype == np.uint8)


@every_kept("settings")
@fuzz(50)
@given(data=st.data())
def test_settings_of_crops(data, tmp_path, tiny_crops):
    _json(data, tmp_path / "settings.json", tiny_crops / "settings.json")
    read(crops.CropStore(tmp_path).settings, crops.CropError)


def _json(data, path, model):
    """Write a JSON file that is like the one at `model`, or is something else altogether."""
    if not isinstance(data, bytes):
        document = json.loads(model.read_text())
        kind = data.draw(st.sampled_from(["changed", "changed", "damaged", "other"]))
        if kind == "damaged":
            data = data.draw(damaged(model.read_bytes()))
        else:
            data = json.dumps(data.draw(changed(document) if kind == "changed" else values())).encode()
    path.write_bytes(data)


@every_kept("annotations")
@fuzz(50)
@given(data=st.data())
def test_annotations(data, tmp_path):
    if not isinstance(data, bytes):
        buffer = io.BytesIO()
        kind = data.draw(st.sampled_from(["f4", "i8", "U3", "complex64", "datetime64[s]", "V7"]))
        shape = data.draw(st.sampled_from([(2, 68, 2), (2, 68), (), (0, 81, 2), (1, 81, 2, 1)]))
        np.savez(buffer, **{data.draw(st.sampled_from(["landmarks", "marks"])): np.zeros(shape, kind)})
        data = data.draw(st.one_of(st.just(buffer.getvalue()), damaged(buffer.getvalue()), st.binary(max_size=40)))
    path = tmp_path / "marks.npz"
    path.write_bytes(data)
    found = read(faces.AnnotationLocator, faces.LocatorError, path)
    if found:
        found.locate(np.zeros((4, 4, 3), np.uint8), 0)


# --- What `unmask score` is given


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    from conftest import moving_frames
    from PIL import Image

    folder, found = tmp_path_factory.mktemp("pictures"), {}
    for form in ("png", "jpg", "webp", "bmp", "gif"):
        path = folder / f"picture.{form}"
        Image.fromarray(moving_frames(1, 48, 64)[0]).save(path)
        found[form] = path.read_bytes()
    return found


@every_kept("media")
@fuzz(40)
@given(data=st.data())
def test_media(data, tmp_path, pictures):
    form = "png"
    if not isinstance(data, bytes):
        form = data.draw(st.sampled_from(sorted(pictures)))
        data = data.draw(st.one_of(damaged(pictures[form]), st.binary(max_size=64)))
    name = tmp_path / f"a medium.{form}"
    name.write_bytes(data)
    row = process_item(Item("0" * 16, str(name), ""), Settings("haar", "", 1, 32, 0.3, False, 10.0, "png", 1)).row
    assert row["status"] == "ok" or row["reason"]
    assert not any(word in row["reason"] for word in ("internal", "crashed", "deadline")), row["reason"]


def score_rows():
    rows = {"item_id": ["a" * 16, "b" * 16], "frame": [-1, 0], "score": [0.5, 0.25], "detector": "d", "variant": "",
            "seed": 0, "checkpoint": "c"}  # fmt: skip
    return pd.DataFrame(rows).astype({"frame": "int32", "seed": "int32"})


@every_kept("scores")
@fuzz(50)
@given(data=st.data())
def test_score_tables(data, tmp_path):
    if not isinstance(data, bytes):
        kind = data.draw(st.sampled_from(["bytes", "table"]))
        data = (
            data.draw(damaged(parquet(score_rows())))
            if kind == "bytes"
            else parquet(data.draw(odd_table(score_rows())))
        )
    path = tmp_path / "scores.parquet"
    path.write_bytes(data)
    read(evaluation.read_scores, ScoreError, path)


@every_kept("scores_csv")
@fuzz(60)
@given(data=st.data())
def test_score_files(data, tmp_path):
    text = b"path,status,score,reason\n0.mp4,ok,0.5,\n1.mp4,ok,0.25,\n2.mp4,failed,,no face found\n"
    if not isinstance(data, bytes):
        cells = st.sampled_from(["0.mp4", "1.mp4", "0.5", "2", "nan", "-inf", "", '"', "\0", "\udcff", "ok"])
        kind = data.draw(st.sampled_from(["damaged", "cells", "binary"]))
        if kind == "cells":
            rows = data.draw(st.lists(st.lists(st.one_of(cells, texts()), max_size=3), max_size=4))
            data = "\n".join(["path,score", *map(",".join, rows)]).encode("utf-8", "surrogateescape")
        else:
            data = data.draw(damaged(text) if kind == "damaged" else st.binary(max_size=60))
    path = tmp_path / "scores.csv"
    path.write_bytes(data)
    read(evaluation.read_media_scores, ScoreError, path, manifest_rows(), tmp_path / "manifest.parquet")


# --- Profiles


@every_kept("profile")
@fuzz(25)
@given(data=st.data())
def test_profiles(data, tmp_path):
    path = tmp_path / "mine.yaml"
    if not isinstance(data, bytes):
        kind = data.draw(st.sampled_from(["key", "changed", "damaged", "text"]))
        whole = load_profile("tiny").as_dict()
        if kind == "key":
            keys = ["name", "run", "seed", "world", "data", "train", "workers", "preprocess"]
            data = yaml.safe_dump(data.draw(st.dictionaries(st.sampled_from(keys), values(), max_size=3))).encode()
        elif kind == "changed":
            data = yaml.safe_dump(data.draw(changed(whole))).encode()
        elif kind == "damaged":
            data = data.draw(damaged(yaml.safe_dump(whole)[:600].encode()))
        else:
            alphabet = st.sampled_from(
                [*"abc:-[]{}&*!|>'\"%@`,?#\n \t012.e~", "seed", "&a", "*a", "!!python/object", "<<: "]
            )
            data = "".join(data.draw(st.lists(alphabet, max_size=30))).encode()
    path.write_bytes(data)
    found = read(load_profile, ProfileError, path)
    if found is not None:
        assert isinstance(found, Profile) and found.hash and "/" not in found.run


@every_kept("settings_text")
@fuzz(30)
@given(data=st.data())
def test_changes_of_a_profile(data):
    if not isinstance(data, bytes):
        key = st.sampled_from(["seeds", "train.epochs", "data.sets", "data", "world.size", "clip.weights", "", "a.b.c"])
        alphabet = st.sampled_from(
            [*"abc:-[]{}&*!|>'\"%@`,?#\n \t012.e~=", "null", "&a", "*a", "!!python/name:os.system"]
        )
        value = st.one_of(st.lists(alphabet, max_size=12).map("".join), texts())
        data = f"{data.draw(key)}={data.draw(value)}".encode()
    text = data.decode("utf-8", "replace")
    found = read(parse_changes, ProfileError, [text])
    if found is not None:
        read(load_profile, ProfileError, "tiny", found)


# --- Checkpoints, panels and exported files


@pytest.fixture(scope="session")
def panel_file(tiny_checkpoint):
    home = tiny_checkpoint.parent / "panel"
    home.mkdir(exist_ok=True)
    shutil.copytree(tiny_checkpoint, home / "convnext", dirs_exist_ok=True)
    generator = np.random.default_rng(0)
    rows = {
        "label": [0, 1] * 20,
        "score": generator.random(40),
        "group_id": [str(i) for i in range(40)],
        "kind": "video",
    }
    panel.fit({"convnext": (home / "convnext", pd.DataFrame(rows))}, home / "panel.json", locators=["yunet"])
    return home / "panel.json"


@every_kept("panel")
@fuzz(50)
@given(data=st.data())
def test_panels(data, panel_file):
    path = panel_file.with_name("fuzzed.json")
    _json(data, path, panel_file)
    read(panel.read, (panel.PanelError, base.CheckpointError), path)


@every_kept("card")
@fuzz(50)
@given(data=st.data())
def test_cards_of_checkpoints(data, tmp_path, tiny_checkpoint):
    shutil.copy(tiny_checkpoint / base.WEIGHTS, tmp_path)
    _json(data, tmp_path / base.CONFIG, tiny_checkpoint / base.CONFIG)
    read(base.load_checkpoint, base.CheckpointError, tmp_path)


@every_kept("exported")
@fuzz(50)
@given(data=st.data())
def test_exported_files(data, tmp_path):
    if not isinstance(data, bytes):
        zipped = io.BytesIO()
        with zipfile.ZipFile(zipped, "w") as archive:
            archive.writestr("archive/data/weights", b"1234")
        card = {"detector": "d", "format": "onnx", "input": {"size": 8}} | data.draw(
            st.dictionaries(st.sampled_from(["input", "unmask", "format", "fingerprint"]), values(), max_size=2)
        )
        whole = exported.seal(data.draw(st.sampled_from([b"a model", zipped.getvalue()])), card)
        data = data.draw(st.one_of(st.just(whole), damaged(whole)))
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    read(exported.opened, base.CheckpointError, path)


@every_kept("lare_index")
@fuzz(40)
@given(data=st.data())
def test_indexes_of_maps(data, tmp_path):
    row = {"item_id": "a" * 16, "frame": 0, "pts": 0.0, "status": "ok", "reason": "", "sha256": "0", "extractor": "e",
           "precision": "float32", "shard": "e-1.safetensors", "position": 0}  # fmt: skip
    df = pd.DataFrame([row]).astype({"frame": "int32", "position": "int32"})
    if not isinstance(data, bytes):
        kind = data.draw(st.sampled_from(["bytes", "table"]))
        data = data.draw(damaged(parquet(df))) if kind == "bytes" else parquet(data.draw(odd_table(df)))
    (tmp_path / "index.parquet").write_bytes(data)
    found = read(lare_maps.read_index, lare_maps.LareError, tmp_path)
    for found_row in [] if found is None else found.to_dict("records"):
        read(lare_maps.read, lare_maps.LareError, tmp_path, found_row["item_id"], found_row["frame"])
