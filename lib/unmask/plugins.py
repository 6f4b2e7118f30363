"""Your own detectors and data set layouts: Python files outside the kit, named by the variable UNMASK_PLUGINS."""

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path

from unmask.profile import ProfileError, digest

VARIABLE = "UNMASK_PLUGINS"


def load() -> None:
    """Run the files that UNMASK_PLUGINS names (joined by the path separator), each once; they register what they have.

    The variable is the user's word that this code may run: nothing else, no checkpoint and no profile, names code.
    ProfileError for a file that is not there; what goes wrong inside a file is raised as it is.
    """
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        path = Path(name).resolve()
        if not path.is_file():
            raise ProfileError(f"{VARIABLE} names {name}, which is no file; mend the variable or unset it.")
        _run(path)


@cache
def _run(path: Path) -> None:
    name = f"unmask_plugin_{path.stem}_{digest(str(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ProfileError(f"{VARIABLE} names {path}, which is no Python file (its name must end in .py).")
    # In sys.modules first, as `import` does: a checkpoint's key covers the source of a detector's module.
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise
