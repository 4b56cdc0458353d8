"""Is a request to stop remembered, and nothing else done about it?"""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from bench.stopping import StopFlag

NUMBERS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers_put_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in NUMBERS]
    yield
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


def test_nothing_was_asked_yet() -> None:
    assert not StopFlag()() and not StopFlag().listen(*NUMBERS)()


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_a_signal_is_remembered(number: int) -> None:
    stop = StopFlag().listen(*NUMBERS)
    os.kill(os.getpid(), number)
    assert stop() and stop() and stop.received == [number]


def test_others_are_not_listened_to() -> None:
    heard: list[int] = []
    signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    stop = StopFlag().listen(signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert heard == [signal.SIGUSR2] and not stop()


def test_what_is_interrupted_goes_on() -> None:
    """What waits for a line still gets it, as what writes a file gets to its end."""
    stop, (reading, writing) = StopFlag().listen(signal.SIGTERM), os.pipe()

    def signal_twice_and_write() -> None:
        for number in (1, 2):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            end = time.monotonic() + 60
            while len(stop.received) < number and time.monotonic() < end:
                time.sleep(0.05)
        os.write(writing, b"line")

    (other := threading.Thread(target=signal_twice_and_write)).start()
    line = os.read(reading, 100)
    other.join()
    os.close(reading), os.close(writing)
    assert line == b"line" and stop.received == [signal.SIGTERM] * 2


def test_a_second_ctrl_c_ends_at_once_and_a_second_warning_does_not() -> None:
    stop = StopFlag().listen(signal.SIGINT, signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop()
