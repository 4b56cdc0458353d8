"""What do the tests of `tsbench throughput` share? A tiny network, plain code, and a clock that only the work moves on."""

from bench.throughput import clock
from bench.throughput.entrant import Plain
from methods.naive import make_plain
from methods.naive_updates import loop_updates

SIZE = "2x16x2/8"
TINY = ("--size", SIZE, "--batch", "4", "--repeats", "2", "--seconds", "0", "--threads", "1")
PLAIN = Plain(make_plain, loop_updates)


class Time:
    """A clock that only the work moves on."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)

    def work(self, name, seconds):
        def run():
            self.log.append(name)
            self.now += seconds

        return run
