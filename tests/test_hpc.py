"""Jobs on a cluster: the step that survives a signal, what is asked of SLURM, and, where it is installed, real jobs."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from test_workflow import notebook

from unmask import jobstep, slurm, training
from unmask.headless import HeadlessError, run_notebook
from unmask.pairs import TrainingError
from unmask.plan import WorkflowError
from unmask.profile import ROOT
from unmask.workflow import CHAPTERS, Progress, parse_options, snakemake_command

NODE = ROOT / "tests" / "hpc" / "slurm.sh"
# Counts to `last`, a number a checkpoint, and goes on from the file; as trainings do.
COUNT = """
import sys, time
from pathlib import Path
from unmask import jobstep
path, last = Path(sys.argv[1]), int(sys.argv[2])
done = path.read_text().split() if path.exists() else []
for k in range(len(done), last):
    time.sleep(0.2)
    done.append(str(k))
    path.write_text(" ".join(done))
    if jobstep.stopping():
        print("stopped after", k, flush=True)
        sys.exit(3)
print("counted", flush=True)
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Stand-ins for SLURM's commands first on the PATH: each notes its arguments and prints what it is given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def make(name, prints="", code=0):
        (folder / f"{name}.txt").write_text(prints)
        path = folder / name
        path.write_text(f'#!/bin/sh\necho "$@" >>"$0.calls"\ncat "$0.txt"\nexit {code}\n')
        path.chmod(0o755)
        calls = folder / f"{name}.calls"
        return lambda: calls.read_text().splitlines() if calls.exists() else []

    return make


def start(arguments, **environment):
    command = [sys.executable, "-m", "unmask.jobstep", *map(str, arguments)]
    given = {**os.environ, "PYTHONPATH": str(ROOT / "lib"), **environment}
    return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# The step


def test_a_signal_stops_at_the_next_checkpoint_and_queues_the_job_again(tools, tmp_path):
    calls, path = tools("scontrol", "JobId=7 Restarts=1"), tmp_path / "count"
    process = start([sys.executable, "-c", COUNT, path, 500], SLURM_JOB_ID="7")
    until(path.exists)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 3 and "stopped after" in output and "Job 7 is queued again." in output
    assert calls() == ["--oneliner show job 7", "requeue 7"]
    done = path.read_text().split()
    assert 1 <= len(done) < 100
    again = start([sys.executable, "-c", COUNT, path, len(done) + 2], SLURM_JOB_ID="7")
    assert "counted" in again.communicate(timeout=30)[0] and again.returncode == 0
    assert path.read_text().split() == [str(k) for k in range(len(done) + 2)]
    assert len(calls()) == 2


def test_no_process_of_the_command_dies_of_the_signal(tools, tmp_path):
    # As on a cluster, where it reaches all of them: here by the process group.
    tools("scontrol")
    path = tmp_path / "count"
    shell = f"{sys.executable} -c '{COUNT}' {path} 500; echo shell lives"
    process = subprocess.Popen(
        [sys.executable, "-m", "unmask.jobstep", "bash", "-c", shell], start_new_session=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "lib")}, stdout=subprocess.PIPE,
    )  # fmt: skip
    until(path.exists)
    os.killpg(process.pid, signal.SIGUSR1)
    assert "stopped after" in (output := process.communicate(timeout=30)[0]) and "shell lives" in output


def test_what_ends_well_is_not_queued_again(tools, tmp_path):
    calls, path = tools("scontrol"), tmp_path / "count"
    code = COUNT.replace("if jobstep.stopping():", "if False:")
    process = start([sys.executable, "-c", code, path, 5], SLURM_JOB_ID="7")
    until(path.exists)
    process.send_signal(signal.SIGUSR1)
    assert "counted" in process.communicate(timeout=30)[0] and process.returncode == 0
    assert calls() == []


def test_what_does_not_stop_is_queued_again_after_the_grace(tools, tmp_path):
    calls, path = tools("scontrol"), tmp_path / "count"
    code = COUNT.replace("if jobstep.stopping():", "if False:")
    process = start(["--grace", 0, sys.executable, "-c", code, path, 500], SLURM_JOB_ID="7")
    until(path.exists)
    process.send_signal(signal.SIGUSR1)
    until(lambda: "requeue 7" in calls(), 10)
    process.terminate()  # as SLURM does now
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("variables", "shown", "expected"),
    [
        ({"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}, "", "requeue 5_2"),
        ({"SLURM_PROCID": "1"}, "", None),  # of the tasks on several nodes one asks
        ({}, f"Restarts={jobstep.RESTARTS}", None),
    ],
)
def test_which_job_is_queued_again(tools, monkeypatch, variables, shown, expected):
    calls = tools("scontrol", shown)
    for name, value in ({"SLURM_JOB_ID": "7"} | variables).items():
        monkeypatch.setenv(name, value)
    jobstep._queue_again()
    assert [call for call in calls() if call.startswith("requeue")] == ([expected] if expected else [])


def test_a_step_has_the_threads_of_its_cores_and_hands_on_exit_codes(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    show = "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit(5)"
    process = start([sys.executable, "-c", show], SLURM_CPUS_PER_TASK="3")
    assert process.communicate(timeout=30)[0].strip() == "3" and process.returncode == 5
    process = start([sys.executable, "-c", show], SLURM_CPUS_PER_TASK="3", OMP_NUM_THREADS="2")
    assert process.communicate(timeout=30)[0].strip() == "2"


def test_a_step_needs_a_command(capsys):
    with pytest.raises(SystemExit):
        jobstep.main([])
    assert "name the command" in capsys.readouterr().err


# What stops


def test_a_training_stops_when_its_state_is_written(tmp_path, monkeypatch):
    state = {"history": [{"epoch": 0}], "key": "k"}
    stop = tmp_path / "stop"
    monkeypatch.setenv(jobstep.STOP, str(stop))
    training.save_state(tmp_path / "a" / training.STATE, state)
    stop.touch()
    with pytest.raises(TrainingError, match="Stopped at a checkpoint"):
        training.save_state(tmp_path / "b" / training.STATE, state)
    kept = [(tmp_path / name / training.STATE).read_bytes() for name in "ab"]
    assert kept[0] == kept[1]
    assert len(json.loads((tmp_path / "b" / training.TIMES).read_text())) == 1


def test_a_stopped_notebook_says_so_and_does_not_count_as_done(tmp_path, monkeypatch):
    stop = tmp_path / "stop"
    stop.touch()
    monkeypatch.setenv(jobstep.STOP, str(stop))
    path = tmp_path / "05_convnext.ipynb"
    nbformat.write(notebook(f"raise RuntimeError({jobstep.STOPPED!r})"), path)
    with pytest.raises(HeadlessError) as caught:
        run_notebook(path, tmp_path / "work", {}, "f")
    assert str(caught.value) == f"05_convnext: {jobstep.STOPPED}"
    assert not (tmp_path / "work" / "results" / "05_convnext.json").exists()


# What is asked of SLURM


def command(*options):
    return snakemake_command(Path("plan.json"), ROOT, parse_options(options), [], [])


@pytest.fixture
def executor(monkeypatch):
    """Snakemake's executor counts as installed, whether it is or not."""
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: name)


def test_the_call_of_snakemake(tools, executor):
    tools("squeue")
    tools("sinfo", "(null)\n")
    given = command("--slurm")
    assert given[given.index("--profile") + 1] == str(ROOT / "profiles" / "slurm")
    assert "gres=" in given and "--cores" not in given and "--jobs" not in given
    tools("sinfo", "(null)\ngpu:a100:4\n")
    given = command("--slurm", "--jobs", "3")
    assert "gres=gpu:1" in given and given[given.index("--jobs") + 1] == "3"
    local = command()
    assert local[local.index("--cores") + 1] == "1" and "--profile" not in local


def test_jobs_of_a_killed_run_are_waited_for(tools, executor):
    tools("sinfo")
    tools("squeue", f"12 rule_chapter_05_convnext {ROOT}\n13 rule_chapter_05_convnext /elsewhere\n14 (null) {ROOT}\n")
    with pytest.raises(WorkflowError, match="jobs 12[.] .* scancel 12$"):
        command("--slurm")


def test_without_slurm_or_its_executor_a_sentence_says_so(tools, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WorkflowError, match="there is no sinfo here"):
        slurm.gres()
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WorkflowError, match="pip install"):
        slurm.options(ROOT, None)


def test_chapters_that_train_ask_for_a_gpu():
    trains = {c.stem for c in CHAPTERS if {"train", "clip", "d2st", "temporal", "unsupervised"} & set(c.keys)}
    asking = {chapter.stem for chapter in CHAPTERS if chapter.gpu}
    assert trains < asking and not asking & {"00_data", "01_preprocessing", "02_camera_clustering", "04_sbi"}


def test_progress_of_jobs(tmp_path, capsys):
    log = tmp_path / "rule_chapter_05_convnext" / "9.log"
    log.parent.mkdir()
    log.write_text("noise\n>> 05_convnext: started\n>> 05_convnext: failed in cell 3/9\n>>   ValueError: no\nnoise\n")
    progress = Progress()
    progress.follow(iter([
        "chapter_04_sbi     1\n", "chapter_05_convnext     1\n",
        f"Job 1 has been submitted with SLURM jobid 8 (log: {tmp_path}/rule_chapter_04_sbi/8.log).\n",
        f"Job 2 has been submitted with SLURM jobid 9 (log: {log}).\n",
        "Finished jobid: 1 (Rule: chapter_04_sbi)\n", "Error in rule chapter_05_convnext:\n",
    ]))  # fmt: skip
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "[1/2] 04_sbi: job 8 (1 more after it)", "[2/2] 05_convnext: job 9 (the last one)", "[1/2] 04_sbi: done",
        "[2/2] 05_convnext: failed in cell 3/9", "  ValueError: no", f"  job's output: {log}",
    ]  # fmt: skip
    assert progress.done == ["04_sbi"] and progress.told_failure


def test_the_profile_is_one_of_snakemake_and_the_scripts_leave_time_to_stop():
    keys = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text())
    assert keys["executor"] == "slurm" and keys["slurm-requeue"]
    times = [re.search(r"--signal=USR1@(\d+)", keys["default-resources"]["slurm_extra"])[1]]
    for path in (ROOT / "jobs").glob("*.sbatch"):
        subprocess.run(["bash", "-n", str(path)], check=True)
        text = path.read_text()
        if "jobstep" in text:
            assert "#SBATCH --requeue" in text and "#SBATCH --open-mode=append" in text
            if "--grace 0" not in text:
                times += [re.search(r"#SBATCH --signal=USR1@(\d+)", text)[1]]
    assert min(map(int, times)) >= jobstep.GRACE + 30


# Real jobs


@pytest.fixture(scope="module")
def cluster():
    """SLURM's commands, answering: slurm.sh's own, up already or for as long as the tests run. Never another one."""
    missing = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)")
    with hold() as (process, said):
        if said is None:
            pytest.skip(f"no SLURM to try jobs on: {process.stderr.read().strip()}")
        yield


@contextlib.contextmanager
def hold(script=NODE):
    """slurm.sh's `hold`, and its word that SLURM is up; None if it is not."""
    process = subprocess.Popen(
        [str(script), "hold"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,  # Ctrl-C is for pytest, which ends it below
    )  # fmt: skip
    try:
        yield process, process.stdout.readline() or None
    finally:
        process.stdin.close()
        process.wait(timeout=120)


@pytest.fixture
def node(tools, tmp_path):
    """slurm.sh as it is, with its files below tmp_path and stand-ins for SLURM's programs, none of which is up."""
    for name in ("munge", "scancel", "squeue", "slurmctld", "slurmd"):
        tools(name)
    tools("id", "0\n")
    tools("sinfo", "no controller", code=1)
    text = NODE.read_text().replace("/etc/slurm", str(tmp_path / "etc")).replace("/var/tmp", str(tmp_path))
    script = tmp_path / "slurm.sh"
    script.write_text(text.replace("/run/munge", str(tmp_path / "munge")).replace("chown munge:", "true"))
    script.chmod(0o755)
    return script


def left(folder):
    return [name for name in ("etc/slurm.conf", "unmask-slurm") if (folder / name).exists()]


def test_a_start_that_fails_leaves_nothing_behind(node, tools, tmp_path):
    daemon = subprocess.Popen(["sleep", "600"])
    tools("slurmd", code=1)
    controller = tmp_path / "bin" / "slurmctld"
    controller.write_text(f"#!/bin/sh\necho {daemon.pid} >{tmp_path}/unmask-slurm/slurmctld.pid\n")
    # Reaped at once, as by the init of a daemon's own, for the script waits until it is gone.
    waiting = threading.Thread(target=daemon.wait, daemon=True)
    waiting.start()
    with hold(node) as (process, said):
        assert said is None and process.wait(timeout=30) == 1
    waiting.join(timeout=10)
    stopped = daemon.poll()
    daemon.kill()
    assert stopped == -signal.SIGTERM and left(tmp_path) == []


def test_two_checkouts_do_not_use_slurm_at_once(node, tools, tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/slurm.conf").write_text("# Written by tests/hpc/slurm.sh\n")
    tools("sinfo", "up")
    with hold(node) as (_, said):
        assert said == "SLURM is up already.\n"
        for verb in ("hold", "start", "stop"):
            other = subprocess.run([str(node), verb], stdin=subprocess.DEVNULL, capture_output=True, text=True)
            assert other.returncode == 1 and "in use by the tests of another checkout" in other.stderr
    assert left(tmp_path) == ["etc/slurm.conf"], "what was up before stays up"
    with hold(node) as (_, said):
        assert said


@pytest.mark.parametrize("conf", ["ClusterName=theirs\n", None])
def test_a_cluster_that_is_not_slurm_shs_is_left_alone(node, tools, tmp_path, conf):
    tools("sinfo", "up")
    stopped = tools("scancel")
    if conf:
        (tmp_path / "etc").mkdir()
        (tmp_path / "etc/slurm.conf").write_text(conf)
    with hold(node) as (process, said):
        assert said is None and "a SLURM of its own" in process.stderr.read()
    assert stopped() == [] and left(tmp_path) == (["etc/slurm.conf"] if conf else [])


def sbatch(*arguments, folder):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment |= {"PYTHONPATH": str(ROOT / "lib"), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    given = ["sbatch", "--parsable", f"--chdir={folder}", "--mem=100", *map(str, arguments)]
    return subprocess.run(given, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def state_of(job):
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True).stdout
    return dict(re.findall(r"(\w+)=(\S+)", shown))


def test_a_real_job_that_is_signalled_is_requeued_and_goes_on(cluster, tmp_path):
    path, log, last = tmp_path / "count", tmp_path / "log", 15
    script = tmp_path / "job.sh"
    (tmp_path / "count.py").write_text(COUNT)
    run = f"srun python3 -m unmask.jobstep python3 count.py {path} {last}"
    script.write_text(f"#!/bin/bash\nset -e\n{run}\n")
    job = sbatch("--requeue", "--open-mode=append", f"--output={log}", script, folder=tmp_path)
    until(path.exists)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    until(lambda: state_of(job)["JobState"] == "COMPLETED", 50)
    text = log.read_text()
    assert state_of(job)["Restarts"] == "1"
    assert text.count("stopped after") == 1 and text.count("counted") == 1
    assert path.read_text().split() == [str(k) for k in range(last)]


def test_a_real_array_does_a_shard_in_each_job(cluster, tmp_path):
    script = (ROOT / "jobs" / "array.sbatch").read_text().replace("unmask.cli", "unmask.shown")
    assert script.count("unmask.shown") == 1
    (tmp_path / "unmask").mkdir()
    (tmp_path / "unmask" / "__init__.py").write_text("")
    shutil.copy(ROOT / "lib" / "unmask" / "jobstep.py", tmp_path / "unmask")
    (tmp_path / "unmask" / "shown.py").write_text("import sys\nprint('given', *sys.argv[1:])\n")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "environment.sh").write_text(f'use_environment() {{ export PYTHONPATH="{tmp_path}"; }}\n')
    (tmp_path / "array.sbatch").write_text(script)
    job = sbatch("--array=0-1", "--cpus-per-task=1", tmp_path / "array.sbatch", "preprocess", "a b", folder=tmp_path)
    logs = [tmp_path / f"slurm-unmask-array-{job}_{k}.log" for k in (0, 1)]
    until(lambda: all(state_of(f"{job}_{k}").get("JobState") == "COMPLETED" for k in (0, 1)), 40)
    assert [log.read_text().strip() for log in logs] == [f"given preprocess a b --shard {k}/2" for k in (0, 1)]
