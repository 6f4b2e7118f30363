"""The manifest: what is refused, what survives, and the rules of groups, splits and weights."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unmask.data import manifest as m


def rows(*specs, dataset="d"):
    """Manifest from (path, split, label, subject, source_id) tuples."""
    df = pd.DataFrame([{"path": p, "split": s, "label": k, "subject": a, "source_id": b} for p, s, k, a, b in specs])
    df = df.assign(item_id=[m.item_id(dataset, p) for p in df["path"]], root="media", kind="video", dataset=dataset,
                   method=np.where(df["label"] == 0, "real", "swap"), camera="", annotations="")
    return m.assign_groups(df.astype({"label": "int8"}))[list(m.COLUMNS)]


@pytest.fixture
def df():
    return rows(("a.mp4", "train", 0, "s1", ""), ("ä b\n.mp4", "train", 1, "s1", "s2"), ("c.mp4", "test", 0, "s3", ""),
                ("d.png", "test", 1, "s3", "s4"))


def test_round_trip_is_exact_and_stores_no_foreign_metadata(df, tmp_path):
    m.write_manifest(df, tmp_path / "deep" / "manifest.parquet")
    back = m.read_manifest(tmp_path / "deep" / "manifest.parquet")
    pd.testing.assert_frame_equal(back, df, check_dtype=False)
    assert back["label"].dtype == np.int8
    assert pq.read_schema(tmp_path / "deep" / "manifest.parquet").metadata is None
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["manifest.parquet"]


def test_item_id_is_the_documented_hash():
    assert m.item_id("d", "a.mp4") == "ce0a5b1740ed8ee8"  # sha256sum of "d/a.mp4"
    assert m.item_id("d", "a") != m.item_id("e", "a")


@pytest.mark.parametrize(("column", "value", "named"), [
    ("item_id", "xyz", "item_id"), ("path", "../out.mp4", "path"), ("path", "/etc/passwd", "path"),
    ("path", "a/../../b.mp4", "path"), ("path", "", "path"), ("path", "a\0b", "path"), ("kind", "audio", "kind"),
    ("split", "dev", "split"), ("label", 2, "label"), ("method", "real", "method"), ("method", "", "method"),
    ("group_id", "", "group_id"), ("dataset", "", "dataset"), ("root", "", "root"), ("subject", None, "subject"),
    ("annotations", "../../x.npz", "annotations"),
])
def test_a_bad_value_is_refused_by_name_and_leaves_nothing_behind(df, tmp_path, column, value, named):
    df[column] = df[column].astype(object) if column != "label" else df[column]
    df.at[1, column] = value
    with pytest.raises(m.ManifestError, match=named):
        m.write_manifest(df, tmp_path / "m.parquet")
    assert list(tmp_path.iterdir()) == []


def test_bad_tables_are_refused(df, tmp_path):
    for bad, named in [(df.drop(columns="camera"), "camera"), (df.assign(extra=1), "extra"),
                       (df[list(reversed(m.COLUMNS))], "order"), (df.astype({"label": "float64"}), "label"),
                       (pd.concat([df, df]), "item_id"), (df.iloc[:0], "no rows"),
                       (df.assign(subject=pd.Series(["\ud800"] * 4, dtype=object)), "cannot be stored")]:
        with pytest.raises(m.ManifestError, match=named):
            m.write_manifest(bad, tmp_path / "m.parquet")


def test_failed_write_keeps_the_old_manifest(df, tmp_path):
    m.write_manifest(df, tmp_path / "m.parquet")
    before = (tmp_path / "m.parquet").read_bytes()
    with pytest.raises(m.ManifestError):
        m.write_manifest(df.assign(split="dev"), tmp_path / "m.parquet")
    assert (tmp_path / "m.parquet").read_bytes() == before


def test_interrupted_write_leaves_no_partial_file(df, tmp_path, monkeypatch):
    monkeypatch.setattr(m.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        m.write_manifest(df, tmp_path / "m.parquet")
    assert list(tmp_path.iterdir()) == []


def test_reading_survives_malformed_files(df, tmp_path):
    path = tmp_path / "m.parquet"
    with pytest.raises(m.ManifestError, match="no manifest"):
        m.read_manifest(path)
    for content in (b"", b"PAR1", b"path,label\na.mp4,1\n", b"PAR1" + b"\xff" * 200 + b"PAR1"):
        path.write_bytes(content)
        with pytest.raises(m.ManifestError, match="Parquet"):
            m.read_manifest(path)


def test_reading_refuses_other_schemas_and_bad_content(df, tmp_path):
    path = tmp_path / "m.parquet"
    m.write_manifest(df, path)
    table = pq.read_table(path)
    nested = table.set_column(0, "item_id", pa.array([["x"]] * 4))
    raw = table.set_column(2, "path", pa.array([b"\xff\xfe"] * 4, pa.binary()).view(pa.string()))
    wide = table.set_column(6, "label", table["label"].cast("int64"))
    evil = table.set_column(2, "path", pa.array(["../../etc/passwd"] * 4))
    for bad, named in [(nested, "item_id"), (raw, "Parquet|UTF"), (wide, "label"), (evil, "path"),
                       (table.drop_columns("split"), "split"), (table.slice(0, 0), "no rows|item_id")]:
        pq.write_table(bad, path)
        with pytest.raises(m.ManifestError, match=named):
            m.read_manifest(path)


def test_a_flipped_byte_is_an_error_or_harmless(df, tmp_path):
    path = tmp_path / "m.parquet"
    m.write_manifest(df, path)
    good, kept = path.read_bytes(), 0
    for position in np.random.default_rng(0).choice(len(good), 150, replace=False):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x41]) + good[position + 1:])
        try:
            back = m.read_manifest(path)
        except m.ManifestError:
            continue
        kept += 1
        pd.testing.assert_frame_equal(back, df, check_dtype=False)
    assert kept < 150


def test_media_path_takes_relative_roots_from_the_manifest_and_refuses_escapes(tmp_path):
    where = tmp_path / "m.parquet"
    assert m.media_path({"root": "media", "path": "a/b.mp4"}, where) == tmp_path / "media" / "a" / "b.mp4"
    assert str(m.media_path({"root": "/data", "path": "a.mp4"}, where)) == "/data/a.mp4"
    row = {"root": "media", "path": "a.mp4", "annotations": "a.npz"}
    assert m.media_path(row, where, "annotations") == tmp_path / "media" / "a.npz"
    for path in ("../x", "/x", "a/../../x", "", ".", "a\0"):
        with pytest.raises(m.ManifestError, match="root"):
            m.media_path({"root": "media", "path": path}, where)


def test_groups_are_connected_components_within_a_family():
    df = rows(("1", "train", 0, "s1", ""), ("2", "train", 1, "s1", "s2"), ("3", "train", 1, "s3", "s2"),
              ("4", "train", 0, "s4", ""), ("5", "train", 0, "", ""), ("6", "train", 0, "", ""),
              ("7", "train", 1, "", "s4"))
    a, b, c, d, e, f, g = df["group_id"]
    assert a == b == c == "d:s1"
    assert d == g and len({a, d, e, f}) == 4


def test_bare_ids_stay_in_their_data_set_and_family_ids_do_not():
    one, two = (rows(("1", "train", 0, "s1", ""), ("2", "train", 0, "ffpp:001", ""), dataset=d) for d in ("a", "b"))
    g = m.assign_groups(pd.concat([one, two], ignore_index=True))["group_id"]
    assert g[0] != g[2] and g[1] == g[3] == "ffpp:001"


def test_donors_of_dense_families_join_nothing():
    df = rows(("1", "train", 1, "celebdf:id0", "celebdf:id1"), ("2", "test", 1, "celebdf:id1", "celebdf:id0"))
    assert list(df["group_id"]) == ["celebdf:id0", "celebdf:id1"]


def test_constructed_leak_is_counted_and_refused_unless_official(df):
    assert m.leakage(df).empty and m.check_splits(df).empty
    leaky = rows(("a", "train", 0, "s1", ""), ("b", "test", 1, "s1", "s2"), ("c", "val", 0, "s2", ""),
                 ("d", "test", 0, "s9", ""))
    leaks = m.leakage(leaky)
    assert leaks.index.tolist() == ["d:s1"] and leaks.loc["d:s1"].to_dict() == {"train": 1, "val": 1, "test": 1}
    with pytest.raises(m.ManifestError, match="1 groups.*'d:s1'"):
        m.check_splits(leaky)
    assert len(m.check_splits(leaky, allow_official=["d"])) == 1
    mixed = pd.concat([rows(("a", "train", 0, "ffpp:001", ""), dataset="ffpp"),
                       rows(("a", "test", 0, "ffpp:001", ""), dataset="mine")])
    with pytest.raises(m.ManifestError):
        m.check_splits(mixed, allow_official=["ffpp"])


@pytest.mark.parametrize("seed", range(5))
def test_split_by_group_divides_no_group_and_gives_every_split_both_classes(seed):
    rng = np.random.default_rng(seed)
    specs = [(f"{g}-{i}", "train", int(rng.integers(2)), f"s{g}", "") for g in range(12)
             for i in range(rng.integers(1, 9))]
    specs += [(f"real{i}", "train", 0, f"r{i}", "") for i in range(6)]
    df = rows(*specs)
    out = m.split_by_group(df, m.DEFAULT_FRACTIONS, seed)
    assert m.leakage(out).empty
    assert (out.groupby("split")["label"].nunique() == 2).all() and out["split"].nunique() == 3
    shuffled = m.split_by_group(df.sample(frac=1, random_state=seed), m.DEFAULT_FRACTIONS, seed)
    pd.testing.assert_series_equal(shuffled["split"].sort_index(), out["split"])


def test_split_by_group_keeps_shares_depends_on_seed_and_pairs_one_class_groups():
    many = rows(*[(str(i), "train", i % 2, f"s{i}", "") for i in range(200)])
    a, b = (m.split_by_group(many, {"train": 0.7, "val": 0.1, "test": 0.2}, s)["split"] for s in (0, 1))
    assert a.value_counts().to_dict() == {"train": 140, "test": 40, "val": 20} and not a.equals(b)
    few = rows(*[(str(i), "train", int(i > 2), f"s{i}", "") for i in range(6)])
    out = m.split_by_group(few, m.DEFAULT_FRACTIONS, 3)
    assert (out.groupby("split")["label"].nunique() == 2).all() and out["split"].nunique() == 3
    one = m.split_by_group(few.iloc[:1], m.DEFAULT_FRACTIONS, 0)
    assert one["split"].tolist() == ["train"]
    for bad in ({"train": 0.5}, {"train": 1.5, "val": -0.5}, {"dev": 1.0}, {}):
        with pytest.raises(m.ManifestError, match="fractions"):
            m.split_by_group(few, bad, 0)


def test_sampling_weights_balance_class_then_data_set_then_method():
    a = rows(*[(f"r{i}", "train", 0, "", "") for i in range(7)], *[(f"f{i}", "train", 1, "", "") for i in range(3)])
    b = rows(("r", "train", 0, "", ""), ("f", "train", 1, "", ""), ("g", "train", 1, "", ""), dataset="e")
    b.loc[2, "method"] = "other"
    df = pd.concat([a, b], ignore_index=True)
    w = pd.Series(m.sampling_weights(df))
    assert w.sum() == pytest.approx(1)
    assert w.groupby(df["label"]).sum().tolist() == pytest.approx([0.5, 0.5])
    assert w.groupby([df["label"], df["dataset"]]).sum().tolist() == pytest.approx([0.25] * 4)
    assert w.iloc[-1] == pytest.approx(0.125) and w.iloc[7] == pytest.approx(0.25 / 3)


def test_hash_ignores_order_and_root_but_nothing_else(df):
    reference = m.manifest_hash(df)
    assert m.manifest_hash(df.sample(frac=1, random_state=0).assign(root="/elsewhere")) == reference
    for column in set(m.COLUMNS) - {"root", "label"}:
        changed = df.astype({column: object})
        changed.at[0, column] = "changed"
        assert m.manifest_hash(changed) != reference, column
    assert m.manifest_hash(df.assign(label=(1 - df["label"]).astype("int8"))) != reference


def test_summary_counts(df):
    table = m.summary(df)
    assert table["items"].sum() == 4 and list(table.columns) == ["dataset", "split", "label", "method", "items"]
