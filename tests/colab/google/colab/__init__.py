"""Stands in for Colab's own package of this name; its kernel has it imported from the start."""
