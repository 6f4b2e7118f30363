"""Every trainable detector, one interface, one registry: see `base`."""

from unmask.detectors import convnext  # noqa: F401  registers itself
