#!/usr/bin/env bash
# The tiny study as jobs on SLURM (see slurm.sh), and without it; compares the tables: `tests/hpc/study.sh FOLDER`.
# Both runs are in clones of their own in FOLDER. Chapter 10 is signalled while it trains, and must be queued again.
# A quarter of an hour each on two cores.
set -euo pipefail
source_tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=${1:?name a folder for the two clones}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
for name in slurm local; do git clone -q "$source_tree" "$folder/$name"; done

signal_while_training() { # CHAPTER FOLDER: once, after the first epoch that a training in the folder ends
    local job
    until job=$(squeue --me --noheader --format="%i %k" | sed -n "s/ rule_chapter_$1\$//p") && [ -n "$job" ]; do
        sleep 0.5
    done
    until [ -n "$(find "$2" -name epochs.json 2>/dev/null | head -n 1)" ]; do sleep 0.1; done
    scancel --signal=USR1 "$job"
    echo "signalled job $job, $1"
    sleep 5
    until [ "$(squeue --noheader --job="$job" --format=%T)" = RUNNING ]; do sleep 1; done
    echo "$(scontrol --oneliner show job "$job" | grep -o 'Restarts=[0-9]*'), running again"
}

cd "$folder/slurm"
PYTHONPATH=$PWD/lib ./run_all.sh --profile tiny --slurm --jobs 2 &
run=$!
signal_while_training 10_ablation data/work/tiny/ablation
wait "$run"
cd "$folder/local"
PYTHONPATH=$PWD/lib ./run_all.sh --profile tiny
python3 "$source_tree/tests/hpc/compare.py" "$folder/slurm/figures/tiny" "$folder/local/figures/tiny"
