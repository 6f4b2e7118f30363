"""Exported detectors: the checkpoint's own logits in every form, for any batch; no file that is not what it says."""

import io
import json
import subprocess
import sys
import warnings
import zipfile
from contextlib import nullcontext

import cv2
import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import tiny_clips
import torch
from torch import nn

from unmask import cli, export, exported, onnx_detector, scoring
from unmask.data.crops import CropStore, read_index
from unmask.data.video import read_frames
from unmask.detectors import base, clip_backbone
from unmask.detectors.base import CheckpointError, InputSpec
from unmask.export import ExportError
from unmask.profile import ROOT

FORMS = ("pt2", "onnx", "torchscript")
CONVNEXT = {"backbone": "test_convnext", "size": 32}
SPATIAL = {"detector": "convnext", "config": CONVNEXT}
PREPROCESSING = {"frames": 4, "size": 96, "margin": 0.5, "align": False, "sampling": "uniform"}
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small networks on few cores: threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clips.write(tmp_path_factory.mktemp("clip"))


def stirred(detector, seed=0):
    """The detector with noise on all that learns, so that nothing starts at zero and no two logits are the same."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in detector.trainable_parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng)
    return detector.eval()


def saved(folder, detector):
    return base.save_checkpoint(detector, folder, preprocessing=PREPROCESSING, seed=7)


def built(name, clip, **config):
    torch.manual_seed(0)
    if name in ("mean", "gru", "transformer"):
        config = {"spatial": SPATIAL, "frames": 3} | config
    elif name not in ("convnext", "residual"):
        config = {"backbone": clip} | config
    return stirred(base.build(name, **config))


@pytest.fixture(scope="module")
def probe(tmp_path_factory, clip):
    """A linear probe, the folder of its checkpoint, and the files of all its exports by form."""
    folder = tmp_path_factory.mktemp("probe")
    detector = built("ufd", clip)
    checkpoint = saved(folder / "checkpoint", detector)
    return detector, checkpoint, {f: export.export(checkpoint, f, folder / f"probe.{f}") for f in FORMS}


def run_elsewhere(path, form):
    """What a file computes and the card in it, found by PyTorch's and ONNX Runtime's own means."""
    if form == "onnx":
        session = onnxruntime.InferenceSession(str(path))
        return (
            lambda clips: torch.from_numpy(session.run(None, {"clips": clips.numpy()})[0]),
            session.get_modelmeta().custom_metadata_map["unmask.json"],
        )
    card = {"unmask.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form == "pt2":
            return torch.export.load(path, extra_files=card).module(), card["unmask.json"]
        return torch.jit.load(path, _extra_files=card), card["unmask.json"]


@torch.no_grad()
def difference(detector, path, form, frames):
    model, size = run_elsewhere(path, form)[0], detector.input_spec.size
    rng = torch.Generator().manual_seed(3)
    found = []
    for batch in (1, 2, 5):
        clips = torch.randn(batch, frames, 3, size, size, generator=rng)
        wanted = detector(clips)
        assert wanted.shape == (batch,) and (batch == 1 or wanted.std() > 1e-4)
        found.append((model(clips) - wanted).abs().max().item() / max(wanted.abs().max().item(), 1))
    return max(found)


@every_form
def test_a_file_gives_the_checkpoint_s_logits_for_any_batch(probe, form):
    detector, checkpoint, files = probe
    assert difference(detector, files[form], form, 1) < 1e-5
    card = json.loads(run_elsewhere(files[form], form)[1])
    own = json.loads((checkpoint / "config.json").read_text())
    assert {key: card[key] for key in ("detector", "sha256", "seed", "preprocessing", "input")} == {
        key: own[key] for key in ("detector", "sha256", "seed", "preprocessing", "input")
    }
    assert (card["format"], card["frames"], len(card["fingerprint"])) == (form, 1, 64)


@pytest.mark.parametrize(("name", "form", "frames", "config"), [
    ("residual", "onnx", 1, {"size": 32, "width": 8}),
    ("convnext", "torchscript", 1, CONVNEXT | {"frequency": "fft", "join": "attention", "fusion": "topdown"}),
    ("gru", "torchscript", 2, {"width": 8}), ("transformer", "torchscript", 3, {"width": 8}), ("ufd", "pt2", 3, {}),
    ("cocoop", "pt2", 1, {}), ("clip-lare:F0-text", "pt2", 2, {}),
    ("st-adapter", "torchscript", 12, {"placement": "last-2"}),
])  # fmt: skip
def test_so_do_those_of_other_detectors(tmp_path, clip, name, form, frames, config):
    detector = built(name, clip, **config)
    path = export.export(saved(tmp_path / "checkpoint", detector), form, tmp_path / "file", frames)
    assert difference(detector, path, form, frames) < 1e-5


@pytest.fixture(scope="module")
def wide_clip(tmp_path_factory):
    """A CLIP with 7x7 patches, the least that the published layer takes."""
    return tiny_clips.write(tmp_path_factory.mktemp("wide"), vision=tiny_clips.VIT | {"image_size": 49, "layers": 2})


def far_looking(clip, **config):
    """A D2ST detector whose offsets come near their limits, which moves what it says."""
    detector = built("d2st", clip, placement="last-1", **config)
    clips = torch.randn(4, config.get("frames", 12), 3, *[detector.input_spec.size] * 2)
    with torch.no_grad():
        near = detector(clips)
        nets = [p for name, p in detector.adapters.named_parameters() if "offset" in name]
        for parameter in nets:
            parameter *= 10
        assert nets and (detector(clips) - near).abs().max() > 1e-3
    return detector


@pytest.fixture(scope="module")
def d2st(tmp_path_factory, clip):
    """Such a detector over clips of 12 frames, its checkpoint and its ONNX file."""
    folder = tmp_path_factory.mktemp("d2st")
    detector = far_looking(clip)
    checkpoint = saved(folder / "checkpoint", detector)
    return detector, checkpoint, export.export(checkpoint, "onnx", folder / "model.onnx")


def test_deformable_attention_as_onnx(d2st, tmp_path):
    detector, checkpoint, path = d2st
    assert difference(detector, path, "onnx", 12) < 1e-5
    assert difference(detector, export.export(checkpoint, "onnx", tmp_path / "1.onnx", 1), "onnx", 1) < 1e-5


@pytest.mark.parametrize(("mode", "form"), [("aligned", "torchscript"), ("reference", "pt2")])
def test_deformable_attention_in_both_modes(wide_clip, tmp_path, mode, form):
    detector = far_looking(wide_clip, mode=mode)
    path = export.export(saved(tmp_path / "checkpoint", detector), form, tmp_path / "file")
    assert difference(detector, path, form, 12) < 1e-5


class Fixed(base.Detector):
    """Makes a Python number of the batch, as is easily done."""

    name, input_spec, config = "fixed", InputSpec(8), {}

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, clips, mask=None):
        return self.linear(clips.mean((1, 2, 3))).expand(int(clips.shape[0]), 1).reshape(int(clips.shape[0]))


@every_form
def test_a_batch_of_fixed_size_is_refused(tmp_path, monkeypatch, form):
    monkeypatch.setitem(base._REGISTRY, "fixed", Fixed)
    checkpoint = saved(tmp_path / "checkpoint", Fixed())
    with pytest.raises(ExportError, match=f"fixed cannot be exported as {form}: "):
        export.export(checkpoint, form, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_program_of_fixed_batch_is_found_though_torch_says_nothing(monkeypatch):
    real = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda model, args, dynamic_shapes: real(model, args))
    with pytest.raises(ValueError, match="fixed size"):
        export._program(nn.Flatten(0).requires_grad_(False), torch.zeros(2, 1, 3, 8, 8))


def test_what_cannot_be_exported_says_why(tmp_path, clip, capsys):
    fused = saved(tmp_path / "fused", base.build("clip-lare:F1", backbone=clip, lare_side=8))
    with pytest.raises(ExportError, match="clip-lare:F1 reads lare besides clips"):
        export.export(fused, "pt2", tmp_path / "file")
    heads = saved(tmp_path / "heads", built("mean", clip))
    with pytest.raises(ExportError, match="mean cannot be exported as pt2: a clip has at most 3 frames"):
        export.export(heads, "pt2", tmp_path / "file", frames=4)
    bare = base.save_checkpoint(built("ufd", clip), tmp_path / "bare", seed=0)
    with pytest.raises(CheckpointError, match="does not say its preprocessing"):
        export.export(bare, "pt2", tmp_path / "file")
    phase = saved(tmp_path / "phase", built("convnext", clip, **CONVNEXT, frequency="phase"))
    assert cli.main(["export", str(phase), "--format", "onnx", "--out", str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("unmask: convnext cannot be exported as onnx: ") and "complex" in said
    assert not (tmp_path / "file").exists()


@every_form
def test_files_hold_what_is_used_and_no_places_on_this_machine(probe, tmp_path, form):
    _, checkpoint, files = probe
    data = files[form].read_bytes()
    assert len(data) < 1e6, "the token embeddings of the text tower alone are 4.7 MB"
    parts = [data]
    if form != "onnx":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts += [archive.read(name) for name in archive.namelist()]
    for place in (str(ROOT), "site-packages", str(checkpoint)):
        assert not any(place.encode() in part for part in parts)
    if form != "torchscript":  # which numbers the classes of a process
        assert export.export(checkpoint, form, tmp_path / "again").read_bytes() == data


def without_card(path, form):
    """The model as it was before the card went in."""
    data = path.read_bytes()
    if form == "onnx":
        model = onnx.load_model_from_string(data)
        del model.metadata_props[:]
        return model.SerializeToString(deterministic=True)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            if not name.endswith("unmask.json"):
                new.writestr(name, old.read(name))
    return out.getvalue()


def with_card(path, form, change):
    """The file with `change` applied to its card's text, as someone might edit it."""
    out, text = io.BytesIO(), change(run_elsewhere(path, form)[1])
    if form == "onnx":
        model = onnx.load_model_from_string(path.read_bytes())
        model.metadata_props[0].value = text
        return model.SerializeToString(deterministic=True)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, text if name.endswith("unmask.json") else old.read(name))
    return out.getvalue()


def text_of(text):
    return text if isinstance(text, str) else text.decode()


@every_form
def test_what_was_changed_is_refused(probe, tmp_path, form, monkeypatch):
    path = probe[2][form]
    data = path.read_bytes()
    with zipfile.ZipFile(path) if form != "onnx" else nullcontext() as archive:
        parts = [archive.read(name) for name in archive.namelist()] if archive else [data[:1000], data[1000:]]
    for part in sorted(parts, key=len)[-6:]:
        where = data.index(part) + len(part) // 3
        (tmp_path / "flipped").write_bytes(data[:where] + bytes([data[where] ^ 4]) + data[where + 1 :])
        with pytest.raises(CheckpointError, match="refused by its fingerprint|is damaged"):
            exported.opened(tmp_path / "flipped")
    (tmp_path / "bare").write_bytes(without_card(path, form))
    with pytest.raises(CheckpointError, match="not written by `unmask export`"):
        exported.opened(tmp_path / "bare")
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="is damaged"):
        exported.opened(tmp_path / "cut")
    assert exported.opened(path)[1]["seed"] == 7
    (tmp_path / "same").write_bytes(with_card(path, form, text_of))
    assert exported.opened(tmp_path / "same")[1] == exported.opened(path)[1], "an edit that changes nothing passes"
    (tmp_path / "edited").write_bytes(
        with_card(path, form, lambda t: text_of(t).replace('"margin": 0.5', '"margin": 0'))
    )
    with pytest.raises(CheckpointError, match="refused by its fingerprint"):
        exported.opened(tmp_path / "edited")
    monkeypatch.setattr(exported, "__version__", "9.9")
    with pytest.raises(CheckpointError, match=r"was exported by Unmask 0\.\d\.\d, and this is 9\.9"):
        exported.opened(path)


@pytest.mark.parametrize("length", [0, 1, 127, 128, 200, 300, 16383, 16384, 40000])
def test_the_card_of_onnx_is_framed_as_protobuf_does(length):
    entry = onnx.StringStringEntryProto(key="unmask.json", value="x" * length)
    wanted = onnx.ModelProto(metadata_props=[entry]).SerializeToString()
    assert exported._metadata(b"x" * length) == wanted


def test_a_card_that_onnx_would_not_find_is_none(probe, tmp_path):
    data = probe[2]["onnx"].read_bytes()
    at = data.rfind(b"unmask.json")
    for where in range(at - 4, at):  # its frame: number and length of the entry, number and length of the key
        (tmp_path / "flipped").write_bytes(data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :])
        with pytest.raises(CheckpointError, match="is damaged or was not written"):
            exported.opened(tmp_path / "flipped")


def test_what_is_no_file_of_export_is_refused(probe, tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("unmask.json {}")
    for name in ("empty", "text"):
        with pytest.raises(CheckpointError, match="is damaged or was not written"):
            onnx_detector.load(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        onnx_detector.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is an exported pt2; media are scored with"):
        onnx_detector.load(probe[2]["pt2"])


def test_verify_compares_with_the_checkpoint_on_random_and_on_real_crops(probe, clip, tiny_crops, tmp_path, capsys):
    detector, checkpoint, files = probe
    given = ["export", str(checkpoint), "--format", "pt2", "--out", str(tmp_path / "model.pt2"), "--verify"]
    assert cli.main([*given, "--clips", str(tiny_crops)]) == 0
    said = capsys.readouterr().out
    assert "random" in said and "real" in said and "within 0.0001" in said
    table = export.verify(checkpoint, files["pt2"], tiny_crops, own=True)
    assert table[["clips", "batch"]].values.tolist() == [[k, b] for k in ("random", "real") for b in (1, 2, 5)]
    assert table["difference"].max() < 1e-5
    images = export._real_clips(tiny_crops, detector.input_spec)
    assert images.shape == (5, 1, 28, 28, 3) and len(np.unique(images.reshape(5, -1), axis=0)) == 5

    other = stirred(base.build("ufd", backbone=clip), seed=9)
    theirs = saved(tmp_path / "other", other)
    with pytest.raises(CheckpointError, match="was not made of the checkpoint in"):
        export.verify(theirs, files["onnx"])
    sha = json.loads((theirs / "config.json").read_text())["sha256"]
    card = json.loads(run_elsewhere(files["onnx"], "onnx")[1]) | {"sha256": sha}
    del card["fingerprint"], card["unmask"]
    (tmp_path / "wrong.onnx").write_bytes(exported.seal(without_card(files["onnx"], "onnx"), card))
    table = export.verify(theirs, tmp_path / "wrong.onnx", seed=5)
    rng = np.random.default_rng(5).integers(0, 256, (5, 1, 28, 28, 3), np.uint8)
    clips = detector.prepare(torch.from_numpy(rng))
    with torch.no_grad():
        gap = (detector(clips) - other(clips)).abs()
    assert table["difference"].tolist() == pytest.approx(
        [gap[0].item(), gap[:2].max().item(), gap.max().item()], abs=1e-4
    )


@pytest.mark.parametrize(("gap", "code"), [(2e-5, 0), (2e-4, 1), (float("nan"), 1)])
def test_the_exit_code_says_whether_it_is_close(probe, tmp_path, monkeypatch, capsys, gap, code):
    table = pd.DataFrame({"clips": "random", "batch": [1, 2, 5], "difference": [0.0, gap, 0.0]})
    monkeypatch.setattr(export, "verify", lambda *given, own: table)
    given = ["export", str(probe[1]), "--format", "torchscript", "--out", str(tmp_path / "file"), "--verify"]
    assert cli.main(given) == code
    said = capsys.readouterr().out
    assert ("NOT WITHIN" in said) == bool(code) and "PyTorch deprecates TorchScript" in said


def test_an_onnx_detector_takes_its_clips_and_no_others(probe):
    detector, card = onnx_detector.load(probe[2]["onnx"])
    assert (detector.name, detector.input_spec, detector.exact_frames) == ("ufd", probe[0].input_spec, False)
    assert card["sha256"] == json.loads((probe[1] / "config.json").read_text())["sha256"]
    for clips, mask in [
        ((2, 2, 3, 28, 28), None),
        ((2, 1, 3, 32, 32), None),
        ((2, 1, 3, 28, 28), torch.ones(2, 1) > 0),
    ]:
        with pytest.raises(ValueError, match=r"shape \(B, 1, 3, 28, 28\) and no mask"):
            detector(torch.zeros(clips), mask)


def test_scores_of_crops_are_those_of_the_checkpoint(probe, tiny_crops):
    (detector, card), index = onnx_detector.load(probe[2]["onnx"]), read_index(tiny_crops)
    wanted = scoring.score_table(*base.load_checkpoint(probe[1]), CropStore(tiny_crops), index, "probe")
    pd.testing.assert_frame_equal(scoring.score_table(detector, card, CropStore(tiny_crops), index, "probe"), wanted)
    assert wanted["score"].std() > 1e-3


def test_clips_have_all_the_frames_that_were_exported(d2st, dense_crops):
    """Of up to 4 crops, in their order, each as often as the others to make 12; of the checkpoint, and of ONNX."""
    detector, checkpoint, path = d2st
    index, store = read_index(dense_crops), CropStore(dense_crops)
    sizes = index.groupby("item_id").size()
    names = sorted([*sizes.index[sizes == 4][:2], *sizes.index[sizes == 1][:2]])
    rows, repeats = index[index["item_id"].isin(names)], {1: [0] * 12, 4: [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]}
    for scored in (base.load_checkpoint(checkpoint)[0], onnx_detector.load(path)[0]):
        assert scored.exact_frames
        table = scoring.score_crops(scored, store, rows)
        assert table["item_id"].tolist() == names and (table["frame"] == -1).all()
        for name, score in zip(table["item_id"], table["score"], strict=True):
            own = rows[rows["item_id"] == name].sort_values("frame")
            images = scoring.frame_images(store, own.iloc[repeats[len(own)]], InputSpec(28, still=True))
            with torch.no_grad():
                logit = detector(detector.prepare(torch.from_numpy(images)[None])).item()
            assert score == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)


def test_windows_of_exported_clips_overlap(probe, tmp_path, dense_crops):
    """Four crops for clips of exactly three: the first three and the last three."""
    detector, path = probe[0], export.export(probe[1], "onnx", tmp_path / "3.onnx", frames=3)
    assert difference(detector, path, "onnx", 3) < 1e-5
    index, store = read_index(dense_crops), CropStore(dense_crops)
    sizes = index.groupby("item_id").size()
    rows = index[index["item_id"] == sizes.index[sizes == 4][0]].sort_values("frame")
    images = scoring.frame_images(store, rows, InputSpec(28))
    with torch.no_grad():
        logits = [detector(detector.prepare(torch.from_numpy(images[k : k + 3])[None])).item() for k in (0, 1)]
    score = scoring.score_crops(onnx_detector.load(path)[0], store, rows)["score"].item()
    assert score == pytest.approx(np.mean([1 / (1 + np.exp(-x)) for x in logits]), abs=1e-5)


ALONE = """
import sys
import pandas as pd
from unmask.data.crops import CropStore, read_index
from unmask import onnx_detector, scoring
detector, card = onnx_detector.load(sys.argv[1])
table = scoring.score_table(detector, card, CropStore(sys.argv[2]), read_index(sys.argv[2]), "alone")
assert table["score"].between(0, 1).all() and len(table)
print(sorted({"open_clip", "onnx", "onnxscript", "transformers"} & set(sys.modules)))
"""


def test_scoring_needs_onnx_runtime_alone(probe, tiny_crops):
    command = [sys.executable, "-c", ALONE, str(probe[2]["onnx"]), str(tiny_crops)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "lib", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_real_clips_score_alike_with_the_checkpoint_and_without_any_clip(shared_data, tmp_path, monkeypatch, d2st):
    """Of frames of a clip, and of a picture, which is such a clip standing still."""
    monkeypatch.setenv("UNMASK_MODELS", str(shared_data / "models"))
    media = [shared_data / "media/real/620900105.mp4", tmp_path / "picture.png"]
    (frame,) = read_frames(shared_data / "media/real/vscodehappy_clip1.mp4", 1).frames
    cv2.imwrite(str(media[1]), frame[..., ::-1])
    _, checkpoint, path = d2st

    def scored(by, out):
        assert cli.main(["score", *map(str, media), "--checkpoint", str(by), "--out", str(out)]) == 0
        return pd.read_csv(out), json.loads(out.with_suffix(".json").read_text())

    wanted, document = scored(checkpoint, tmp_path / "1.csv")
    monkeypatch.delattr(clip_backbone, "load")
    found, again = scored(path, tmp_path / "2.csv")
    pd.testing.assert_frame_equal(found, wanted, atol=2e-6, rtol=0)
    assert (wanted["status"] == "ok").all() and wanted["faces"].tolist() == [4, 1] and wanted["score"].std() > 1e-4
    assert again["sha256"] == document["sha256"] and again["checkpoint"] == str(path)
