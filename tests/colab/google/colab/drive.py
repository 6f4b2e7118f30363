"""Google Drive, stood in for by the folder that STAND_IN_DRIVE names."""

import os
from pathlib import Path


def mount(mountpoint: str, force_remount: bool = False) -> None:
    """Put the folder where Drive would be mounted."""
    place = Path(mountpoint)
    if not place.exists():
        place.mkdir(parents=True)
        (place / "MyDrive").symlink_to(os.environ["STAND_IN_DRIVE"], target_is_directory=True)
    print(f"Mounted at {mountpoint}")
