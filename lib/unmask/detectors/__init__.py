"""Every trainable detector, one interface, one registry: see `base`."""

from unmask.detectors import clip_prompts, convnext, embedding, residual, temporal  # noqa: F401  register themselves
