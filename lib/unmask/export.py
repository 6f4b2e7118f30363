"""Detectors as files that run without their code: torch.export (pt2), ONNX, TorchScript; and how close they stay.

A model takes normalised clips float32[B,T,3,S,S] of any number B and gives logits float32[B]; T and S are fixed.
"""

import io
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.fx import GraphModule

from unmask import exported, onnx_detector
from unmask.data.crops import CropStore, read_index
from unmask.detectors import base
from unmask.profile import write_atomic
from unmask.scoring import frame_images, whole_windows

OPSET = 20  # the first with samples of volumes (GridSample in 5 dimensions)
BATCHES = (1, 2, 5)
TOLERANCE = 1e-4
PROTOBUF = 2**31 - 1  # bytes that a file of protobuf may have
KEPT = ("detector", "preprocessing", "seed", "sha256")  # of a checkpoint's card
SOURCES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn")  # where in which files a node was written


class ExportError(ValueError):
    """A detector cannot be exported as asked."""


class _OfClips(nn.Module):
    """A detector as a function of clips alone."""

    def __init__(self, detector: base.Detector):
        super().__init__()
        self.detector = detector

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return self.detector(clips)


def _program(model: nn.Module, clips: torch.Tensor) -> torch.export.ExportedProgram:
    """The program of a model whose batch may have any size; with no weights but those it uses, and no file names.

    ValueError if the program only takes the batch of `clips`: one Python number made of its length is enough for that,
    and PyTorch need not say so.
    """
    program = torch.export.export(model, (clips,), dynamic_shapes={"clips": {0: torch.export.Dim("batch")}})
    signature = program.graph_signature
    places = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    (given,) = signature.user_inputs
    if isinstance(places[given].meta["val"].shape[0], int):
        raise ValueError("its batch would have a fixed size.")
    for spec in [s for s in signature.input_specs if s.target is not None and not places[s.arg.name].users]:
        program.graph.erase_node(places[spec.arg.name])  # a CLIP's text tower, for one
        signature.input_specs.remove(spec)
        for values in (program.state_dict, program.constants):
            values.pop(spec.target, None)
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            for key in SOURCES:
                node.meta.pop(key, None)
    program.graph_module.recompile()
    program.example_inputs = None
    return program


def _pt2(model: nn.Module, clips: torch.Tensor) -> bytes:
    out = io.BytesIO()
    torch.export.save(_program(model, clips), out)
    return out.getvalue()


def _onnx(model: nn.Module, clips: torch.Tensor) -> bytes:
    program = _program(model, clips)
    if sum(value.nbytes for value in program.state_dict.values()) > PROTOBUF:
        raise ValueError("its weights are more than the 2 GiB of an ONNX file; export it as pt2.")
    written = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, verbose=False, input_names=["clips"], output_names=["logits"],
        dynamic_shapes={"clips": {0: "batch"}},
    ).model_proto  # fmt: skip
    if not all(
        value.type.tensor_type.shape.dim[0].dim_param for value in (written.graph.input[0], written.graph.output[0])
    ):
        raise ValueError("its batch would have a fixed size.")
    for node in written.graph.node:
        del node.metadata_props[:]  # PyTorch's own names for it
    return written.SerializeToString(deterministic=True)


def _torchscript(model: nn.Module, clips: torch.Tensor) -> bytes:
    traced = torch.jit.trace(model, clips, check_trace=False)
    other = clips[:1].expand(3, -1, -1, -1, -1) + 1
    if not torch.allclose(traced(other), model(other), atol=TOLERANCE):  # or an error, where the batch is fixed
        raise ValueError("its trace is not right for another batch.")
    out = io.BytesIO()
    torch.jit.save(torch.jit.freeze(traced, optimize_numerics=False), out)
    return out.getvalue()


WRITERS: dict[str, Callable[[nn.Module, torch.Tensor], bytes]] = {
    "pt2": _pt2,
    "onnx": _onnx,
    "torchscript": _torchscript,
}


@torch.no_grad()
def export(checkpoint: str | os.PathLike, form: str, out: str | os.PathLike, frames: int | None = None) -> Path:
    """Write the detector of a checkpoint into the file `out`, with a card of what it is; returns `out`.

    form: a key of WRITERS. frames: T of the clips it takes, by default those of the detector. In float32, in evaluation
    mode. Raises CheckpointError for the checkpoint, and ExportError for a detector that takes more than clips, cannot
    have T frames or cannot be written in this form.
    """
    detector, card = base.load_checkpoint(checkpoint)
    spec = replace(detector.input_spec, frames=frames or detector.input_spec.frames)
    if detector.extras:
        raise ExportError(
            f"{detector.name} reads {' and '.join(detector.extras)} besides clips, and stays with the kit."
        )
    if missing := [key for key in KEPT if key not in card]:
        raise base.CheckpointError(f"The checkpoint in {checkpoint} does not say its {missing[0]}; train anew.")
    model = _OfClips(detector.float()).requires_grad_(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what PyTorch means to change in itself
            content = WRITERS[form](model.eval(), torch.zeros(2, spec.frames, 3, spec.size, spec.size))
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        cause = error
        while cause.__cause__:  # the exporter's own words are advice to those who write exporters
            cause = cause.__cause__
        why = " ".join(str(cause).split())[:300]
        raise ExportError(f"{detector.name} cannot be exported as {form}: {why}") from error
    about = {key: card[key] for key in KEPT} | {"format": form, "frames": spec.frames, "input": asdict(spec)}
    return write_atomic(out, exported.seal(content, about))


def load(path: str | os.PathLike, own: bool = False) -> tuple[Callable[[torch.Tensor], torch.Tensor], dict]:
    """What an exported file computes, normalised clips float32[B,T,3,S,S] to logits float32[B], and its card.

    own: whether you exported it yourself. PyTorch unpickles and runs parts of pt2 and TorchScript files while it loads
    them, and their fingerprint tells damage, not who made them; without `own` they are refused. Raises CheckpointError.
    """
    data, card = exported.opened(path)
    if card["format"] == "onnx":
        return onnx_detector.OnnxDetector(data, card), card
    if not own:
        raise base.CheckpointError(
            f"{path} is a {card['format']} file, a program that runs as it is loaded: say own=True if it is your own, "
            "or take an ONNX file, which is data."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if card["format"] == "pt2":
            return torch.export.load(io.BytesIO(data)).module(), card
        return torch.jit.load(io.BytesIO(data), map_location="cpu"), card


@torch.no_grad()
def verify(
    checkpoint: str | os.PathLike, path: str | os.PathLike, crops: str | os.PathLike | None = None, seed: int = 0,
    own: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Largest differences between the logits of a checkpoint and of its exported file: columns clips (random or real),
    batch, difference.

    Random pixels and, given the folder of `unmask preprocess`, crops of up to five media. own: as in `load`. Raises
    CheckpointError for either file, or where the file was not made of this checkpoint, and ExportError for a folder
    without crops.
    """
    detector, known = base.load_checkpoint(checkpoint)
    model, card = load(path, own)
    if card["sha256"] != known["sha256"]:
        raise base.CheckpointError(f"{path} was not made of the checkpoint in {checkpoint}; export it anew.")
    spec = card["input"]
    shape = (max(BATCHES), spec.frames, spec.size, spec.size, 3)
    images = {"random": np.random.default_rng(seed).integers(0, 256, shape, np.uint8)}
    if crops:
        images["real"] = _real_clips(Path(crops), spec)
    rows = []
    for kind, batch in ((kind, batch) for kind in images for batch in BATCHES):
        clips = detector.prepare(torch.from_numpy(images[kind][:batch]))
        rows.append((kind, batch, float((model(clips) - detector(clips)).abs().max())))
    return pd.DataFrame(rows, columns=["clips", "batch", "difference"])


def _real_clips(crops: Path, spec: base.InputSpec) -> np.ndarray:
    """A clip of each of as many media as the largest batch has, uint8[B,T,S,S,3]; of fewer, some of them again."""
    index = read_index(crops).sort_values(["item_id", "frame"])
    if index.empty:
        raise ExportError(f"There are no crops in {crops}.")
    names = index["item_id"].unique()
    chosen = np.resize(names[:: max(len(names) // max(BATCHES), 1)], max(BATCHES))
    store, clips = CropStore(crops), []
    for name in chosen:
        rows = index[index["item_id"] == name]
        clips.append(frame_images(store, rows.iloc[whole_windows(len(rows), spec.frames)[0]], spec))
    return np.stack(clips)
