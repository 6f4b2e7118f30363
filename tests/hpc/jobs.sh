#!/usr/bin/env bash
# Runs the scripts in jobs/ on SLURM (see slurm.sh), from a clone's own folder, on the crops of a tiny study:
# `tests/hpc/jobs.sh` after `./run_all.sh --profile tiny`. About five minutes on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=data/work/tiny
out=$work/hpc
rm -rf "$out" && mkdir -p "$out"
export SBATCH_OUTPUT="$out/%x-%j_%a.log"

fail() {
    echo "FAILED: $1" >&2
    tail -n 20 "$out"/*.log >&2
    exit 1
}

echo "array: crops in three shares equal those of one"
sbatch --wait --array=0-2 --cpus-per-task=1 --mem=2G jobs/array.sbatch \
    preprocess "$work/manifest.parquet" "$out/shares" --profile tiny --workers 1 || fail array
python3 -m unmask.cli preprocess "$work/manifest.parquet" "$out/one" --profile tiny --workers 1
python3 - "$out" <<'PYTHON' || fail "crops differ"
import sys
from pathlib import Path
import numpy as np
from unmask.data.crops import CropStore, read_index
folders = [Path(sys.argv[1]) / name for name in ("shares", "one")]
tables = [read_index(folder).sort_values(["item_id", "frame"], ignore_index=True) for folder in folders]
assert len(tables[0]) == len(tables[1]) > 0
for rows in zip(*(table.iterrows() for table in tables)):
    images = [CropStore(folder).image(row) for folder, (_, row) in zip(folders, rows)]
    assert np.array_equal(*images)
print(f"  {len(tables[0])} crops are the same")
PYTHON

echo "training on two nodes equals that on one"
for nodes in 1 2; do
    sbatch --wait --nodes=$nodes --cpus-per-task=1 --mem=8G jobs/train.sbatch d2st --profile tiny --stage 1 \
        --manifest "$work/d2st/media.parquet" --crops "$work/d2st/crops-media" --out "$out/d2st-$nodes" || fail "training"
done
python3 - "$out" <<'PYTHON' || fail "losses differ"
import json, sys
from pathlib import Path
one, two = (json.loads((Path(sys.argv[1]) / f"d2st-{n}" / "config.json").read_text())["history"] for n in (1, 2))
for a, b in zip(one, two, strict=True):
    assert abs(a["loss"] - b["loss"]) < 1e-4 and abs(a["val_loss"] - b["val_loss"]) < 1e-3, (a, b)
print("  losses:", *(f"{a['loss']:.6f} and {b['loss']:.6f}" for a, b in zip(one, two)))
PYTHON
if ls -d "${TMPDIR:-/tmp}"/unmask-??????/crops 2>/dev/null; then fail "scratch was left"; fi

echo "JupyterLab answers with its token, and not without"
job=$(sbatch --parsable --cpus-per-task=1 --mem=2G jobs/jupyter.sbatch $([ "$(id -u)" -ne 0 ] || echo --allow-root))
message=slurm-unmask-jupyter-$job.txt
address=http://$(hostname):$((20000 + job % 20000))/api/contents
answer() { # [OPTION ...]: the status, asked as through the tunnel
    curl -s -o /dev/null -w '%{http_code}' -H "Host: localhost:8888" "$@" "$address"
}
for _ in $(seq 120); do
    sleep 1
    if [ "$(answer)" = 403 ]; then break; fi
done
[ "$(stat -c %a "$message")" = 600 ] || fail "$message can be read by others"
token=$(sed -n 's/.*token=//p' "$message")
code=$(answer -H "Authorization: token $token")
scancel "$job"
[ "$code" = 200 ] || fail "JupyterLab said $code"
echo "  200 with, 403 without"
echo "All of it worked."
