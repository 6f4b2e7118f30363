"""The commands of `unmask`, a module for each group: what they do and, beside it, the options that they take.

Whatever is slow to import (PyTorch, pandas, ...) is imported in the function of a command, so that the help is quick.
"""
