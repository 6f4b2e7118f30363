"""What every detector is: clips in, one logit per clip out; built by name, saved as safetensors and JSON."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from unmask import plugins
from unmask.profile import write_atomic

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# What the constructors of networks raise for a card that is not theirs.
UNFIT = (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError, AssertionError)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or not of the detector it claims to be."""


@dataclass(frozen=True)
class InputSpec:
    """What a detector wants to see: RGB crops of `size` pixels, 0..1, then (x - mean) / std; `frames` a clip.

    A crop is the face scaled to `size` or, if `native`, a window on it at the stored resolution: scaling blurs the
    finest traces. If `still`, one cut serves all frames of a clip, so that nothing but the face moves.
    """

    size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    frames: int = 1
    native: bool = False
    still: bool = False


class Detector(nn.Module):
    """Base of all detectors; subclasses set `name`, `input_spec` and `config` (the arguments that rebuild them).

    extras: what `forward` and `features` take by name besides clips and mask, of "lare", the frames' LaRE maps
    float[B,T,4,l,l], and "boxes", those of their faces' regions float[B,T,9,4] in pixels of the frames (see `roi`).
    extra_shapes: theirs for one frame, by name. exact_frames: a clip to be scored has `input_spec.frames` frames, no
    less.
    """

    name: str
    input_spec: InputSpec
    config: dict
    extras: tuple[str, ...] = ()
    extra_shapes: dict[str, tuple[int, ...]]
    exact_frames: bool = False

    def forward(self, clips: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits float[B] of "fake" for normalised clips float[B,T,3,H,W]; mask bool[B,T], True = use the frame."""
        raise NotImplementedError

    def features(self, clips: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The representation before the head, float[B,D]; arguments as in `forward`."""
        raise NotImplementedError

    def with_boundary(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """For training: frames float[N,3,H,W] to logits float[N] and the logits of the blending boundary
        float[N,H/8,W/8], None from a detector that does not locate it."""
        return self(frames.unsqueeze(1)), None

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """uint8[...,H,W,3] RGB to normalised float32[...,3,H,W]."""
        device = images.device
        mean, std = (torch.tensor(v, device=device) for v in (self.input_spec.mean, self.input_spec.std))
        return ((images.float() / 255 - mean) / std).movedim(-1, -3)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return [p for p in self.parameters() if p.requires_grad]


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the frames that count: values float[B,T,...], mask bool[B,T] or None, to float[B,...]."""
    if mask is None:
        return values.mean(1)
    keep = mask.reshape(*mask.shape, *[1] * (values.ndim - 2))
    # Filled, not multiplied by 0: padding may hold values that are not finite.
    return values.masked_fill(~keep, 0).sum(1) / keep.sum(1).clamp(min=1)


@torch.no_grad()
def cost(detector: Detector) -> dict[str, int]:
    """What a detector costs: parameters, trainable parameters, and multiply-adds of one frame of its input size.

    Counted are convolutions, matrix products and attention, as in the "FLOPs" of most papers (Liu et al., CVPR 2022,
    among them); norms, activations and Fourier transforms are not. Leaves the detector as it was.
    """
    size, training = detector.input_spec.size, detector.training
    where = next(detector.parameters()).device
    extras = {name: torch.zeros(1, 1, *detector.extra_shapes[name], device=where) for name in detector.extras}
    try:
        with FlopCounterMode(display=False) as counter:
            detector.eval()(torch.zeros(1, 1, 3, size, size, device=where), **extras)
    finally:
        detector.train(training)
    return {
        "parameters": sum(p.numel() for p in detector.parameters()),
        "trainable": sum(p.numel() for p in detector.trainable_parameters()),
        "multiply_adds": counter.get_total_flops() // 2,
    }


_REGISTRY: dict[str, type[Detector]] = {}


def register(name: str) -> Callable[[type[Detector]], type[Detector]]:
    """Class decorator: make a detector known by name. ValueError for a name that another module has taken."""

    def add(cls: type[Detector]) -> type[Detector]:
        taken = _REGISTRY.get(name)
        if taken and taken.__module__ != cls.__module__:
            raise ValueError(f"The name '{name}' belongs to the detector of {taken.__module__}; choose another.")
        _REGISTRY[name] = cls
        cls.name = name
        return cls

    return add


def names() -> list[str]:
    """The registered detectors."""
    return sorted(_REGISTRY)


def registered(name: str) -> type[Detector]:
    """The class of a detector by name, of the kit or of a file in UNMASK_PLUGINS. ValueError for an unknown one."""
    if name not in _REGISTRY:
        plugins.load()
    if name not in _REGISTRY:
        raise ValueError(
            f"There is no detector '{name}'; known are {', '.join(names())}. One of your own is found if "
            f"{plugins.VARIABLE} names its file."
        )
    return _REGISTRY[name]


def build(name: str, **config) -> Detector:
    """A new detector by registered name; `config` are its constructor's arguments. ValueError for an unknown name."""
    return registered(name)(**config)


def rebuild(name: str, config: dict) -> Detector:
    """The detector that a card describes, its weights still random. ValueError for a card that asks for others'."""
    if config.get("pretrained"):
        raise ValueError("its config asks for pretrained weights, and a checkpoint brings its own: leave that key out.")
    return build(name, **config)


def module(name: str) -> ModuleType:
    """The module that defines a registered detector. ValueError for an unknown name."""
    return sys.modules[registered(name).__module__]


def save_checkpoint(detector: Detector, folder: str | Path, **card) -> Path:
    """Write weights and config.json (architecture, input, sha256 of the weights, and `card`) into `folder`; returns it.

    The weights are written first and the config last, so a folder with a config is whole.
    """
    folder = Path(folder)
    weights = save({k: v.detach().cpu().contiguous() for k, v in detector.state_dict().items()})
    (folder / CONFIG).unlink(missing_ok=True)
    write_atomic(folder / WEIGHTS, weights)
    config = {
        "detector": detector.name, "config": detector.config, "input": asdict(detector.input_spec),
        "sha256": hashlib.sha256(weights).hexdigest(), **card,
    }  # fmt: skip
    write_atomic(folder / CONFIG, json.dumps(config, indent=1) + "\n")
    return folder


def read_checkpoint(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a checkpoint folder and its config.json, checked against each other. Raises CheckpointError."""
    folder = Path(folder)
    try:
        card = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = (folder / WEIGHTS).read_bytes()
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint: it needs {WEIGHTS} and {CONFIG}, as `unmask train` leaves them."
        ) from error
    if not isinstance(card, dict) or hashlib.sha256(weights).hexdigest() != card.get("sha256"):
        raise CheckpointError(
            f"The weights in {folder} are not those its {CONFIG} describes; copy the whole folder again or train anew."
        )
    try:
        return load(weights), card
    except SafetensorError as error:
        raise CheckpointError(f"The weights in {folder} are damaged; train anew.") from error


def load_checkpoint(folder: str | Path) -> tuple[Detector, dict]:
    """The detector of a checkpoint folder, in evaluation mode, and its config.json. Raises CheckpointError."""
    weights, card = read_checkpoint(folder)
    try:
        detector = rebuild(card["detector"], card["config"])
        detector.load_state_dict(weights)
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in card["input"].items()}
        if InputSpec(**given) != detector.input_spec:
            raise ValueError("it was trained on crops of another size or normalisation.")
    except UNFIT as error:
        why = " ".join(str(error).split())[:200]  # torch lists every weight that does not fit, a line each
        raise CheckpointError(f"The checkpoint in {folder} does not fit this version of Unmask: {why}") from error
    return detector.eval(), card
