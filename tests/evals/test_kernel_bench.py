"""The benchmark of the kernels: every way of a case computes the same, and the table says what was measured."""

from __future__ import annotations

import json

import pytest
import torch

from tokenprune.evals import kernel_bench
from tokenprune.evals.kernel_cases import CASES
from tokenprune.evals.side_by_side import CONTROL, side_by_side


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("tokens", [16, 37])
def test_every_way_computes_the_same(op, tokens):
    for case in CASES[op](tokens, torch.device("cpu"), torch.float32):
        results = {name: way() for name, way in case.ways.items()}
        assert {"naive", "torch", case.chosen} <= set(results)
        if op == "packed_attention":
            results["torch"] = unpadded(results["torch"], results["naive"].shape[0])
        first = results.pop("naive")
        for name, result in results.items():
            torch.testing.assert_close(result, first, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def unpadded(padded, total):
    """[B, H, longest, D] to [T, H, D], the lengths 30% to 90% of the longest over 0.9."""
    batch, longest = padded.shape[0], padded.shape[2]
    for tokens in range(longest, 2 * longest):
        lengths = [round(tokens * s) for s in torch.linspace(0.3, 0.9, batch, dtype=torch.float64).tolist()]
        if sum(lengths) == total and max(lengths) == longest:
            return torch.cat([image[:, :n].transpose(0, 1) for image, n in zip(padded, lengths, strict=True)])
    raise AssertionError("no such lengths")


@pytest.mark.parametrize("chosen_path", ["class_attention", "attention_mass"])
def test_memory_is_of_the_path_and_not_of_the_naive_map(chosen_path):
    table = kernel_bench.bench_kernels([chosen_path], [128], sample_seconds=0, attempts=1, longest=30)
    one_map = 16 * 8 * 128 * 128 * 4 / 2**20
    for row in table.rows:
        assert row["tokens"] == 128
        if row["way"] == "naive":
            assert one_map <= row["extra_mb"] <= 2.2 * one_map
        if row["chosen"]:
            assert row["extra_mb"] <= 0.8 * one_map


def test_what_takes_too_long_or_does_not_fit_has_a_note_and_no_numbers(monkeypatch):
    monkeypatch.setattr(kernel_bench, "_free_bytes", lambda device: 1000)
    table = kernel_bench.bench_kernels(["class_attention"], [16], sample_seconds=0, attempts=1)
    naive = next(row for row in table.rows if row["way"] == "naive")
    assert "do not fit" in naive["note"]
    assert "ms" not in naive
    assert all("over_naive" not in row for row in table.rows)
    table = kernel_bench.bench_kernels(["cosine_match"], [16], sample_seconds=0, attempts=1, longest=0.01)
    assert "a call takes" in next(row for row in table.rows if row["way"] == "naive")["note"]


def test_what_is_far_too_slow_is_not_called_with_more_tokens(monkeypatch):
    called = []

    def timed(way, *_):
        called.append(way)
        return 40.0 if len(called) <= 2 else 0.0  # the second call tells a slow way from one that was loaded

    monkeypatch.setattr(kernel_bench, "sample", timed)
    table = kernel_bench.bench_kernels(["class_attention"], [32, 16], sample_seconds=0, attempts=1, longest=3)
    naive = [row for row in table.rows if row["way"] == "naive"]
    assert [(row["tokens"], row["note"]) for row in naive] == [
        (16, "a call takes 40 s"),
        (32, "a call with 16 tokens takes 40 s"),
    ]
    assert len(called) == len(table.rows)


@pytest.mark.parametrize("slow", [("torch",), ("naive", "torch", "eager")])
def test_where_torch_takes_too_long_the_others_are_timed_without_it(monkeypatch, slow):
    (case,) = CASES["class_attention"](16, torch.device("cpu"), torch.float32)
    named = {id(way): name for name, way in case.ways.items()}
    monkeypatch.setattr(kernel_bench, "CASES", {"class_attention": lambda *_: [case]})
    monkeypatch.setattr(kernel_bench, "sample", lambda way, *_: 9.0 if named[id(way)] in slow else 0.0)
    rows = {row["way"]: row for row in kernel_bench.bench_kernels(["class_attention"], [16], sample_seconds=0).rows}
    assert all((rows[way]["note"] == "a call takes 9 s") == ("ms" not in rows[way]) == (way in slow) for way in rows)
    assert all("over_torch" not in row for row in rows.values())
    assert [way for way, row in rows.items() if row.get("control")] == ([] if len(slow) == 3 else list(rows))


def test_the_command_writes_table_and_plot(tmp_path, capsys):
    run = ["--quick", "--op", "class_attention", "--tokens", "16", "--tokens", "32", "--output", str(tmp_path)]
    assert kernel_bench.main(run) == 0
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert [(row["tokens"], row["way"]) for row in rows] == [
        (tokens, way) for tokens in (16, 32) for way in ("naive", "torch", "eager")
    ]
    assert [row["way"] for row in rows if row["chosen"]] == ["eager", "eager"]
    assert all(row["over_torch"] == 1 for row in rows if row["way"] == "torch")
    assert "| class_attention |" in (tmp_path / "kernels.md").read_text()
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_known_ratios_come_out_of_turns():
    now, calls = [0.0], []

    def way(name, cost):
        def run():
            calls.append(name)
            now[0] += cost * (1 + now[0] / 100)  # a machine that slows down

        return run

    ways = {"a": way("a", 1.0), "b": way("b", 0.25), "c": way("c", 3.0)}
    found = side_by_side(ways, "a", rounds=24, clock=lambda: now[0], sample_seconds=0)
    assert found.ratio("b", "a").estimate == pytest.approx(0.25, rel=0.1)
    assert found.ratio("c", "b").estimate == pytest.approx(12, rel=0.1)
    assert found.control == pytest.approx(1, abs=0.1)
    assert {len(seconds) for seconds in found.seconds.values()} == {24}
    assert set(found.seconds) == {"a", "b", "c", CONTROL}
    with pytest.raises(ValueError, match="at least 20"):
        side_by_side(ways, "a", rounds=3)
