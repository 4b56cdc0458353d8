"""Does freed memory stay with the process where it should, and only there?"""

import subprocess
import sys

import pytest
from training import tiny_trainer

from bench import trainer

BLOCK = 256 << 20  # bytes: far above what the C library would keep by itself
FREED = f"""
import re, sys, torch
from pathlib import Path
from bench.allocator import keep_freed_memory, return_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

torch.set_num_threads(1)
keep_freed_memory(sys.argv[1] == "keep")
before = resident()
for _ in range(2):
    block = torch.ones({BLOCK}, dtype=torch.uint8)
    del block
kept = resident() - before
return_freed_memory()
print(kept, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("how", ["keep", "give back"])
def test_freed_blocks_are_kept_where_asked_and_can_be_given_back(how):
    done = subprocess.run([sys.executable, "-c", FREED, how], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert (kept > 0.9 * BLOCK) == (how == "keep")
    assert left < 0.1 * BLOCK


def test_a_trainer_on_a_cpu_does_as_the_switch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    monkeypatch.setattr(trainer, "keep_freed_memory", told.append)
    for settings in ((), ("system.plain=memory",), ("system.plain=ema",)):
        tiny_trainer("dense", *settings)
    assert told == [True, False, True]
