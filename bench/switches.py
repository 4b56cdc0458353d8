"""Which optimisations are on?

Each has a plain form that gives the same numbers up to rounding, and can be switched off by its name: in a run by
`system.plain`, around a piece of code by `without`. As with the number of threads, it holds for the whole process, until
the next trainer is made.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

SWITCHES = {
    "attention": "one fused kernel (in bf16 on a CPU, in training or without AMX: in pieces); plain: two products and a softmax",
    "optimizer": "AdamW as one fused kernel; plain: parameter after parameter",
    "ema": "the average of all parameters in one call; plain: parameter after parameter",
    "grouped": "experts as grouped matrix products; plain: expert after expert on its slice of the sorted rows",
    "pieces": "experts on a CPU, uncompiled: each through its whole MLP, some of its rows at a time; plain: all at once, grouped",
    "mixing": "bases as a matrix product, once for all passes of a step, whose gradients (and messages between ranks) are those "
    "of the mixed network; plain: multiplied and summed in every pass",
    "outer": "gradients that are outer products, those of bases, taken by AdamW as such; plain: made whole",
    "memory": "on a CPU freed memory stays with the process; plain: as the C library likes",
    "masks": "one linear per sample, mixed from its experts; plain: all experts, weighed and summed",
    "matching": "the assignment solved while the network runs, once for all passes of a step; plain: in every pass, afterwards",
    "overlap": "gradients go to the other ranks while the backward pass goes on; plain: afterwards, in the same messages",
}
_off: frozenset[str] = frozenset()


def is_on(name: str) -> bool:
    assert name in SWITCHES, name
    return name not in _off


def set_plain(names: Collection[str]) -> None:
    """From now on these are off, and all others on."""
    global _off
    _off = frozenset(names)


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Inside, these are off too. ValueError for a name that is none of them."""
    with only_off(_off | parse(",".join(names))):
        yield


@contextmanager
def only_off(names: Collection[str]) -> Iterator[None]:
    """Inside, these are off, and all others on."""
    before = _off
    set_plain(names)
    try:
        yield
    finally:
        set_plain(before)


def parse(names: str) -> frozenset[str]:
    """Of names with commas between them. ValueError for one that is no optimisation."""
    chosen = frozenset(name for name in names.split(",") if name)
    for name in sorted(chosen - SWITCHES.keys()):
        raise ValueError(f"{name!r} is no optimisation that can be switched off: choose from {', '.join(SWITCHES)}")
    return chosen
