"""Train the kit's own small CLIP on captioned faces of the synthetic world, and keep it in half precision.

    OMP_NUM_THREADS=1 python jobs/pretrain_clip.py FOLDER [--workers 2]

FOLDER takes the faces and the state of an interrupted training. The faces belong to people of their own seed, whom no
table shows, and are all filmed, none forged; captions tell looks, pose and colours (`unmask.data.captions`). The epoch
with the lowest contrastive loss on unseen people goes to lib/unmask/weights/clip-demo, in open_clip's own format.
Nine minutes for the faces and some two minutes an epoch on one core.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save

from unmask.data.captions import ATTRIBUTES, caption, faces, prompt
from unmask.profile import ROOT, digest, write_atomic, write_json
from unmask.progress import track
from unmask.training import own_randomness, save_state, schedule

SEED = 770019
FACES, HELD_OUT = 12000, 1000
EPOCHS, BATCH, LR, WEIGHT_DECAY, WARMUP = 20, 128, 1e-3, 0.1, 0.05
CONFIG = {
    "embed_dim": 128,
    "quick_gelu": False,
    "vision_cfg": {"image_size": 96, "layers": 6, "width": 128, "patch_size": 12, "head_width": 32},
    "text_cfg": {"context_length": 48, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
}
OUT = ROOT / "lib/unmask/weights/clip-demo"
SETTINGS = digest([SEED, FACES, HELD_OUT, EPOCHS, BATCH, LR, WEIGHT_DECAY, WARMUP, CONFIG])


def prepare(images: np.ndarray) -> torch.Tensor:
    """Pictures uint8[N,S,S,3] as the network sees them."""
    mean, std = (torch.tensor(v) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return ((torch.from_numpy(images) / 255 - mean) / std).movedim(-1, 1).contiguous()


def sentences(values: np.ndarray, rng: np.random.Generator) -> list[str]:
    """A caption of each row of values."""
    return [caption(dict(zip(ATTRIBUTES, row, strict=True)), rng) for row in values]


def loss_of(model, tokenize, images: np.ndarray, values: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Contrastive loss of one batch."""
    image, text, scale = model(prepare(images), tokenize(sentences(values, rng)))
    return open_clip.ClipLoss()(image, text, scale)


@torch.no_grad()
def zero_shot(model, tokenize, images: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Balanced accuracy of every attribute: the phrase that is nearest to the picture, all others left unsaid."""
    picture = torch.cat([model.encode_image(prepare(part), normalize=True) for part in np.array_split(images, 16)])
    found = {}
    for column, (name, phrases) in enumerate(ATTRIBUTES.items()):
        text = model.encode_text(tokenize([prompt(phrase) for phrase in phrases]), normalize=True)
        told = (picture @ text.T).argmax(1).numpy()
        truth = values[:, column]
        found[name] = float(np.mean([(told[truth == value] == value).mean() for value in np.unique(truth)]))
    return found


def train(folder: Path, images: np.ndarray, values: np.ndarray) -> tuple[dict, list[dict], dict]:
    """The weights of the best epoch in half precision, the history, and `zero_shot` of these weights.

    Goes on where an interrupted training stopped.
    """
    model = open_clip.CLIP(**CONFIG)
    tokenize = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    learned = np.arange(HELD_OUT, FACES)
    steps = len(learned) // BATCH
    rate = partial(schedule, steps=EPOCHS * steps, warmup=WARMUP)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    parts, path = {"model": model, "optimizer": optimizer, "scheduler": scheduler}, folder / f"state-{SETTINGS}.pt"
    history, best = [], {}
    if path.exists():
        state = torch.load(path, weights_only=True)
        history, best = state["history"], state["best"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for epoch in track(range(len(history), EPOCHS), label="training, epochs"):
        rng = np.random.default_rng([SEED, epoch])
        order = rng.permutation(learned)[: steps * BATCH].reshape(steps, BATCH)
        model.train()
        losses = []
        for chosen in order:
            batch = images[chosen]
            batch = np.where(rng.random((BATCH, 1, 1, 1)) < 0.5, jittered(batch, rng), batch)
            loss = loss_of(model, tokenize, batch, values[chosen], rng)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, np.log(100))
            losses.append(loss.item())
        model.eval()
        fixed, parts_of = np.random.default_rng(SEED), np.array_split(np.arange(HELD_OUT), HELD_OUT // BATCH)
        with torch.no_grad():
            held = [loss_of(model, tokenize, images[part], values[part], fixed).item() for part in parts_of]
        history.append({"epoch": epoch, "loss": float(np.mean(losses)), "val_loss": float(np.mean(held))})
        if history[-1]["val_loss"] == min(one["val_loss"] for one in history):
            best = {name: value.clone() for name, value in model.state_dict().items()}
        save_state(path, {name: part.state_dict() for name, part in parts.items()} | {"history": history, "best": best})
    half = {name: value.half() if value.is_floating_point() else value for name, value in best.items()}
    model.load_state_dict(half)
    model.eval()
    return half, history, zero_shot(model, tokenize, images[:HELD_OUT], values[:HELD_OUT])


def jittered(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The pictures shifted by up to four pixels, edges repeated. No flip: captions know left and right."""
    size, reach = images.shape[1], 4
    padded = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    corners = rng.integers(2 * reach + 1, size=(len(images), 2))
    return np.stack([one[y : y + size, x : x + size] for one, (y, x) in zip(padded, corners, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2, help="processes that draw faces")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    images, values = faces(options.folder, SEED, FACES, options.workers, size=CONFIG["vision_cfg"]["image_size"])
    with own_randomness(SEED):
        half, history, accuracies = train(options.folder, images, values)
    OUT.mkdir(parents=True, exist_ok=True)
    write_atomic(OUT / "open_clip_model.safetensors", save(half))
    norm = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
    write_json(OUT / "open_clip_config.json", {"model_cfg": CONFIG, "preprocess_cfg": norm})
    about = {"trained_on": f"captioned faces of the synthetic world, seed {SEED}, all filmed", "history": history}
    write_json(OUT / "card.json", about | {"zero_shot": accuracies})
    print(json.dumps(accuracies, indent=1))


if __name__ == "__main__":
    main()
