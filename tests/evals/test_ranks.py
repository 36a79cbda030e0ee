"""Several processes give what one gives, to the last bit; one that dies ends the others, which name it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks as processes
import sharded
import torch

from tokenprune import cli
from tokenprune.errors import TokenPruneError
from tokenprune.evals import rank_line, ranks
from tokenprune.evals.rank_line import Line
from tokenprune.evals.ranks import ALONE, Ranks

EXAMPLES = Path(__file__).parents[2] / "examples"

# An evaluation whose images take their time: each tells of itself by a file.
SLOW = """
import signal, sys, time
from pathlib import Path
import torch
from tokenprune import cli
from tokenprune.evals import evaluate, rank_line, ranks
from tokenprune.evals.data import ImageData

rank_line.SIGN, rank_line.SILENCE = float(sys.argv[2]) / 20, float(sys.argv[2])

class Slow(torch.utils.data.Dataset):
    def __getitem__(self, index):
        (Path(sys.argv[1]) / f"{ranks.launched()[0]}").touch()
        time.sleep(0.1)
        return torch.zeros(3, 8, 8), index % 2

def run(options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    evaluate(model, ImageData("slow", Slow(), 10**6, 2), [], batch_size=4, transform=print, baselines=False)

signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell that is no terminal's
cli._run = run
sys.exit(cli.main(["eval", "--model", "none"]))
"""


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Runs work(Ranks) as so many ranks, each a thread of this process, and gives what each returned or raised."""
    monkeypatch.setattr(rank_line, "SIGN", 0.05)
    monkeypatch.setattr(rank_line, "SILENCE", 0.6)
    monkeypatch.setattr(ranks, "PIECE", 100)

    def run(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
        store, results = torch.distributed.HashStore(), [None] * count
        monkeypatch.setattr(rank_line, "_store", lambda rank, count, run: store)

        def one(rank: int) -> None:
            line = Line(rank, count, 0)
            try:
                results[rank] = work(Ranks(rank, count, line))
                if not line._over.is_set():  # one that plays dead
                    line.leave()
            except Exception as error:
                line.stop(error)
                results[rank] = error

        running = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(20)
        assert not any(thread.is_alive() for thread in running)
        return results

    return run


@pytest.mark.parametrize("items", [0, 1, 2, 3, 8])
def test_parts_are_joined_in_the_order_of_the_items(threads: Callable[..., list[Any]], items: int) -> None:
    def work(here: Ranks) -> Any:
        own = here.own(list(range(items)))
        first = here.joined([str(item) * 70 for item in own], lambda parts: (here.rank, parts))
        return first, here.joined(own, sum), here.from_main(lambda: here.rank)

    expected = (0, [str(item) * 70 for item in range(items)]), sum(range(items)), 0
    assert threads(3, work) == [expected] * 3
    assert work(ALONE) == expected


def test_an_error_in_one_stops_all_and_names_it(threads: Callable[..., list[Any]]) -> None:
    def work(here: Ranks) -> Any:
        if here.rank == 1:
            raise FileNotFoundError("no pictures")
        return here.joined([here.rank], sum)

    first, second, third = threads(3, work)
    assert isinstance(second, FileNotFoundError)
    for other in (first, third):
        assert isinstance(other, TokenPruneError)
        assert str(other) == "rank 1 of 3 stopped: FileNotFoundError: no pictures"


@pytest.mark.parametrize("dead", [0, 2])
def test_one_that_gives_no_sign_is_named_by_all_others(threads: Callable[..., list[Any]], dead: int) -> None:
    def work(here: Ranks) -> Any:
        assert here.line is not None
        if here.rank == dead:
            here.line._over.set()
            time.sleep(1.5)
            return None
        return here.from_main(lambda: time.sleep(1.2)) if here.rank else here.joined([0], sum)

    results = threads(3, work)
    for rank, result in enumerate(results):
        if rank != dead:
            assert f"rank {dead} of 3 has given no sign of life for 0.6 s" in str(result), rank


def test_one_that_never_comes_is_named(threads: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_line, "ABSENCE", 0.3)
    absent = lambda here: here.joined([], sum) if here.rank == 0 else here.line._over.set() or time.sleep(1)  # noqa: E731
    monkeypatch.setattr(Line, "_sign", lambda self, sign=Line._sign: sign(self) if self.rank == 0 else None)
    assert "rank 1 of 2 has not come within 0.3 s" in str(threads(2, absent)[0])


def test_a_store_that_never_answers_is_given_up(threads: Callable[..., list[Any]]) -> None:
    line = None

    def work(here: Ranks) -> Any:
        nonlocal line
        if here.rank == 1:
            line = here.line
            here.line.ask(lambda: time.sleep(3))
        return here.joined([], sum)

    assert "rank 0 of 2 has not answered for" in str(threads(2, work)[1])


def test_two_processes_find_what_one_finds(tmp_path: Path, capfd: Any) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    running = processes.start(2, sharded.__file__, two)
    expected = json.loads(json.dumps(sharded.found(one)))
    shown = capfd.readouterr().out
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], [error[-2000:] for _, error in outputs]
    for rank in range(2):
        results = json.loads((two / f"{rank}.json").read_text())
        assert results.keys() == expected.keys()
        for what, result in results.items():
            assert result == expected[what], (rank, what)
    told = [json.loads(text) for text in (shown, outputs[0][0])]
    assert outputs[1][0] == "", "what is shown is shown once"
    assert told[1]["environment"].pop("processes") == 2
    assert told[0] == told[1] == {**json.loads((one / sharded.TABLE).read_text())}
    assert json.loads((two / sharded.TABLE).read_text())["rows"] == told[0]["rows"]
    assert (two / "search" / "state.pt").exists()


@pytest.mark.full
def test_two_processes_find_what_one_finds_of_other_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sharded_hub  # and with it diffusers and transformers

    from tokenprune.evals import generation

    monkeypatch.setattr(generation, "REAL_IMAGES", 40)
    folders = [tmp_path / str(rank) for rank in range(3)]
    for folder in folders:
        folder.mkdir()
    running = [
        subprocess.Popen(
            [sys.executable, sharded_hub.__file__, str(folder)], env=told, stderr=subprocess.PIPE, text=True
        )
        for folder, told in zip(folders, processes.environments(2), strict=False)
    ]
    expected = json.loads(json.dumps(sharded_hub.found(folders[2])))
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    for rank in range(2):
        results = json.loads((folders[rank] / f"{rank}.json").read_text())
        assert results.keys() == expected.keys()
        for what, result in results.items():
            assert result == expected[what], (rank, what)


def kill_one(
    tmp_path: Path, count: int, dead: int, silence: float, by: int = signal.SIGKILL
) -> list[tuple[float, int | None, str]]:
    """Kill a process of an evaluation outright: of each other one the seconds until it ended, its code, its words."""
    (tmp_path / "slow.py").write_text(SLOW)
    running = processes.start(count, tmp_path / "slow.py", tmp_path, silence)
    try:
        while not all((tmp_path / str(rank)).exists() for rank in range(count)):
            assert all(process.poll() is None for process in running), [p.communicate()[1] for p in running]
            time.sleep(0.05)
        running[dead].send_signal(by)
        start, told = time.monotonic(), []
        for rank, process in enumerate(running):
            if rank != dead:
                _, error = process.communicate(timeout=60)
                told.append((time.monotonic() - start, process.returncode, error))
        return told
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_a_process_that_is_killed_ends_the_other_which_names_it(tmp_path: Path) -> None:
    [(seconds, code, error)] = kill_one(tmp_path, 2, dead=1, silence=5.0)
    assert code == 1
    assert "tokenprune: error on rank 0: rank 1 of 2 has given no sign of life for 5 s" in error
    assert seconds < 30


@pytest.mark.full
def test_all_others_name_the_one_that_is_killed(tmp_path: Path) -> None:
    """Within a minute, as it is set."""
    for seconds, code, error in kill_one(tmp_path, 3, dead=1, silence=rank_line.SILENCE):
        assert code == 1
        assert "rank 1 of 3 has given no sign of life for 30 s" in error
        assert seconds < 60


@pytest.mark.full
def test_the_one_that_serves_is_named_when_it_is_killed(tmp_path: Path) -> None:
    [(seconds, code, error)] = kill_one(tmp_path, 2, dead=0, silence=rank_line.SILENCE)
    assert code == 1
    assert "rank 0 of 2 is gone" in error
    assert seconds < 60


@pytest.mark.full
def test_one_that_stands_still_counts_as_dead(tmp_path: Path) -> None:
    """Its machine is gone: nothing closes its connections."""
    for dead, words in ((1, "rank 1 of 2 has given no sign"), (0, "rank 0 of 2 has not answered for")):
        (tmp_path / words).mkdir()
        [(seconds, code, error)] = kill_one(tmp_path / words, 2, dead, silence=8.0, by=signal.SIGSTOP)
        assert code == 1
        assert words in error
        assert seconds < 30


def stub(folder: Path, name: str, script: str) -> None:
    """A program called `name`, in `folder`."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def torchrun(folder: Path) -> None:
    stub(folder, "torchrun", f'exec "{sys.executable}" -m torch.distributed.run "$@"')


def test_the_examples_start_what_they_say(tmp_path: Path) -> None:
    stub(tmp_path, "torchrun", 'echo "$@"')
    stub(tmp_path, "srun", 'shift; exec "$@"')
    stub(tmp_path, "scontrol", "echo first; echo second")
    told = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HEAD": "first", "NODE": "1", "PORT": "1"}
    told |= {"SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    for script, words in (
        ("two_nodes", "--nnodes 2 --node-rank 1 --nproc-per-node 1 --master-addr first --master-port 1"),
        ("slurm", "--nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-id 7 --rdzv-endpoint first:1"),
    ):
        command = ["bash", str(EXAMPLES / f"{script}.sh"), "--model", "digits-vit"]
        subprocess.run(["bash", "-n", command[1]], check=True)
        shown = subprocess.run(command, env=told, check=True, capture_output=True, text=True).stdout
        assert shown.startswith(f"{words} -m tokenprune.cli eval ")
        arguments = shown.split("tokenprune.cli ")[1].split()
        assert cli.parser().parse_args(arguments).model == "digits-vit"
    del told["HEAD"]
    missing = subprocess.run(["bash", str(EXAMPLES / "two_nodes.sh")], env=told, capture_output=True, text=True)
    assert missing.returncode != 0
    assert "HEAD" in missing.stderr


@pytest.mark.full
@pytest.mark.parametrize("script", ["two_nodes", "slurm"])
def test_two_nodes_on_this_machine_find_what_one_process_finds(tmp_path: Path, script: str) -> None:
    torchrun(tmp_path)
    stub(tmp_path, "srun", 'shift; exec "$@"')
    stub(tmp_path, "scontrol", "echo 127.0.0.1")
    told, port = processes.environments(1)[0], processes.environments(1)[0]["MASTER_PORT"]
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del told[name]
    command = ["--model", "digits-vit", "--samples", "50", "--batch-size", "16", "--method", "top_k", "--threads", "1"]
    command += ["--device", "cpu", "--output"]
    alone = [sys.executable, "-m", "tokenprune.cli", "eval", *command, str(tmp_path / "alone.json")]
    subprocess.run(alone, env=told, check=True, capture_output=True)
    told |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PORT": port, "HEAD": "127.0.0.1"}
    told |= {"SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}
    both = [
        subprocess.Popen(
            ["bash", str(EXAMPLES / f"{script}.sh"), *command, str(tmp_path / "both.json")],
            env={**told, "NODE": str(node)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    errors = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "both"))
    assert two["rows"] == one["rows"]
    assert two["environment"].pop("processes") == 2
    assert two["environment"] == one["environment"]


def test_commands_of_one_process_are_refused_in_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], threads: Any
) -> None:
    monkeypatch.setattr(rank_line, "_store", lambda rank, count, run: torch.distributed.HashStore())
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert cli.main(["bench", "--model", "digits-vit"]) == 1
    assert "bench is of one process and was started in 2" in capsys.readouterr().err
    assert cli.main(["eval", "--model", "lvlm-digits", "--rounds", "20", "--quiet"]) == 1
    assert "rounds=20 of timing are for one process" in capsys.readouterr().err


def test_a_variable_of_another_program_makes_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert ranks.launched() == (0, 1)
    with ranks.ranks() as here:
        assert here is ALONE
    assert ranks.own_device("cuda") == "cuda"
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert ranks.own_device("cuda") == "cuda:1"
    assert ranks.own_device("cpu") == "cpu"
