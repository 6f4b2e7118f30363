"""jobs/array.sbatch: which share each job of an array does."""

import os
import subprocess

import pytest

from unmask.profile import ROOT


@pytest.fixture
def submit(tmp_path):
    """Run the script as SLURM does a job of an array; `srun` only says what it was given."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "environment.sh").write_text('use_environment() { :; }\nsrun() { echo "$@"; }\n')

    def run(numbers, own, shares=None):
        given = {"ID": own, "COUNT": len(numbers), "MIN": min(numbers), "MAX": max(numbers)}
        variables = {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in given.items()}
        variables |= {"SLURM_CPUS_PER_TASK": "4", "PATH": os.environ["PATH"]}
        variables |= {"SHARES": shares} if shares is not None else {}
        command = ["bash", str(ROOT / "jobs" / "array.sbatch"), "preprocess", "a manifest", "crops"]
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("shares", [None, ""])
def test_a_whole_array_counts_its_shares_itself(submit, shares):
    done = submit(range(32), 3, shares)
    assert done.returncode == 0 and done.stdout.endswith("unmask.cli preprocess a manifest crops --shard 3/32\n")


@pytest.mark.parametrize("numbers", [[3], [3, 7], [0], [0, 2], [1, 2, 3], [0, 1, 5]])
def test_a_part_of_an_array_is_told_how_many_there_are_or_refuses(submit, numbers):
    refused = submit(numbers, numbers[0])
    assert refused.returncode == 2 and refused.stdout == ""
    assert "SHARES=16 sbatch --array=3,7 jobs/array.sbatch" in refused.stderr
    done = submit(numbers, numbers[-1], "16")
    assert done.returncode == 0 and done.stdout.endswith(f"--shard {numbers[-1]}/16\n")
