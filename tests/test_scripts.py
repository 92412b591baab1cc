"""Launchers of scripts/ on one machine: two "nodes" are two launches on the loopback interface."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launching import STEP, config, flags, held_at, log, wait_for

from drelu_timm.train import train

ROOT = Path(__file__).parents[1]
# Imitation of SLURM on one machine: one task per node, which scancel can signal and srun kills on SIGTERM.
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


# Replacement for `accelerate launch`: records its arguments, then waits for SIGTERM, or fails.
NOTED = f"""#!{sys.executable}
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with open(os.environ["TASKS"] + ".of-node-" + os.environ["SLURM_NODEID"], "w") as file:
    file.write(" ".join(sys.argv[1:]))
while "--fail" not in sys.argv:
    signal.pause()
sys.exit(3)
"""
# `accelerate launch` with processes that the test can stop.
HELD = f"""#!/usr/bin/env bash
shift
exec {sys.executable} -m accelerate.commands.launch "${{@/#drelu_timm/held}}"
"""


@pytest.fixture
def slurm(tmp_path):
    """Start scripts/train.slurm as a job of two nodes with one process each."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "tests"),
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_PER_NODE": "h200:1",
        "SLURM_JOB_ID": str(os.getpid()),
        "REQUEUED": str(tmp_path / "requeued"),
        "TASKS": str(tmp_path / "tasks"),
    }

    def start(accelerate: str, arguments: list[str], variables: dict[str, str] | None = None) -> subprocess.Popen:
        for name, script in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, "accelerate": accelerate}.items():
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        (tmp_path / "tasks").unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", "scripts/train.slurm", *arguments],
            cwd=ROOT,
            env=environment | (variables or {}),
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


def test_a_slurm_job_starts_one_process_per_node_and_is_requeued_when_preempted(tmp_path, slurm):
    job = slurm(NOTED, ["--model", "x y"])
    nodes = [tmp_path / f"tasks.of-node-{node}" for node in range(2)]
    for node in nodes:
        wait_for(node, job)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate()
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n", errors
    port = 20000 + os.getpid() % 20000
    for rank, node in enumerate(nodes):
        assert node.read_text() == (
            f"launch --config_file scripts/multi_node.yaml --num_machines 2 --num_processes 2 --machine_rank {rank} "
            f"--main_process_ip 127.0.0.1 --main_process_port {port} -m drelu_timm train --model x y --resume"
        )


def test_a_failed_slurm_job_is_not_requeued(tmp_path, slurm):
    job = slurm(NOTED, ["--fail"])
    job.communicate()
    assert job.returncode == 3
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_two_preempted_slurm_nodes_resume_to_the_result_of_one_process(tmp_path, slurm):
    two = config(tmp_path / "two", objective="trades", epochs=10)
    job = slurm(HELD, flags(two), held_at(STEP, 12, tmp_path / "reached"))
    wait_for(tmp_path / "reached", job)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate()
    assert "SIGTERM arrived: saved after epoch 1, step 6" in errors
    assert (tmp_path / "requeued").read_text().startswith("requeue ")
    assert not (tmp_path / "two" / "model").exists()

    job = slurm(HELD, flags(two))  # as SLURM starts the job again
    printed, errors = job.communicate()
    assert job.returncode == 0, errors
    assert printed.count("next: drelu-timm evaluate") == 1
    train(replace(two, output_dir=tmp_path / "one"))
    one, two = (log(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 10
    assert two[0]["train"]["loss"] == pytest.approx(one[0]["train"]["loss"], rel=0.01)  # the nodes' config has bf16
    assert two[-1]["held_out"]["clean"] == pytest.approx(one[-1]["held_out"]["clean"], abs=0.05)
