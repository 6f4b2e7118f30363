"""Every trainable detector, one interface, one registry: see `base`."""

from unmask.detectors import convnext, embedding, residual, temporal  # noqa: F401  register themselves
