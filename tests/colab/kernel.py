"""A notebook kernel that has `google.colab` imported before the first cell runs, as Colab's has."""

import google.colab  # noqa: F401
from ipykernel import kernelapp

if __name__ == "__main__":
    kernelapp.launch_new_instance()
