"""The workflow on a Slurm of one node, made of the daemons of Debian's packages, for the test."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from dataclasses import replace

import pytest

from reproduce.files import read
from reproduce.steps import attack, measure, train
from reproduce.summary import table

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue")
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
ABSENT = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")

CONF = """\
ClusterName=bench
SlurmctldHost={host}
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
NodeName={host} CPUs={cores} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def bench_folder(tmp_path):
    """Without the other tests' "'": Snakemake's quotes around one would let a job expand "$b"."""
    return tmp_path / "#1: {a} $b"


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
    """A controller and a node; commands find them by SLURM_CONF."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    cores = len(os.sched_getaffinity(0))
    facts = {"host": host, "user": getpass.getuser(), "ports": free_ports(2), "cores": cores}
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, **facts))
    (folder / "cgroup.conf").write_text("")
    # A job's step forgets SLURM_CONF, which a cluster doesn't need.
    (folder / "srun").write_text(
        f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n'
    )
    (folder / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{PATH}")
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    munge = [
        f"--{name}={folder}/munge.{name.split('-')[0]}"
        for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")
    ]
    lines = (
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", host],
    )
    with contextlib.ExitStack() as stack:
        daemons = []
        for line in lines:
            log = stack.enter_context((folder / f"{line[0]}.out").open("w"))
            daemons.append(subprocess.Popen(line, stdout=log, stderr=log))
            stack.callback(stop, daemons[-1])
            time.sleep(0.5)
        wait_for_node(daemons, folder)
        yield


def stop(daemon):
    daemon.terminate()
    daemon.wait(20)


def wait_for_node(daemons, folder):
    for _ in range(60):
        asked = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)
        if asked.stdout.strip() == "idle":
            return
        if any(daemon.poll() is not None for daemon in daemons):
            break
        time.sleep(0.5)
    logs = "\n".join(
        path.read_text() for path in sorted([*folder.glob("*.out"), *folder.glob("*.log")])
    )
    pytest.fail(f"no Slurm: {asked.stdout}{asked.stderr}\n{logs}")


def test_slurm_gives_the_values_of_a_local_run(bench, slurm, tmp_path):
    bench.content["networks"]["fcnn"]["seeds"] = 1
    del bench.content["tables"]["3"]["columns"]["test-error"]
    bench.write()
    plan = bench.plan()
    item = plan.items["convex-3"]
    local = replace(plan, results=tmp_path / "here" / "results", work=tmp_path / "here" / "work")
    (run,) = local.wanted(item.cells["fcnn", "rho1"])
    for step, subject in ((train, run.network), (attack, run), (measure, run)):
        step(local, subject)
    options = ["--slurm-status-command=squeue", "--slurm-init-seconds-before-status-checks=2"]
    resources = ["--default-resources", "mem_mb=1000", "runtime=10"]
    told = bench.run("convex-3", "--profile=slurm", "--snakemake", *options, *resources)
    assert told.count("has been submitted with SLURM jobid") == 3
    for subject in (run, run.network):
        here, there = read(local.record(subject)), read(plan.record(subject))
        assert there["values"] == here["values"]
        assert there["weights"] == here["weights"]
    assert read(plan.output(item))["rows"] == table(local, item)["rows"]
