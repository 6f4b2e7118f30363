#!/usr/bin/env bash
# Runs the checks: dependencies, style, tests. Options go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source jobs/environment.sh
use_environment test
python3 -m pip check
python3 -m ruff check .
# As many files at a time as there are cores, up to four (each process holds PyTorch), with one thread each.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python3 -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
