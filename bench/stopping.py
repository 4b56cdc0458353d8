"""How is a process asked to stop at the next moment at which nothing is lost?

Signal handlers do nothing but remember: what a signal interrupts may be in the middle of anything.
"""

import signal
from types import FrameType


class StopFlag:
    """Call it to learn whether the process was asked to stop."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def listen(self, *signals: int) -> "StopFlag":
        """From now on these signals are remembered. A second Ctrl-C does what it always does."""
        for number in signals:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        self.received.append(number)

    def __call__(self) -> bool:
        return bool(self.received)
