#!/usr/bin/env bash
# A real SLURM on this machine alone, to try jobs on: `tests/hpc/slurm.sh start`, `... stop`. Needs root and the
# system packages (Debian: apt-get install --no-install-recommends slurm-wlm munge). `... hold` is for tests: it starts
# SLURM unless it is up, says so, and stops what it started when its standard input ends. One of them runs at a time.
#
# Two nodes on loopback, so that jobs over several can be tried as well. Each claims 8 cores, whatever there is. No
# accounting, no cgroups. A requeued job starts again after seconds, not after the usual two minutes (cred_expire).
# The configuration lies at the system path: Snakemake's executor does not pass SLURM_CONF on.
set -euo pipefail

conf=/etc/slurm/slurm.conf
state=/var/tmp/unmask-slurm
lock=$state.lock
mark="# Written by tests/hpc/slurm.sh"

configuration() {
    local host
    host=$(hostname -s)
    cat <<CONF
$mark
ClusterName=unmask
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2
KillWait=5
StateSaveLocation=$state/state
SlurmdSpoolDir=$state/spool-%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd-%n.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd-%n.log
NodeName=unmask1 NodeHostname=$host NodeAddr=127.0.0.1 Port=16818 CPUs=8 RealMemory=32000
NodeName=unmask2 NodeHostname=$host NodeAddr=127.0.0.1 Port=16819 CPUs=8 RealMemory=32000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

ours() { grep -q "^$mark" "$conf" 2>/dev/null; }

is_up() { sinfo >/dev/null 2>&1; }

start() {
    if ! ours && { [ -f "$conf" ] || is_up; }; then
        echo "$conf is not from here: this machine has a SLURM of its own." >&2
        return 1
    fi
    if is_up; then
        echo "SLURM is up already."
        return
    fi
    if [ "$(id -u)" != 0 ]; then
        echo "Starting SLURM on this machine takes root." >&2
        return 1
    fi
    mkdir -p "$state/state" "$state/spool-unmask1" "$state/spool-unmask2" /etc/slurm /run/munge
    chown munge: /run/munge
    configuration >"$conf"
    # They outlive this script, and must not hold its lock.
    munge -n >/dev/null 2>&1 || runuser -u munge -- munged 9>&-
    slurmctld 9>&- || return
    slurmd -N unmask1 9>&- || return
    slurmd -N unmask2 9>&- || return
    for _ in $(seq 60); do
        if [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = 2 ]; then
            echo "SLURM is up: $(sinfo --version), 2 nodes."
            return
        fi
        sleep 0.5
    done
    echo "SLURM did not come up; its logs are in $state." >&2
    return 1
}

# Ends what `start` started, by its pid files; munged stays, as others may use it.
stop() {
    local file pid
    if ours && scancel --user="$(id -un)" 2>/dev/null; then
        for _ in $(seq 100); do
            if [ -z "$(squeue --noheader)" ]; then break; fi
            sleep 0.2
        done
    fi
    for file in "$state"/slurmd-unmask1.pid "$state"/slurmd-unmask2.pid "$state"/slurmctld.pid; do
        if [ ! -f "$file" ]; then continue; fi
        pid=$(cat "$file")
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 100); do
            if ! kill -0 "$pid" 2>/dev/null; then break; fi
            sleep 0.1
        done
    done
    if ours; then rm "$conf"; fi
    rm -rf "$state"
}

# Nothing of a start that failed is left, nor of tests that were killed.
hold() {
    if ! { ours && is_up; }; then trap stop EXIT; fi
    start || exit 1
    cat >/dev/null
}

case "${1:-}" in
start | stop | hold) ;;
*)
    echo "usage: tests/hpc/slurm.sh start|stop|hold" >&2
    exit 2
    ;;
esac
# Ports, configuration and state are the machine's: another checkout has to wait.
[ -e "$lock" ] || : >"$lock"
exec 9<"$lock"
if ! flock --nonblock 9; then
    echo "The SLURM of this machine is in use by the tests of another checkout." >&2
    exit 1
fi
"$1"
