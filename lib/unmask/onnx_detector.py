"""An exported detector that ONNX Runtime computes: no network is built, and no CLIP is loaded or needed."""

from pathlib import Path

import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from unmask import exported
from unmask.detectors.base import CheckpointError, Detector

# What ONNX Runtime raises for a file that holds no model, or none that it can compute; they have no base of their own.
UNUSABLE = (
    runtime.Fail, runtime.InvalidArgument, runtime.InvalidGraph, runtime.InvalidProtobuf, runtime.NoModel,
    runtime.NoSuchFile, runtime.NotImplemented, runtime.RuntimeException, RuntimeError, ValueError,
)  # fmt: skip


class OnnxDetector(Detector):
    """What `unmask export --format onnx` wrote, for scoring: clips of exactly `input_spec.frames` frames, on the CPU.

    data, card: see `exported.opened`. It cannot be trained, and has no features. Raises CheckpointError.
    """

    def __init__(self, data: bytes, card: dict):
        super().__init__()
        self.name, self.config, self.input_spec = card["detector"], {}, card["input"]
        self.exact_frames = self.input_spec.frames > 1
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except UNUSABLE as error:
            why = " ".join(str(error).split())[:200]
            raise CheckpointError(f"The model of {self.name} cannot be loaded by ONNX Runtime: {why}") from error

    @torch.no_grad()
    def forward(self, clips: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits float32[B] of normalised clips float32[B,T,3,S,S], T = input_spec.frames. ValueError for other clips
        and for a mask."""
        wanted = (self.input_spec.frames, 3, self.input_spec.size, self.input_spec.size)
        if mask is not None or clips.shape[1:] != wanted:
            raise ValueError(f"an exported model takes clips of shape (B, {', '.join(map(str, wanted))}) and no mask.")
        return torch.from_numpy(self.session.run(["logits"], {"clips": clips.numpy()})[0])


def load(path: str | Path) -> tuple[OnnxDetector, dict]:
    """The detector of an exported ONNX file, and its card, as `base.load_checkpoint`. Raises CheckpointError."""
    data, card = exported.opened(path)
    if card["format"] != "onnx":
        raise CheckpointError(f"{path} is an exported {card['format']}; media are scored with a checkpoint or an ONNX.")
    return OnnxDetector(data, card), card
