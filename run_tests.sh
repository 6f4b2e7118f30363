#!/usr/bin/env bash
# Runs the checks: dependencies, style, tests. Options go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source jobs/environment.sh
use_environment test
python3 -m pip check
python3 -m ruff check .
python3 -m pytest "$@"
