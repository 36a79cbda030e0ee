import pytest
import torch

from tokenprune.evals.throughput import measure, measure_together, waiting_clock


class FakeMachine:
    """A clock that only the arms move, so that a known cost must come out exactly."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def clock(self):
        return self.now

    def arm(self, name, cost):
        def run():
            self.order.append(name)
            self.now += cost() if callable(cost) else cost

        return run


def test_known_ratio_comes_out():
    machine = FakeMachine()
    timing = measure(
        machine.arm("A", 0.011), machine.arm("B", 0.0044), machine.arm("C", 0.011), clock=machine.clock, rounds=24
    )
    assert timing.speedup.estimate == pytest.approx(2.5)
    assert (timing.speedup.low, timing.speedup.high) == pytest.approx((2.5, 2.5))
    assert timing.control == pytest.approx(1.0)
    assert timing.trusted
    assert timing.attempts == 1
    assert timing.forwards_per_sample == 2
    assert timing.seconds == pytest.approx(0.011)
    assert timing.seconds_patched == pytest.approx(0.0044)
    assert timing.peak_memory is None
    assert timing.peak_memory_patched is None


def test_a_machine_that_slows_down_steadily_does_not_bend_the_ratio():
    machine = FakeMachine()

    def drifting(cost):
        return lambda: cost * (1.0 + machine.now)

    timing = measure(
        machine.arm("A", drifting(0.02)),
        machine.arm("B", drifting(0.01)),
        machine.arm("C", drifting(0.02)),
        clock=machine.clock,
        rounds=24,
    )
    assert timing.speedup.estimate == pytest.approx(2.0, rel=0.02)
    assert timing.trusted


def test_every_order_is_used_equally_often():
    machine = FakeMachine()
    arms = [machine.arm(name, 1.0) for name in "ABC"]
    measure(*arms, clock=machine.clock, rounds=24, warmup=0)
    rounds = ["".join(machine.order[i : i + 3]) for i in range(3, len(machine.order), 3)]
    assert len(rounds) == 24
    assert {order: rounds.count(order) for order in set(rounds)} == dict.fromkeys(
        ["ABC", "ACB", "BAC", "BCA", "CAB", "CBA"], 4
    )


def test_a_control_that_is_off_is_repeated_and_then_marked():
    machine = FakeMachine()
    timing = measure(
        machine.arm("A", 1.0), machine.arm("B", 0.5), machine.arm("C", 1.05), clock=machine.clock, attempts=3
    )
    assert not timing.trusted
    assert timing.attempts == 3
    assert timing.control == pytest.approx(1 / 1.05)


def test_a_noisy_start_is_measured_again():
    machine = FakeMachine()
    calls = [0]

    def settling():
        calls[0] += 1
        return 1.5 if calls[0] < 15 else 1.0

    timing = measure(machine.arm("A", 1.0), machine.arm("B", 0.5), machine.arm("C", settling), clock=machine.clock)
    assert timing.trusted
    assert timing.attempts == 2
    assert timing.control == pytest.approx(1.0)


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="at least 20"):
        measure(lambda: None, lambda: None, lambda: None, rounds=5)


def test_cuda_is_synchronised_around_each_sample(monkeypatch):
    machine = FakeMachine()
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waits.append(machine.now))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 7)
    arms = [machine.arm(name, 1.0) for name in "ABC"]
    timing = measure(*arms, clock=machine.clock, rounds=20, warmup=0, device="cuda")
    assert len(waits) == 2 * (3 + 3 * 20) + 4
    assert timing.peak_memory == 7


def test_a_waiting_clock_is_read_when_the_device_has_done_its_work(monkeypatch):
    machine = FakeMachine()
    work = machine.arm("work", 1.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: work())
    assert waiting_clock("cuda", machine.clock)() == pytest.approx(1.0)
    assert waiting_clock("cpu", machine.clock)() == pytest.approx(1.0)


def test_many_arms_are_timed_in_turn():
    machine = FakeMachine()
    costs = {"A": 0.004, "B": 0.008, "C": 0.002, "A'": 0.005}
    base, slow, fast, control = measure_together([machine.arm(*arm) for arm in costs.items()], 4, clock=machine.clock)
    assert [timing.speedup.estimate for timing in (base, slow, fast)] == pytest.approx([1, 0.5, 2])
    assert control.control == slow.control == pytest.approx(0.8)
    assert slow.cells() == pytest.approx(
        {"speedup": 0.5, "speedup_low": 0.5, "speedup_high": 0.5, "control": 0.8, "trusted": False}
    )
    rounds = ["".join(machine.order[start : start + 4]) for start in range(4, len(machine.order), 4)]
    assert rounds == ["ABCA'", "AA'CB", "CA'AB", "CBAA'"]
