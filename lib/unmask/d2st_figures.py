"""Pictures of where D2ST-Adapters look: the points that they sample in a clip, and the frames that they attend to."""

from collections.abc import Sequence

import numpy as np
import torch

from unmask.figures import COLOURS

MARKS = {"spatial": ("o", COLOURS["real"]), "temporal": ("s", COLOURS["fake"])}


def draw_points(axes: Sequence, clip: np.ndarray, look: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Frames of a clip uint8[T,S,S,3], as many as there are axes, with the points that lie nearest to each in time.

    look: of one adapter (`D2STAdapter.look`) and one clip. The larger a point, the more the class tokens attend to it.
    """
    side = round((next(iter(look.values()))[1].shape[3] - 1) ** 0.5)
    cell = clip.shape[1] / side
    for ax, t in zip(axes, np.linspace(0, len(clip) - 1, len(axes)).round().astype(int), strict=True):
        ax.imshow(clip[t])
        ax.set_title(f"frame {t}", fontsize=8)
        ax.axis("off")
        for name, (places, attention) in look.items():
            weight = attention[0, :, :, 0].mean(1)  # heads, points: of the class tokens of all frames
            for group in range(places.shape[1]):
                z, y, x = places[0, group].numpy().T
                near = np.abs(np.clip(z, 0, len(clip) - 1) - t) <= 0.5
                size = 12 * weight[group].numpy()[near] * len(z)
                marker, colour = MARKS[name]
                x, y = ((axis[near] + 0.5) * cell for axis in (x, y))
                ax.scatter(x, y, size, colour, marker=marker, alpha=0.5, linewidths=0)
        ax.set(xlim=(0, clip.shape[1]), ylim=(clip.shape[1], 0))


def over_time(look: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    """How much the class token of every frame attends to points near each frame: float[T,T], rows sum to 1.

    look: of one pathway and one clip: places float[1,G,n,3], attention float[1,G,T,1+g*g,n].
    """
    places, attention = look
    frames = attention.shape[2]
    near = places[0, :, :, 0].round().clamp(0, frames - 1).long()
    found = torch.zeros(attention.shape[1], frames, frames)
    found.scatter_add_(2, near[:, None].expand(-1, frames, -1), attention[0, :, :, 0])
    return found.mean(0).numpy()
