"""Are gradients sent while the backward pass goes on, and what is left where it fails?"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from test_averaging import SMALL, STEPS, VARIANTS, assert_unhooked, trainers_of
from test_ranks import on_ranks
from torch import Tensor, nn
from training import PROCESSES, differing, drawn, exit_codes_of, free_port, state_of, tiny_trainer

from bench import averaging
from bench.distributed import World, world_from_environment
from bench.trainer import Trainer

pytestmark = pytest.mark.xdist_group("averaging")  # its ranks are started once, not by every worker


class Event(NamedTuple):
    """What happened in a step: a gradient came, a message was posted, or a backward pass began or ended."""

    kind: str
    size: int = 0


@contextmanager
def recorded() -> Iterator[list[Event]]:
    """Inside, what happens; of messages those that are not waited for at once."""
    events: list[Event] = []
    plain_reduce, plain_backward, plain_averaging = dist.all_reduce, Tensor.backward, averaging.averaging

    def all_reduce(tensor: Tensor, *given: Any, async_op: bool = False, **named: Any) -> Any:
        if async_op:
            events.append(Event("message", tensor.numel()))
        return plain_reduce(tensor, *given, async_op=async_op, **named)

    def backward(loss: Tensor, *given: Any, **named: Any) -> None:
        events.append(Event("begin"))
        plain_backward(loss, *given, **named)
        events.append(Event("end"))

    def came(leaf: Tensor) -> None:
        events.append(Event("gradient", leaf.numel()))

    @contextmanager
    def watched(leaves: list[nn.Parameter], world: World, num_passes: int) -> Iterator[None]:
        hooks = [each.register_post_accumulate_grad_hook(came) for each in leaves]
        try:
            with plain_averaging(leaves, world, num_passes):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    with (
        mock.patch.object(dist, "all_reduce", all_reduce),
        mock.patch.object(Tensor, "backward", backward),
        mock.patch("bench.trainer.averaging", watched),
    ):
        yield events


def nth(kind: str, number: int, events: list[Event]) -> int:
    """The place of the first, second ... event of a kind."""
    return [index for index, event in enumerate(events) if event.kind == kind][number - 1]


def look_at_the_order(world: World, out: Path) -> None:
    """Of one step of each method: what was sent when."""
    for variant in VARIANTS:
        orders = []
        for trained in trainers_of(variant, world):
            batch = drawn(trained).part(trained.shares[0].rows)
            with mock.patch.object(averaging, "BUCKET_BYTES", SMALL), recorded() as events:
                trained.step(batch)
            orders.append(events)
        overlapped, plainly = orders
        sent = [event for event in overlapped if event.kind == "message"]
        assert sent == [event for event in plainly if event.kind == "message"] and len(sent) > 5, variant
        num_passes = trained.config.train.micro_batches
        assert [event.kind for event in plainly].index("message") > nth("end", num_passes, plainly), variant
        begun, ended = nth("begin", num_passes, overlapped), nth("end", num_passes, overlapped)
        kinds = [event.kind for event in overlapped]
        messages = [i for i, kind in enumerate(kinds) if kind == "message"]
        gradients = [i for i, kind in enumerate(kinds) if kind == "gradient"]
        assert begun < messages[0], variant  # one set of messages, in the last pass
        assert messages[0] < gradients[-1] < ended, variant
        after = [i for i in messages if i > ended]
        assert len(after) == (variant == "no gradient"), variant  # the bucket of what gets none
        assert sum(event.size for event in sent) * num_passes == sum(e.size for e in overlapped if e.kind == "gradient"), variant


def test_messages_start_while_the_last_backward_pass_goes_on_and_all_gradients_go_once(tmp_path: Path) -> None:
    on_ranks(2, look_at_the_order, tmp_path)


# Failures


class BackwardError(Exception):
    """Stands for what can happen in a backward pass: too little memory, say."""


@contextmanager
def failing_backward(trained: Trainer) -> Iterator[None]:
    """When the backward pass comes to the first block, after messages of the last ones."""

    def fail(*_: Any) -> None:
        raise BackwardError

    hook = next(trained.method.network.blocks[0].parameters()).register_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def fail_and_go_on(world: World, out: Path) -> None:
    """All ranks fail in one step; another step is then as if nothing had been."""
    states = []
    for fails in (False, True):
        trained = tiny_trainer("dense", *STEPS, world=world)
        batch = drawn(trained).part(trained.shares[0].rows)
        with mock.patch.object(averaging, "BUCKET_BYTES", SMALL):
            if fails:
                with failing_backward(trained), recorded() as events, pytest.raises(BackwardError):
                    trained.step(batch)
                kinds = [event.kind for event in events]
                assert "message" in kinds and "end" not in kinds
                assert_unhooked(trained)
            trained.step(batch)
        assert_unhooked(trained)
        states.append(state_of(trained))
    assert not differing(*states)


def test_a_backward_pass_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    on_ranks(2, fail_and_go_on, tmp_path)


def fail_alone(rank: int, size: int, port: int) -> None:
    """The last rank fails in its backward pass and ends; the others wait for its gradients."""
    environment = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with mock.patch.dict("os.environ", environment), world_from_environment(torch.device("cpu")) as world:
        trained = tiny_trainer("dense", *STEPS, world=world)
        with mock.patch.object(averaging, "BUCKET_BYTES", SMALL):
            trained.step(drawn(trained).part(trained.shares[0].rows))
            batch = drawn(trained, 1).part(trained.shares[0].rows)
            if rank == size - 1:
                with failing_backward(trained):
                    trained.step(batch)
            with pytest.raises(RuntimeError):
                trained.step(batch)
            assert_unhooked(trained)


@pytest.mark.parametrize("size", [2, 3])
def test_where_one_rank_fails_in_its_backward_pass_the_others_end_too(size: int) -> None:
    port = free_port()
    ranks = [PROCESSES.Process(target=fail_alone, args=(rank, size, port)) for rank in range(size)]
    for process in ranks:
        process.start()
    assert exit_codes_of(ranks) == [*[0] * (size - 1), 1]
