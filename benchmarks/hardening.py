"""What a thousand damaged files and twenty kills do to the kit: every count, and whether anything was lost.

    python benchmarks/hardening.py inputs [--media FOLDER] [--count 1000] [--out benchmarks/RESULTS.md]
    python benchmarks/hardening.py kills [--count 20] [--only 05] [--out benchmarks/RESULTS.md]

`inputs` damages made media (and those of a folder), deals good ones among them, and sends all through `unmask
preprocess` and `unmask score`: each must get a row in time, and the good ones what they get alone. `kills` runs a tiny
study in a clone of this repository's last commit, kills it again and again at drawn times, the whole of it or one of
its processes, starts it again each time, and compares its tables with those of a clone that nobody disturbed. The same
`--seed` damages alike and draws alike. Exit code 1 if anything was lost.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from damaged_inputs import INPUTS, inputs
from kills import KILLS, kills
from sections import write_section


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["inputs", "kills"])
    parser.add_argument("--count", type=int, help=f"damaged files (default {INPUTS}) or kills (default {KILLS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--media", type=Path, help="inputs: real pictures and videos to damage as well")
    parser.add_argument("--only", action="append", default=[], metavar="NN", help="kills: these chapters alone")
    parser.add_argument("--work", type=Path, help="a folder that is kept (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="Markdown file whose section is replaced")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if options.what == "inputs":
            section, faults = inputs(work, options.count or INPUTS, options.seed, options.media)
        else:
            section, faults = kills(work, options.count or KILLS, options.seed, options.only)
    print(section, *faults, sep="\n")
    if options.out and not faults:
        write_section(options.out, section)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
