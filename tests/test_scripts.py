"""The launchers of scripts/, on this machine alone: two "nodes" are two launches on its loopback."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from launching import config, flags, log

from drelu_timm.train import train

ROOT = Path(__file__).parents[1]
# What SLURM does, on one machine: a task a node, which scancel can signal, and srun kills on SIGTERM.
SRUN = """#!/usr/bin/env bash
trap 'kill -KILL "${tasks[@]}"' TERM
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
    SLURM_NODEID=$node "$@" & tasks+=($!)
    echo $! >> "$TASKS"
done
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""
SCANCEL = """#!/usr/bin/env bash
[[ "$*" == "--signal=TERM $SLURM_JOB_ID.0" ]] && kill -TERM $(cat "$TASKS")
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" > "$REQUEUED"; fi
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Starts scripts/train.slurm as a job of two nodes with one process each."""
    for name, script in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_PER_NODE": "h200:1",
        "SLURM_JOB_ID": str(os.getpid()),
        "REQUEUED": str(tmp_path / "requeued"),
        "TASKS": str(tmp_path / "tasks"),
        "OMP_NUM_THREADS": "1",
    }

    def start(arguments):
        (tmp_path / "tasks").unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", "scripts/train.slurm", *arguments],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


def test_two_nodes_of_slurm_are_preempted_and_go_on_to_what_one_process_gives(tmp_path, slurm):
    two = config(tmp_path / "two", objective="trades", epochs=40)
    process = slurm(flags(two))
    while not list((tmp_path / "two").glob("state/epoch-*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert "SIGTERM came: saved after epoch" in errors
    assert (tmp_path / "requeued").read_text().startswith("requeue ")
    assert not (tmp_path / "two" / "model").exists()

    process = slurm(flags(two))  # as SLURM starts the job again
    printed, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert printed.count("next: drelu-timm evaluate") == 1
    train(replace(two, output_dir=tmp_path / "one"))
    one, two = (log(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 40
    assert two[0]["train"]["loss"] == pytest.approx(one[0]["train"]["loss"], rel=0.01)  # the nodes' config says bf16
    assert two[-1]["held_out"]["clean"] == pytest.approx(one[-1]["held_out"]["clean"], abs=0.05)
