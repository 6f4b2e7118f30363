#!/usr/bin/env bash
# Runs the study: every notebook, then figures/report.html. `./run_all.sh --help` lists the options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source jobs/environment.sh
use_environment
# Back to the caller's folder: --data may be relative to it.
cd "$OLDPWD"
exec python3 -m unmask.workflow "$@"
