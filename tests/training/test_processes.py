"""Under `accelerate launch`: two processes are one with twice the batch, and a command is killed and goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenprune.training.state import FILE

SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from families import build, images
from tokenprune.training import train
model = build("class_token")
data = images(model, 24), (torch.arange(24) + int(sys.argv[3])) % 5
train(model, data, flops=0.6, batch_size=int(sys.argv[1]), epochs=2, output=sys.argv[2])
"""


@pytest.mark.full
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    # Without MPI accelerate's launcher starts one process on CPUs; told by the environment, it is one of several.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The last two: a finished training is gone on from by both processes, and refused by both with other labels.
    for processes, batch, shift in ((1, 8, 0), (2, 4, 0), (2, 4, 0), (2, 4, 1)):
        command = [*launch, str(tmp_path / "script.py"), str(batch), str(tmp_path / str(processes)), str(shift)]
        running = []
        for rank in range(processes):
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            own = {**environment, **{name: str(value) for name, value in told.items()}}
            own = own if processes > 1 else environment
            running.append(subprocess.Popen(command, env=own, stderr=subprocess.PIPE, text=True))
        errors = [process.communicate(timeout=300)[1] for process in running]
        assert [process.returncode == 0 for process in running] == [shift == 0] * processes, errors
        assert all(("of a training on other labels" in error) == (shift > 0) for error in errors)
    one, two = (load_file(tmp_path / str(processes) / FILE) for processes in (1, 2))
    assert one[".history"].shape == (6, 3)
    torch.testing.assert_close(two[".history"], one[".history"], rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "2" / "learned.json").read_text())["found"]["processes"] == 2
    learned = [name for name in one if name.startswith(".learned")]
    assert len(learned) == 8
    for name in learned:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_a_command_that_is_killed_outright_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tokenprune.cli", "train", "digits-vit", "--method", "ltmp", "--flops", "0.6"]
    command += ["--samples", "32", "--batch-size", "4", "--save-every", "1", "--quiet", "--output"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, str(whole)], check=True, capture_output=True, timeout=300)
    running = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (killed / FILE).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    done = len(load_file(killed / FILE)[".history"])
    assert 1 <= done < 8
    subprocess.run([*command, str(killed)], check=True, capture_output=True, timeout=300)
    first, second = (load_file(folder / "learned.safetensors") for folder in (whole, killed))
    assert len(first) == 20
    assert all(torch.equal(first[name], second[name]) for name in first)
