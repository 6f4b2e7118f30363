"""Unmask: is this face video real, and how would we know on data we never saw?"""

__version__ = "0.1.0"
