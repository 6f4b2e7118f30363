"""Search for files that break a reader, guided by coverage: `python tests/fuzz/fuzz.py READER [options of libFuzzer]`.

It needs atheris (`pip install atheris`), which the tests do not. READER is one of TARGETS. A file that makes a reader
raise something else than its own error ends the search and is left as crash-...: mend the reader, and keep the file in
tests/fuzz/kept/READER/, from where tests/test_fuzzing.py reads it in every run. For five minutes:

    python tests/fuzz/fuzz.py profile -max_total_time=300 -max_len=4096
"""

import sys
import tempfile
from pathlib import Path

import atheris

# The kit alone: with the libraries below it the search is ten times slower and finds what is theirs.
with atheris.instrument_imports(include=["unmask"]):
    from unmask import evaluation, exported, lare_maps, panel
    from unmask.data import crops, datasets, faces
    from unmask.data.manifest import COLUMNS, ManifestError, read_manifest
    from unmask.detectors import base
    from unmask.profile import ProfileError, load_profile, parse_changes

import pandas as pd

FOLDER = Path(tempfile.mkdtemp(prefix="unmask-fuzz-"))
KEPT = Path(__file__).parent / "kept"
NOTHING = pd.DataFrame(columns=list(COLUMNS))


def changes(path):
    """Settings of the command line, as text."""
    load_profile("tiny", parse_changes([path.read_bytes().decode("utf-8", "replace")]))


# By name: what the file is called, the reader, and its own errors.
TARGETS = {
    "manifest": ("m.parquet", read_manifest, ManifestError),
    "media_csv": ("media.csv", lambda path: datasets.index(path.parent, "folder"), ManifestError),
    "crop_index": ("crops.parquet", lambda path: crops.read_index(path.parent), crops.CropError),
    "settings": ("settings.json", lambda path: crops.CropStore(path.parent).settings(), crops.CropError),
    "annotations": ("marks.npz", faces.AnnotationLocator, faces.LocatorError),
    "scores": ("scores.parquet", evaluation.read_scores, evaluation.ScoreError),
    "scores_csv": ("s.csv", lambda path: evaluation.read_media_scores(path, NOTHING, path), evaluation.ScoreError),
    "profile": ("mine.yaml", load_profile, ProfileError),
    "settings_text": ("changes.txt", changes, ProfileError),
    "panel": ("panel.json", panel.read, (panel.PanelError, base.CheckpointError)),
    "card": ("config.json", lambda path: base.load_checkpoint(path.parent), base.CheckpointError),
    "exported": ("model.onnx", exported.opened, base.CheckpointError),
    "lare_index": ("index.parquet", lambda path: lare_maps.read_index(path.parent), lare_maps.LareError),
}


def main():
    """Search with the kept files as a start; ends at the first file that is read wrongly, or as libFuzzer is told."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: fuzz.py READER [options of libFuzzer]; READER is one of {', '.join(TARGETS)}")
    kind = sys.argv.pop(1)
    name, reader, expected = TARGETS[kind]

    def once(data):
        (FOLDER / name).write_bytes(data)
        try:
            reader(FOLDER / name)
        except expected:
            pass

    corpus = KEPT / kind
    new = FOLDER / "corpus"  # libFuzzer writes what it finds of interest into the first folder
    new.mkdir()
    atheris.Setup([*sys.argv, str(new), *([str(corpus)] if corpus.is_dir() else [])], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
