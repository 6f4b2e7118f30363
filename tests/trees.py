"""Fabricated data set trees with the real names, for the tests of the adapters. Media are placeholders."""

import json
from pathlib import Path

import pandas as pd
import pytest

from unmask.data import manifest as m
from unmask.data.adapters_ffpp import FFPP_METHODS

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
