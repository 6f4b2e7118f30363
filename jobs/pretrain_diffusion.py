"""Train the kit's own small latent diffusion model on faces of the synthetic world, and keep it in half precision.

    OMP_NUM_THREADS=2 python jobs/pretrain_diffusion.py FOLDER [--workers 2]

FOLDER takes the faces and the states of interrupted trainings. The faces belong to people of their own seed, whom no
table shows, and are all filmed, none forged. First an autoencoder learns to give them back from latents of an eighth of
their sides, then a UNet learns to guess the noise in those latents (Rombach et al., CVPR 2022). What is kept of either
are averaged weights, in lib/unmask/weights/diffusion-demo, in diffusers' layout. No caption is learned: the
text encoder only stands where Stable Diffusion has one, and gives the same embedding for every text.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel

from unmask.data.captions import faces
from unmask.profile import ROOT, digest, write_atomic, write_json
from unmask.progress import track
from unmask.training import own_randomness, precision, save_state, schedule

SEED = 770023
FACES, HELD_OUT = 4000, 200
SHAPE = {"size": 128, "film": 256, "margin": 0.6}  # pixels; the margin is that of stored crops, give or take
AVERAGE, WARMUP, CLIP = 0.99, 0.05, 1.0
VAE_STEPS, VAE_BATCH, VAE_LR, PART = 4000, 16, 1e-3, 64  # PART: pixels of the squares it learns from
EDGES, KL = 0.5, 1e-6  # weights beside the error of values
UNET_STEPS, UNET_BATCH, UNET_LR = 3500, 32, 4e-4
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": SHAPE["size"],
    "mid_block_add_attention": False,
}
UNET = {
    "sample_size": SHAPE["size"] // 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": [64, 96, 96],
    "down_block_types": ["DownBlock2D"] * 3,
    "up_block_types": ["UpBlock2D"] * 3,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
TEXT = {
    "vocab_size": 4,
    "hidden_size": UNET["cross_attention_dim"],
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
OUT = ROOT / "lib/unmask/weights/diffusion-demo"
VAE_SETTINGS = digest(
    [SEED, FACES, HELD_OUT, SHAPE, AVERAGE, WARMUP, CLIP, VAE, VAE_STEPS, VAE_BATCH, VAE_LR, PART, EDGES, KL]
)
UNET_SETTINGS = digest([VAE_SETTINGS, UNET, NOISE, UNET_STEPS, UNET_BATCH, UNET_LR])


def fit(
    path: Path, model: torch.nn.Module, lr: float, steps: int, loss: Callable[[torch.nn.Module, int], torch.Tensor]
) -> torch.nn.Module:
    """`model` with the running average of its weights after `steps` of `loss`; `path` keeps the state of a kill."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps, WARMUP))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    parts, done = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "average": average}, 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        done = state.pop("done")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    recent = []
    for step in track(range(done, steps), label=f"{path.stem}, steps"):
        torch.manual_seed(SEED + step)  # by step, so that a run that goes on draws what it would have drawn
        with torch.autocast("cpu", torch.bfloat16, enabled=precision() == "bf16"):
            now = loss(model, step)
        optimizer.zero_grad(set_to_none=True)
        now.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        average.update_parameters(model)
        recent.append(now.item())
        if (step + 1) % 100 == 0:
            print(f"{path.stem} {step + 1}: loss {np.mean(recent[-100:]):.4f}", flush=True)
            save_state(path, {name: part.state_dict() for name, part in parts.items()} | {"done": step + 1})
    return average.module.eval()


def drawn(images: np.ndarray, step: int, batch: int) -> tuple[torch.Tensor, np.random.Generator]:
    """A batch float32[B,3,S,S] of a step, -1..1, half of them mirrored, and the dice for the rest."""
    rng = np.random.default_rng([SEED, step])
    chosen = torch.from_numpy(images[rng.integers(HELD_OUT, len(images), batch)]).movedim(-1, 1).float() / 127.5 - 1
    return torch.where(torch.from_numpy(rng.random((batch, 1, 1, 1)) < 0.5), chosen.flip(-1), chosen), rng


def vae_loss(model: AutoencoderKL, images: np.ndarray, step: int) -> torch.Tensor:
    """Absolute error of values and of differences between neighbours, on squares of PART pixels, and a little KL."""
    whole, rng = drawn(images, step, VAE_BATCH)
    y, x = rng.integers(whole.shape[-1] - PART + 1, size=2)
    part = whole[..., y : y + PART, x : x + PART]
    posterior = model.encode(part).latent_dist
    found = model.decode(posterior.sample()).sample.float()
    edges = sum(F.l1_loss(found.diff(dim=axis), part.diff(dim=axis)) for axis in (2, 3))
    return F.l1_loss(found, part) + EDGES * edges + KL * posterior.kl().mean()


@torch.no_grad()
def latents(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """Latents float32[2N,4,h,w], not scaled, of all pictures and their mirror images."""
    parts = []
    for part in np.array_split(images, max(len(images) // 50, 1)):
        pixels = torch.from_numpy(part).movedim(-1, 1).float() / 127.5 - 1
        parts.append(
            torch.stack([vae.encode(p).latent_dist.mode() for p in (pixels, pixels.flip(-1))], 1).flatten(0, 1)
        )
    return torch.cat(parts)


def unet_loss(
    model: UNet2DConditionModel, scheduler: DDPMScheduler, known: torch.Tensor, prompt: torch.Tensor, rng
) -> torch.Tensor:
    """Squared error of the guessed noise, timesteps drawn uniformly."""
    clean = known[torch.from_numpy(rng.integers(len(known), size=UNET_BATCH))]
    noise, steps = torch.randn_like(clean), torch.randint(scheduler.config.num_train_timesteps, (UNET_BATCH,))
    guess = model(
        scheduler.add_noise(clean, noise, steps), steps, encoder_hidden_states=prompt.expand(UNET_BATCH, -1, -1)
    )
    return F.mse_loss(guess.sample.float(), noise)


@torch.no_grad()
def errors(vae, unet, scheduler, prompt, images: np.ndarray) -> dict:
    """On unseen people: the autoencoder's peak signal-to-noise ratio, dB, and the UNet's error at some timesteps."""
    pixels = torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1
    clean = vae.encode(pixels).latent_dist.mode()
    psnr = 10 * torch.log10(4 / (vae.decode(clean).sample.clamp(-1, 1) - pixels).square().mean((1, 2, 3)))
    found = {}
    for step in (100, 200, 400, 600, 800):
        noise, steps = torch.randn(clean.shape, generator=torch.Generator().manual_seed(SEED)), torch.tensor([step])
        noisy = scheduler.add_noise(clean * vae.config.scaling_factor, noise, steps)
        guess = unet(noisy, steps.expand(len(noisy)), encoder_hidden_states=prompt.expand(len(noisy), -1, -1)).sample
        found[step] = float(F.mse_loss(guess, noise))
    return {"psnr": float(psnr.mean()), "noise_error": found}


def folder_of(vae, unet, scheduler, text) -> Iterator[tuple[str, bytes]]:
    """The files of the model in diffusers' layout, in half precision."""
    with tempfile.TemporaryDirectory() as name:
        for part, net in (("vae", vae.half()), ("unet", unet.half()), ("text_encoder", text.half())):
            net.save_pretrained(Path(name) / part)
        # transformers 4 finds the tensors only under the names that it gave them; 5 reads those as well.
        text_file = Path(name) / "text_encoder" / "model.safetensors"
        tensors = {
            f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(text_file).items()
        }
        save_file(tensors, text_file, metadata={"format": "pt"})
        scheduler.save_pretrained(Path(name) / "scheduler")
        for path in sorted(Path(name).rglob("*.*")):
            yield str(path.relative_to(name)), path.read_bytes()
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "</w>": 3}
    yield "tokenizer/vocab.json", json.dumps(words).encode()
    yield "tokenizer/merges.txt", b"#version: 0.2\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2, help="processes that draw faces")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    images, _ = faces(options.folder, SEED, FACES, options.workers, **SHAPE)
    with own_randomness(SEED):
        scheduler, text = DDPMScheduler(**NOISE), CLIPTextModel(CLIPTextConfig(**TEXT)).eval()
        with torch.no_grad():
            for name, value in text.named_parameters():
                value.mul_("final_layer_norm" not in name)  # no text says anything
            prompt = text(torch.zeros(1, 77, dtype=torch.long))[0]
        made = AutoencoderKL(**VAE), UNet2DConditionModel(**UNET)
        vae = fit(
            options.folder / f"vae-{VAE_SETTINGS}.pt",
            made[0],
            VAE_LR,
            VAE_STEPS,
            lambda m, step: vae_loss(m, images, step),
        )
        known = latents(vae, images[HELD_OUT:])
        vae.register_to_config(scaling_factor=float(1 / known.std()))
        known *= vae.config.scaling_factor
        unet = fit(
            options.folder / f"unet-{UNET_SETTINGS}.pt", made[1], UNET_LR, UNET_STEPS,
            lambda m, step: unet_loss(m, scheduler, known, prompt, np.random.default_rng([SEED, 1, step])),
        )  # fmt: skip
    about = {"trained_on": f"faces of the synthetic world, seed {SEED}, all filmed"}
    about |= errors(vae, unet, scheduler, prompt, images[:HELD_OUT])
    for name, content in folder_of(vae, unet, scheduler, text):
        write_atomic(OUT / name, content)
    write_json(OUT / "card.json", about)
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
