"""What a stranger's files cannot do here: run code, reach outside their folder, or say something to the shell."""

import ast
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import open_clip
import pandas as pd
import pyarrow
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import timm
import tiny_clips
import torch
import yaml
from test_workflow import make_tree, run

from unmask import cli, evaluation, export, exported, lare_maps, lare_model, learning, panel, training
from unmask.data import collect, crops, datasets, faces
from unmask.data.manifest import COLUMNS, ManifestError, item_id, media_path, read_manifest, write_manifest
from unmask.detectors import base, clip_backbone
from unmask.figures import save_figure, save_table
from unmask.profile import ROOT, ProfileError, Study, load_profile, parse_changes
from unmask.scoring import score_media
from unmask.workflow import parse_options, study_profile

# --- What the sources may not use, and the one place that may

LOADERS = {"pickle": set(), "cloudpickle": set(), "dill": set(), "shelve": set(), "marshal": set(), "jsonpickle": set()}
CALLS = {
    "joblib.load": set(), "pd.read_pickle": set(), "torch.jit.load": {"export.py", "clip_backbone.py"},
    "torch.export.load": {"export.py"}, "yaml.load": set(), "yaml.unsafe_load": set(), "yaml.full_load": set(),
    "yaml.load_all": set(), "os.system": set(), "os.popen": set(), "eval": set(), "exec": set(),
    "urllib.request.urlopen": set(), "requests.get": set(), "ssl._create_unverified_context": set(),
    "torch.hub.load": set(), "torch.hub.load_state_dict_from_url": set(),
}  # fmt: skip
# ZipFile.extractall keeps to its folder, whatever the entries are called; a tar's does not. In the notebooks it unpacks
# the kit itself, as somebody uploaded it to Colab, where nothing of the kit can be imported yet.
METHODS = {"extractall": {"archives.py"}, "to_pickle": set()}


def faults(source, name):
    """What is wrong in the source of a file, a line each."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        line = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in LOADERS:
            if node.attr not in ("UnpicklingError",):
                found.append(f"{line} {node.value.id}.{node.attr}")
        if isinstance(node, ast.Import):
            found += [f"{line} import {one.name}" for one in node.names if one.name in LOADERS and one.name != "pickle"]
            found += [f"{line} another name for pickle" for one in node.names if one.name == "pickle" and one.asname]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LOADERS:
            found.append(f"{line} from {node.module} import")
        if isinstance(node, ast.Call):
            found += [f"{line} {what}" for what in _call(node, name)]
    return found


def _call(node, name):
    called, given = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
    if name not in CALLS.get(called, {name}):
        yield called
    if isinstance(node.func, ast.Attribute) and name not in METHODS.get(node.func.attr, {name}):
        if not (name.endswith(".ipynb") and called == "upload.extractall"):
            yield called
    if called == "torch.load" and ast.unparse(given.get("weights_only", ast.Constant(None))) != "True":
        yield "torch.load without weights_only=True"
    if ast.unparse(given.get("allow_pickle", ast.Constant(False))) != "False":
        yield f"{called} with allow_pickle"
    if ast.unparse(given.get("shell", ast.Constant(False))) != "False":
        yield f"{called} with shell"
    if ast.unparse(given.get("trust_remote_code", ast.Constant(False))) != "False":
        yield f"{called} with trust_remote_code"
    if ast.unparse(given.get("verify", ast.Constant(True))) == "False":
        yield f"{called} without verification"


def sources():
    """All code of the kit but its tests: modules, benchmarks, jobs, and the cells of notebooks."""
    for folder in ("lib", "benchmarks", "jobs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.name, path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                lines = "".join(cell["source"]).splitlines()
                yield path.name, "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)


def test_nothing_unpickles_or_starts_a_shell():
    every = list(sources())
    assert len({name for name, _ in every}) > 100
    assert [fault for name, text in every for fault in faults(text, name)] == []


BAD = ["import dill", "from cloudpickle import loads", "import pickle\npickle.load(f)", "torch.load(path)",
       "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)", "np.load(p, allow_pickle=True)",
       "joblib.load(p)", "pd.read_pickle(p)", "df.to_pickle(p)", "yaml.load(text, Loader=yaml.Loader)",
       "subprocess.run(text, shell=True)", "os.system(text)", "archive.extractall(folder)", "eval(text)",
       "torch.jit.load(p)", "torch.export.load(p)", "AutoModel.from_pretrained(x, trust_remote_code=True)",
       "import pickle as p\np.loads(b)", "urllib.request.urlopen(url)", "requests.get(url, verify=False)"]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_the_search_finds(text):
    assert faults(text, "some.py")


@pytest.mark.parametrize(
    "text", ["except pickle.UnpicklingError: pass", "torch.load(p, weights_only=True)", "s.str.extract('a')",
             "np.load(p)", "np.load(p, allow_pickle=False)", "yaml.safe_load(t)", "model.eval()"],
)  # fmt: skip
def test_the_search_passes(text):
    assert faults(f"try: pass\n{text}" if text.startswith("except") else text, "some.py") == []


# --- Malicious checkpoints


class Evil:
    """Whoever unpickles it makes a folder."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.fixture
def place(tmp_path):
    """Where code that ran would leave its mark; at the end it must not be there."""
    yield tmp_path / "pwned"
    assert not (tmp_path / "pwned").exists(), "the file ran code"


def evil_files(place):
    """The same malice in every form: a bare pickle, as torch.save writes it, as NumPy does."""
    torch_file, array = io.BytesIO(), io.BytesIO()
    torch.save({"weight": Evil(place)}, torch_file)
    np.savez(array, landmarks=np.array([Evil(place)], object))
    return {"pickle": pickle.dumps(Evil(place)), "torch": torch_file.getvalue(), "npz": array.getvalue()}


FORMS = ["pickle", "torch", "npz"]
every_form = pytest.mark.parametrize("form", FORMS)


@every_form
def test_the_malice_is_real(tmp_path, form):
    data = evil_files(tmp_path / "pwned")[form]
    if form == "pickle":
        pickle.loads(data)
    elif form == "torch":
        torch.load(io.BytesIO(data), weights_only=False)
    else:
        np.load(io.BytesIO(data), allow_pickle=True)["landmarks"]
    assert (tmp_path / "pwned").is_dir()


@every_form
def test_malicious_checkpoints(place, tmp_path, form, capsys):
    data = evil_files(place)[form]
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / base.WEIGHTS).write_bytes(data)
    card = {"detector": "convnext", "config": {}, "input": {"size": 8}, "sha256": hashlib.sha256(data).hexdigest()}
    (folder / base.CONFIG).write_text(json.dumps(card))
    with pytest.raises(base.CheckpointError, match="damaged"):
        base.load_checkpoint(folder)
    (folder / base.CONFIG).write_bytes(data)
    with pytest.raises(base.CheckpointError, match="is not a checkpoint"):
        base.load_checkpoint(folder)
    arguments = ["score", str(tmp_path), "--checkpoint", str(folder), "--out", str(tmp_path / "s.csv")]
    assert cli.main(arguments) == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def evil_network(place, tmp_path):
    """A folder that timm takes for a network with weights, and the weights are malice."""
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "convnext_atto", "num_classes": 10}))
    (folder / "pytorch_model.bin").write_bytes(evil_files(place)["torch"])
    return folder


NETWORKS = [
    {"backbone": "local-dir:{}", "pretrained": True}, {"backbone": "local-dir:{}"}, {"backbone": "{}"},
    {"backbone": "hf-hub:evil/model"}, {"backbone": "hf_hub:evil/model", "pretrained": True},
    {"backbone": "HF-HUB:evil/model"}, {"backbone": "timm/convnext_atto.d2_in1k", "pretrained": True},
    {"backbone": "convnext_atto", "pretrained": True}, {"backbone": "convnext_atto.hf-hub:evil/model"},
    {"backbone": "convnext_atto", "pretrained": 1}, {"pretrained": "yes"}, {"backbone": ["local-dir:{}"]},
]  # fmt: skip


@pytest.mark.parametrize("config", NETWORKS)
@pytest.mark.parametrize("detector", ["convnext", "embedding", "gru"])
def test_cards_name_no_weights_to_load_or_fetch(place, tmp_path, evil_network, monkeypatch, config, detector):
    """timm takes folders and repositories for networks, and older versions unpickle what lies there."""
    asked = []

    def as_older_ones_did(name, pretrained=False, **options):
        asked.append(name)
        if str(name).startswith("local-dir:") and pretrained:
            torch.load(Path(name.partition(":")[2]) / "pytorch_model.bin", weights_only=False)
        raise RuntimeError("no such network")

    monkeypatch.setattr(timm, "create_model", as_older_ones_did)
    config = json.loads(json.dumps(config).replace("{}", str(evil_network)))
    if detector == "gru":
        config = {"spatial": {"detector": "convnext", "config": config}, "frames": 4, "differences": False}
    with pytest.raises(base.CheckpointError, match="no network named|brings its own|no attribute"):
        base.load_checkpoint(checkpoint_of(tmp_path, detector, config))
    assert asked == []


def checkpoint_of(tmp_path, detector, config):
    """A folder whose weights are whole and whose card says this."""
    weights = safetensors.torch.save({"weight": torch.zeros(1)})
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / base.WEIGHTS).write_bytes(weights)
    card = {"detector": detector, "config": config, "input": {"size": 96}}
    card["sha256"] = hashlib.sha256(weights).hexdigest()
    (tmp_path / "checkpoint" / base.CONFIG).write_text(json.dumps(card))
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("config", [
    {"backbone": "hf-hub:evil/model"}, {"backbone": "hf-hub:evil/model", "weights": "openai"},
    {"backbone": "HF-HUB:evil/model"}, {"backbone": "ViT-B-32", "weights": "hf-hub:evil/model"},
    {"backbone": "ViT-B-32", "weights": "laion2b_s34b_b79k"}, {"backbone": "ViT-B-32", "weights": "https://evil/x.pt"},
])  # fmt: skip
@pytest.mark.parametrize("detector", ["ufd", "clip-nn", "clip-adapter"])
def test_cards_name_no_clip_to_fetch(tmp_path, monkeypatch, detector, config):
    asked, known = [], open_clip.get_model_config
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: asked.append(name) or known(name))
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **options: asked.append("create_model"))
    with pytest.raises(base.CheckpointError, match="has none of|neither a file nor a tag"):
        base.load_checkpoint(checkpoint_of(tmp_path, detector, config))
    assert asked in ([], ["ViT-B-32"])


@every_form
def test_malicious_states_of_trainings(place, tmp_path, form):
    (tmp_path / training.STATE).write_bytes(evil_files(place)[form])
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        training._resume(tmp_path / training.STATE, {}, "key")
    (tmp_path / learning.STATE).write_bytes(evil_files(place)[form])
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        learning.best(tmp_path)


@pytest.fixture
def architecture(tmp_path):
    """The name of a tiny CLIP that open_clip knows, with QuickGELU."""
    (tmp_path / "tiny-evil-quickgelu.json").write_text(json.dumps(tiny_clips.config(quick_gelu=True)))
    open_clip.add_model_config(tmp_path / "tiny-evil-quickgelu.json")
    return "tiny-evil-quickgelu"


@every_form
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "weights.npz"])
def test_malicious_weights_of_a_clip(place, tmp_path, form, name, architecture):
    (tmp_path / name).write_bytes(evil_files(place)[form])
    with pytest.raises(clip_backbone.BackboneError):
        clip_backbone.load(architecture, str(tmp_path / name))


@every_form
def test_malicious_folders_of_a_clip(place, tmp_path, form):
    shutil.copytree(clip_backbone.WEIGHTS / clip_backbone.DEMO, tmp_path / "clip")
    for path in (tmp_path / "clip").glob("*.safetensors"):
        path.unlink()
    (tmp_path / "clip" / "pytorch_model.bin").write_bytes(evil_files(place)[form])
    with pytest.raises(clip_backbone.BackboneError, match="cannot be loaded"):
        clip_backbone.load(f"local-dir:{tmp_path / 'clip'}")


def test_malicious_archives_of_torchscript(place, tmp_path, architecture):
    """As OpenAI publishes CLIP: a program, of which the kit runs the published ones alone."""
    path = tmp_path / "clip.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("clip/data.pkl", evil_files(place)["pickle"])
        archive.writestr("clip/constants.pkl", evil_files(place)["pickle"])
        archive.writestr("clip/version", "3")
    with pytest.raises(clip_backbone.BackboneError, match="none of the archives that OpenAI published"):
        clip_backbone.convert_openai(path, tmp_path / "out.safetensors")
    with pytest.raises(clip_backbone.BackboneError):
        clip_backbone.load(architecture, str(path))


@every_form
def test_malicious_published_heads(place, tmp_path, form):
    (tmp_path / "head.pth").write_bytes(evil_files(place)[form])
    probe = base.build("ufd", backbone="clip-demo")
    with pytest.raises(base.CheckpointError, match="is not a head"):
        probe.load_published(tmp_path / "head.pth", probe.backbone.fingerprint)


@every_form
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_malicious_diffusion_models(place, tmp_path, form, part):
    folder = tmp_path / "model"
    shutil.copytree(lare_model.KIT / "diffusion-demo", folder)
    (weights,) = (folder / part).glob("*.safetensors")
    weights.unlink()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        (folder / part / name).write_bytes(evil_files(place)[form])
    with pytest.raises(lare_model.LareError, match="is not a Stable Diffusion"):
        lare_model.load(lare_model.named("demo-t200-e4-128", folder))


@every_form
def test_malicious_panels(place, tmp_path, form):
    (tmp_path / "panel.json").write_bytes(evil_files(place)[form])
    with pytest.raises(panel.PanelError, match="cannot be read as a panel"):
        panel.read(tmp_path / "panel.json")


@every_form
@pytest.mark.parametrize("kind", ["pt2", "torchscript", "onnx"])
def test_malicious_exported_files(place, tmp_path, form, kind):
    card = {"detector": "ufd", "format": kind, "frames": 1, "input": {"size": 8}, "preprocessing": {}, "sha256": ""}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "data/weights/weight_0", "data/sample_inputs/model.pt"):
            archive.writestr(f"archive/{name}", evil_files(place)[form])
    path = tmp_path / f"model.{kind}"
    path.write_bytes(evil_files(place)[form])
    with pytest.raises(base.CheckpointError):
        export.load(path)
    path.write_bytes(exported.seal(buffer.getvalue() if kind != "onnx" else b"\x80" + evil_files(place)[form], card))
    with pytest.raises(base.CheckpointError, match="ONNX Runtime|a program that runs as it is loaded"):
        export.load(path)
    with pytest.raises(base.CheckpointError):
        score_media([tmp_path], path, tmp_path / "scores.csv")


@pytest.mark.parametrize("where", ["secret", "../secret", "/"])
def test_an_onnx_file_reads_no_other(tmp_path, monkeypatch, where):
    """Its weights may lie in files beside it, by name: an exported detector is one file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(np.ones(4, np.float32).tobytes())
    weight = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    place = str(tmp_path / "secret") if where == "/" else where
    weight.external_data.add(key="location", value=place)
    shape = [onnx.helper.make_tensor_value_info(name, 1, [4]) for name in ("clips", "logits")]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["clips", "w"], ["logits"])], "g", *[[s] for s in shape]
    )
    graph.initializer.append(weight)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    card = {"detector": "ufd", "format": "onnx", "frames": 1, "input": {"size": 8}}
    (tmp_path / "model.onnx").write_bytes(exported.seal(model.SerializeToString(), card))
    with pytest.raises(base.CheckpointError, match="cannot be loaded by ONNX Runtime"):
        export.load(tmp_path / "model.onnx")


@every_form
def test_malicious_annotations(place, tmp_path, form):
    (tmp_path / "marks.npz").write_bytes(evil_files(place)[form])
    with pytest.raises(faces.LocatorError):
        faces.AnnotationLocator(tmp_path / "marks.npz")


def pickled_parquet(place):
    """A Parquet file whose schema asks Arrow to unpickle a type of Python's, and pandas to read metadata."""
    data = pickle.dumps(Evil(place))
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": data}
    fields = [
        pyarrow.field(name, pyarrow.string(), metadata=metadata) for name in (*COLUMNS, "frame", "score", "shard")
    ]
    table = pyarrow.table([["a"]] * len(fields), schema=pyarrow.schema(fields, metadata={"pandas": data, "x": data}))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("form", [*FORMS, "parquet"])
def test_malicious_tables(place, tmp_path, form):
    data = pickled_parquet(place) if form == "parquet" else evil_files(place)[form]
    for name in ("manifest.parquet", "crops.parquet", "items.parquet", "index.parquet", "scores.parquet", "scores.csv"):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ManifestError):
        read_manifest(tmp_path / "manifest.parquet")
    for reader in (crops.read_index, crops.read_items):
        with pytest.raises(crops.CropError):
            reader(tmp_path)
    with pytest.raises(lare_maps.LareError):
        lare_maps.read_index(tmp_path)
    with pytest.raises(evaluation.ScoreError):
        evaluation.read_scores(tmp_path / "scores.parquet")
    rows = pd.DataFrame(columns=list(COLUMNS))
    with pytest.raises(evaluation.ScoreError):
        evaluation.read_media_scores(tmp_path / "scores.csv", rows, tmp_path / "manifest.parquet")


@pytest.mark.parametrize("text", ["!!python/object/apply:os.mkdir ['{}']", "seed: !!python/object/new:os.mkdir ['{}']"])
def test_malicious_profiles(place, tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text.format(place))
    with pytest.raises(ProfileError, match="not valid YAML"):
        load_profile(tmp_path / "mine.yaml")
    with pytest.raises(ProfileError, match="cannot be read"):
        parse_changes([f"seeds={text.format(place).partition(': ')[2] or text.format(place)}"])


# --- Paths that would leave their folder

OUTSIDE = ["../secret", "a/../../secret", "/etc/passwd", "..", "", "a\0b"]


def manifest(**values):
    row = dict.fromkeys(COLUMNS, "") | {
        "item_id": item_id("d", "a"), "root": ".", "path": "a.mp4", "kind": "video", "dataset": "d", "split": "test",
        "label": 0, "method": "real", "group_id": "g",
    }  # fmt: skip
    return pd.DataFrame([row | values], columns=list(COLUMNS)).astype({"label": "int8"})


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("column", ["path", "annotations"])
def test_paths_of_manifests_stay_inside_their_root(tmp_path, path, column):
    if column == "annotations" and not path:
        return
    with pytest.raises(ManifestError, match="stays? inside root|must not be empty"):
        write_manifest(manifest(**{column: path}), tmp_path / "m.parquet")
    table = pyarrow.Table.from_pandas(manifest(**{column: path}), preserve_index=False).replace_schema_metadata(None)
    table = table.cast(pyarrow.schema([(c, pyarrow.int8() if c == "label" else pyarrow.string()) for c in COLUMNS]))
    pq.write_table(table, tmp_path / "m.parquet")  # as one without the kit would
    with pytest.raises(ManifestError, match="stays? inside root|must not be empty"):
        read_manifest(tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match="leaves its root"):
        media_path({"root": ".", column: path}, tmp_path / "m.parquet", column)


def test_a_root_may_be_anywhere(tmp_path):
    """The root is the user's word where the media are; it is what makes a manifest of a data set elsewhere."""
    write_manifest(manifest(root="/elsewhere"), tmp_path / "m.parquet")
    assert media_path(read_manifest(tmp_path / "m.parquet").iloc[0], tmp_path / "m.parquet") == Path("/elsewhere/a.mp4")


@pytest.mark.parametrize("path", OUTSIDE)
def test_lists_of_media_stay_inside_their_folder(tmp_path, path):
    (tmp_path / "media.csv").write_text(f"path,label\n{path},0\n")
    with pytest.raises(ManifestError):
        datasets.index(tmp_path, "folder")


@pytest.mark.parametrize(
    "shard", [*OUTSIDE, "C:\\a.tar", "..\\a.tar", "crops-00000-of-00001.tar/../../x", "x.tar", "-rf"]
)
def test_shards_of_crops_are_those_of_the_folder(tmp_path, tiny_crops, shard):
    index = crops.read_index(tiny_crops).head(2)
    secret = tmp_path / "secret"
    secret.write_bytes(b"no picture")
    pq.write_table(pyarrow.Table.from_pandas(index.assign(shard=shard)), tmp_path / "crops.parquet")
    with pytest.raises(crops.CropError, match="damaged or of another version"):
        crops.read_index(tmp_path)
    maps = pd.DataFrame(
        [{"item_id": "a", "frame": 0, "pts": 0.0, "status": "ok", "reason": "", "sha256": "", "extractor": "e",
          "precision": "float32", "shard": shard or "../x", "position": 0}]
    ).astype({"frame": "int32", "position": "int32"})  # fmt: skip
    if shard not in ("-rf",):
        maps["shard"] += ".safetensors" if "/" in shard or "\\" in shard else ""
    maps.to_parquet(tmp_path / "index.parquet")
    with pytest.raises(lare_maps.LareError):
        lare_maps.read_index(tmp_path)


@pytest.mark.parametrize(
    "name", ["../up", "/abs", "a/b", "a b", "$(touch x)", "`touch x`", "a;b", "{x}", "-rf", ".", "", "é"]
)
@pytest.mark.parametrize("key", ["name", "run"])
def test_names_of_runs_are_plain(tmp_path, name, key):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({key: name}))
    with pytest.raises(ProfileError, match=f"The {key} of a profile is of letters"):
        load_profile(tmp_path / "mine.yaml")


@pytest.mark.parametrize("name", ["my profile.yaml", "-rf.yaml", "$(touch x).yaml", "a;b.yaml"])
def test_so_are_names_of_profile_files_unless_they_say_another(tmp_path, name):
    (tmp_path / name).write_text("seeds: 2\n")
    with pytest.raises(ProfileError, match="Rename the file"):
        load_profile(tmp_path / name)
    (tmp_path / name).write_text("name: mine\nrun: mine\n")
    assert load_profile(tmp_path / name).run == "mine"


@pytest.mark.parametrize("place", ["../../up", "/abs", "a/../../b"])
def test_the_world_is_made_inside_its_run(tmp_path, place):
    profile = load_profile("tiny", {"data.sets": [f"world={place}"]})
    with pytest.raises(ManifestError, match="a folder of the run's own"):
        collect.collect(profile, tmp_path / "work", tmp_path)
    assert os.listdir(tmp_path) == []


def test_panels_name_checkpoints_from_their_own_folder(tmp_path, tiny_checkpoint):
    """Above it, too: `unmask panel` writes so where checkpoint and panel lie side by side. But nowhere absolute."""
    rows = pd.DataFrame({"label": [0, 1], "score": [0.2, 0.8], "group_id": ["a", "b"]})
    panel.fit({"net": (tiny_checkpoint, rows)}, tmp_path / "sub" / "panel.json", draws=50)
    path = tmp_path / "sub" / "panel.json"
    content = json.loads(path.read_text())
    assert content["members"][0]["checkpoint"].startswith("../") and panel.read(path)
    for place in (str(tiny_checkpoint.absolute()), "", "a\0b"):
        content["members"][0]["checkpoint"] = place
        path.write_text(json.dumps(content))
        with pytest.raises(panel.PanelError, match="by its path from the panel's folder"):
            panel.read(path)


def test_an_archive_with_a_name_twice_is_refused(tmp_path):
    """The fingerprint would cover one of them, and PyTorch might load the other."""
    path, buffer = tmp_path / "model.pt2", io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data", b"good")
    path.write_bytes(exported.seal(buffer.getvalue(), {"format": "pt2", "input": {"size": 8}}))
    exported.opened(path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data", b"good")
    with pytest.raises(base.CheckpointError, match="is damaged"):
        exported.opened(path)


# --- Names that speak to a shell, a browser or LaTeX

HOSTILE = ["a; touch pwned", "$(touch pwned)", "`touch pwned`", "a' ; touch pwned ; '", 'a" ; touch pwned ; "',
           "a\ntouch pwned", "-rf", "--profile", "a b", "{x}", "*", "~", "&& touch pwned", "| touch pwned",
           "<script>alert(1)</script>"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_the_users_folder_says_nothing_to_the_run(tmp_path, name):
    folder = tmp_path / "media" / name.replace("/", "_")
    folder.mkdir(parents=True)
    profile = study_profile(parse_options(["--profile", "tiny", "--data", str(folder)]), ROOT)
    assert profile.data.sets == [f"folder={folder}"]
    assert all(part.isalnum() for part in profile.run.split("-"))


def test_a_clone_and_data_of_hostile_names_run_and_start_nothing_else(tmp_path):
    root = tmp_path / "kit; touch pwned $(touch pwned) `touch pwned` 'a\" & b"
    make_tree(root)
    media = tmp_path / "media\n$(touch pwned); touch pwned"
    media.mkdir()
    code, output = run(root, "--data", str(media), "--set", "preprocess.locator=$(touch pwned)")
    assert code == 0, output
    assert not list(tmp_path.rglob("pwned"))
    for options in (["--profile", "$(touch pwned)"], ["--set", "$(touch pwned)=1"], ["--only", "; touch pwned"]):
        assert run(root, *options)[0] == 2
    assert not list(tmp_path.rglob("pwned"))


def test_files_with_hostile_names_are_scored_as_they_are(tmp_path, tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = [name.replace("/", "_") + ".png" for name in HOSTILE] + ["http:--x.png", "concat:a|b.png", "@a.png"]
    for name in names:
        (tmp_path / name).write_bytes(b"no picture")
    arguments = ["score", "--checkpoint", str(tiny_checkpoint), "--out", "s.csv", "--locator", "haar", "--", *names]
    assert cli.main(arguments) == 0
    table = pd.read_csv("s.csv", keep_default_na=False)
    assert table["path"].tolist() == [str(Path(name)) for name in names]
    assert (table["status"] == "failed").all() and table["reason"].str.contains("damaged|not a readable").all()
    assert sorted(os.listdir()) == sorted([*names, "s.csv", "s.json"])


def test_names_in_tables_are_text_in_html_and_latex(tmp_path):
    study = Study(load_profile("tiny"), tmp_path, playing=False)
    from unmask.figures import plt  # after the backend is set

    names = [*HOSTILE, "a_b & 50 % #1 {x} ~^\\", "\\input{/etc/passwd}", "\\write18{touch pwned}", "{{ 7 * 7 }}"]
    table = pd.DataFrame({"method": names, "<script>x</script>_&": range(len(names))})
    save_table(study, "t", table, "A <script>caption</script> & \\input{x}")
    save_figure(study, "f", plt.figure(), "B <script>caption</script>", {"names": names})
    study.results("00_data", {"<script>key</script>": "<script>value</script>"})
    tex = (study.tables / "t.tex").read_text()
    assert "\\input{" not in tex and "\\write18" not in tex and "\\textbackslash{}input\\{" in tex
    from unmask.report import build_report

    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks/00_data.ipynb", tmp_path / "notebooks")
    page = build_report(study).read_text()
    for text in ("alert(1)", "caption", "key", "value", "x"):
        assert f"<script>{text}</script>" not in page and f"&lt;script&gt;{text}&lt;/script&gt;" in page
    assert "{{ 7 * 7 }}" in page


def test_the_snakefile_quotes_every_path():
    text = (ROOT / "Snakefile").read_text()
    for line in (line for line in text.splitlines() if "python3 -m" in line or "--parameter" in line):
        for field in re.findall(r"(?<!\{)\{([^{}]+)\}(?!\})", line):
            assert field.endswith(":q") or field == "params.fingerprint", line
