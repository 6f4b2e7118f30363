#!/bin/bash
# What jobs/train.sbatch runs on each node: copies the crops to the node's own disk, then `unmask train` with the
# arguments given, a process for each GPU of all nodes.
set -euo pipefail

scratch=$(mktemp -d "${TMPDIR:-/tmp}/unmask-XXXXXX")
trap 'rm -rf "$scratch"' EXIT

# Training reads crops at random, which a shared file system is slow at. What it computes stays where it would have been.
copy_crops() { # CROPS
    local crops features
    crops=$(realpath "$1")
    features=$(dirname "$crops")/features
    mkdir -p "$scratch/crops" "$crops/clip-features" "$features"
    cp -r "$crops/crops.parquet" "$crops/items.parquet" "$crops/settings.json" "$crops/shards" "$scratch/crops/"
    ln -s "$crops/clip-features" "$scratch/crops/clip-features"
    ln -s "$features" "$scratch/features"
}

arguments=("$@")
for ((i = 0; i + 1 < $#; i++)); do
    if [ "${arguments[i]}" = --crops ]; then
        copy_crops "${arguments[i + 1]}"
        arguments[i + 1]=$scratch/crops
    fi
done

processes=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-1}))
launch=(python3)
if [ "$processes" -gt 1 ]; then
    # srun was called on the first node.
    launch=(python3 -m accelerate.commands.launch --num_processes "$processes" --num_machines "$SLURM_NNODES"
        --machine_rank "$SLURM_NODEID" --main_process_ip "$SLURM_LAUNCH_NODE_IPADDR"
        --main_process_port $((20000 + SLURM_JOB_ID % 20000)) --mixed_precision no --dynamo_backend no)
    if [ -z "${SLURM_GPUS_ON_NODE:-}" ]; then launch+=(--cpu); fi
fi
"${launch[@]}" -m unmask.cli train "${arguments[@]}"
