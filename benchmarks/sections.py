"""What the benchmarks share: the name of the processor, and writing a section of RESULTS.md."""

import argparse
import platform
import re
from collections.abc import Callable
from pathlib import Path

from unmask.profile import write_atomic


def processor() -> str:
    """Name of the CPU model."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def write_section(path: Path, section: str) -> None:
    """Replace the section that starts with the same `## heading` in a Markdown file, or append it; others stay."""
    heading = section.splitlines()[0]
    text = path.read_text() if path.exists() else "# Measured results\n"
    old = re.search(rf"^{re.escape(heading)}\n.*?(?=^## |\Z)", text, re.M | re.S)
    before, after = (text[: old.start()], text[old.end() :]) if old else (text.rstrip("\n") + "\n\n", "")
    write_atomic(path, before + section.rstrip("\n") + "\n" + ("\n" + after if after else ""))


def run(about: str, table: Callable[[], str]) -> None:
    """The command line of a benchmark: print the section that `table` measures and, with --out, write it."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--out", type=Path, help="Markdown file whose section is replaced")
    arguments = parser.parse_args()
    section = table()
    print(section)
    if arguments.out:
        write_section(arguments.out, section)
