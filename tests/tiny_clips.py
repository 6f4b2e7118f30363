"""Tiny CLIPs with random weights, as folders that open_clip reads by `local-dir:`."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
VIT = {"image_size": 28, "patch_size": 7, "width": 32, "layers": 3, "head_width": 16}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
TEXT = {"width": 24, "heads": 2, "layers": 2}


def config(vision=VIT, text=(), dim=20, **changes) -> dict:
    """The `model_cfg` of a tiny CLIP."""
    return {"embed_dim": dim, "vision_cfg": dict(vision), "text_cfg": TEXT | dict(text)} | changes


def write(folder: Path, seed: int = 0, preprocess=(), **changes) -> str:
    """Write a tiny CLIP into a folder, with noise on all that starts at 0 or 1; its name for `load`."""
    model_cfg = config(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_cfg": model_cfg, "preprocess_cfg": dict(preprocess)}
    (folder / CONFIG).write_text(json.dumps(content))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        state = model.state_dict()
        for name, value in state.items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point() and name != "logit_scale":
                value.add_(0.1 * torch.randn(value.shape))
    save_file(state, folder / WEIGHTS)
    return f"local-dir:{folder}"


def images(count: int = 3, size: int = 28, seed: int = 1) -> torch.Tensor:
    """Normalised images float[N,3,S,S]."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
