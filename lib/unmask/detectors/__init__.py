"""Every trainable detector, one interface, one registry: see `base`."""

from unmask.detectors import (  # noqa: F401  register themselves
    clip_d2st,
    clip_lare,
    clip_prompts,
    convnext,
    embedding,
    residual,
    temporal,
)
