"""Where one rank works or fails alone, do all end at once with a sentence, and can the same command go on from there?"""

import errno
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from command import TINY
from test_distributed import free_port
from test_ranks import on_ranks
from test_sharding import sharded_trainer
from training import PROCESSES, differing, exit_codes_of, saved

from bench import (
    assemble,
    checkpoint,
    distributed,
    experts,
    job,
    journal,
    measuring,
    run_folder,
    sample,
    sharded_checkpoint,
    sharded_run,
    streaming,
)
from bench.distributed import World, world_from_environment
from bench.files import read_json
from bench.lease import Held, LeaseLost
from bench.sample import Sampler
from bench.trajectory import Film

pytestmark = pytest.mark.xdist_group("ranks")  # its ranks are started once, not by every worker

SECONDS = 600  # in which all have ended, on a busy machine too; a message would wait for 30 minutes
FULL = OSError(errno.ENOSPC, "No space left on device")
OFTEN = ("system.log_every=1", "system.checkpoint_every=1")
SHARDED = ("system.shard=full", "system.checkpoint_every=1")
APART = ("method=multi_expert", "options.experts=2", "system.experts=separate_jobs")


class Failure(NamedTuple):
    """What fails on one rank after `num_before` calls."""

    module: Any
    name: str
    settings: tuple[str, ...] = ()
    rank: int = 0
    error: Exception = FULL
    num_before: int = 0
    told_in: str | None = "."  # the folder, inside the run's, whose failure.json tells it


FAILURES = {
    "a data set that one machine lacks": Failure(job, "load_data", rank=1, error=ValueError("no folder"), told_in=None),
    "a run that one machine knows otherwise": Failure(experts, "check_folder", rank=1, error=ValueError("begun"), told_in=None),
    "a library that one machine lacks": Failure(job, "make_sampler", rank=1, error=ValueError("no library"), told_in=None),
    "weights that one machine lacks": Failure(job, "_initial_method", rank=1, error=ValueError("no file"), told_in=None),
    "the run folder": Failure(run_folder, "prepare_folder", told_in=None),
    "the first held-out loss": Failure(journal.Journal, "write"),
    "weights that are kept": Failure(measuring, "keep_weights", ("evaluation.curve_every=1",)),
    "a line of metrics.jsonl": Failure(journal.Journal, "flush", OFTEN),
    "the second heartbeat": Failure(journal, "write_json_atomically", OFTEN, num_before=1),
    "the first checkpoint": Failure(checkpoint, "save_file", OFTEN),
    "the last checkpoint": Failure(checkpoint, "save_file", OFTEN, num_before=1),
    "summary.json": Failure(job, "write_json_atomically"),
    "a look inside": Failure(run_folder, "write_bytes_atomically"),
    "samples": Failure(Sampler, "_draw_blocks", rank=1),
    "the film of the first samples": Failure(Film, "trajectory"),
    "a round of samples": Failure(sample, "write_bytes_atomically", ("evaluation.block_size=1",)),
    "a round that is seen": Failure(streaming, "write_bytes_atomically", ("evaluation.block_size=1", "system.keep_samples=10")),
    "reading it all back": Failure(job, "read_back", error=ValueError("eval.json is missing or empty")),
    "done": Failure(job, "write_text_atomically"),
    "the folder of experts": Failure(experts, "make_folder", APART, told_in=None),
    "the summary of an expert": Failure(experts, "write_json_atomically", APART, told_in="experts/0"),
    "experts that are assembled": Failure(assemble, "write_text_atomically", APART),
    "the checkpoint of the whole": Failure(checkpoint, "save_file", APART, num_before=2),
}


def passed_on(error: Exception, rank: int) -> str:
    """What the other of two ranks says: a pattern."""
    said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return f"^rank {1 - rank} stops because rank {rank} failed: {re.escape(said)}$"


@contextmanager
def failing(failure: Failure) -> Iterator[None]:
    plain, calls = getattr(failure.module, failure.name), []

    def fail(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) > failure.num_before:
            raise failure.error
        return plain(*given, **named)

    with mock.patch.object(failure.module, failure.name, fail):
        yield


def go(folder: Path, world: World, *settings: str) -> None:
    job.run(job.make_config({}, [*TINY, *settings]), folder, world)


def fail_and_go_on(world: World, out: Path) -> None:
    """What one of two ranks does."""
    undisturbed = {settings: out / f"undisturbed {len(settings)}" for settings in ((), APART)}
    for settings, folder in undisturbed.items():
        go(folder, world, *settings)
    for name, failure in FAILURES.items():
        folder, own = out / name, world.rank == failure.rank
        message = f"^{re.escape(str(failure.error))}$" if own else passed_on(failure.error, failure.rank)
        started = time.monotonic()
        with pytest.raises(type(failure.error) if own else ValueError, match=message):
            if own:
                with failing(failure):
                    go(folder, world, *failure.settings)
            else:
                go(folder, world, *failure.settings)
        assert time.monotonic() - started < SECONDS, name
        world.barrier()  # nothing is under way
        left = [path.name for path in folder.rglob("*") if ".tmp" in path.name]
        assert not left and not (folder / "done").exists(), (name, left)
        if failure.told_in:
            told = read_json(folder / failure.told_in / "failure.json", dict)
            assert told["state"] == "failed" and str(failure.error) in told["cause"], (name, told)
        world.barrier()
        go(folder, world, *failure.settings)
        assert (folder / "done").exists() and not (folder / "failure.json").exists(), name
        expected = undisturbed[APART if failure.settings == APART else ()]
        assert not differing(saved(expected)[0], saved(folder)[0]), name


def lose_it(world: World, out: Path) -> None:
    """Rank 0 finds, once it is trained, that another process has taken the run over."""

    def should_stop() -> bool:
        if world.is_main and (out / "run" / "summary.json").exists():
            raise LeaseLost("taken over")
        return False

    message = "^taken over$" if world.is_main else passed_on(LeaseLost("taken over"), 0)
    with pytest.raises(LeaseLost if world.is_main else ValueError, match=message):
        job.run(job.make_config({}, TINY), out / "run", world, should_stop)
    assert not (out / "run" / "failure.json").exists()  # it is another's


def find_it_held(world: World, out: Path) -> None:
    """By a process that happens to be the other rank."""
    with run_folder.locked(out / "run") if world.rank == 1 else mock.MagicMock():
        world.barrier()
        with pytest.raises(Held):
            go(out / "run", world)
        world.barrier()


def find_it_trained(world: World, out: Path) -> None:
    """By another job, while the network was built in parts; and it was not scored."""
    folder, build = out / "run", job._initial_method
    go(folder, world, *SHARDED)
    if world.is_main:
        (folder / "done").rename(folder / "done.later")
        (folder / "eval.json").unlink()
    world.barrier()

    def build_slowly(*given: Any) -> Any:
        if world.is_main:
            (folder / "done.later").rename(folder / "done")
        return build(*given)

    with (
        mock.patch.object(job, "_initial_method", build_slowly),
        pytest.raises(Held, match=r"^run run was trained meanwhile by another job: start it again to score it$"),
    ):
        go(folder, world, *SHARDED)
    assert not (folder / "failure.json").exists() and not (folder / "eval.json").exists()
    world.barrier()
    with mock.patch.object(sharded_run, "make_empty", wraps=sharded_run.make_empty) as empty:
        go(folder, world, *SHARDED)
    assert empty.call_count == 1 and (folder / "eval.json").exists()  # no rank draws as a whole what is to be restored


def save_by_an_old_listing(world: World, out: Path) -> None:
    """Rank 1 is shown its own part alone, though it could read the other."""
    trainer = sharded_trainer("dense", folder=out / "run", world=world)
    names = sharded_checkpoint._names
    with mock.patch.object(sharded_checkpoint, "_names", lambda folder: names(folder)[world.rank :]):
        sharded_checkpoint.save(trainer)
    (path,) = sharded_checkpoint.list_checkpoints(out / "run")
    assert len(names(path)) == 2
    assert sharded_checkpoint.load_latest(trainer) is not None  # its digests are of both


def tell_in_one_line(world: World, out: Path) -> None:
    """Whatever the first rank that failed has said."""
    told = re.escape("rank 1 stops because rank 0 failed: RuntimeError: the first second ") + "x{200,300}"
    with pytest.raises(ValueError if world.rank else RuntimeError, match=f"^{told}$" if world.rank else "first\nsecond"):  # noqa: SIM117
        with world.together():
            if world.is_main:
                raise RuntimeError("the first\nsecond " + 1000 * "x")
    with pytest.raises(ZeroDivisionError if world.rank else MemoryError), world.together():  # each its own
        if world.is_main:
            raise MemoryError
        1 / 0  # noqa: B018


def wait_long(rank: int, port: int) -> None:
    """Where messages may take a second, rank 0 works alone for two, and the other dies while rank 0 waits for it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with world_from_environment(torch.device("cpu")) as world:
        distributed.dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=1))
        with world.together():
            time.sleep(2 * (1 - rank))
        started = time.monotonic()
        with pytest.raises(RuntimeError), world.together():
            if rank == 1:
                time.sleep(2)
                os._exit(7)
        assert time.monotonic() - started < SECONDS


def test_ranks_wait_long_for_one_that_works_and_not_for_one_that_has_died() -> None:
    port = free_port()
    ranks = [PROCESSES.Process(target=wait_long, args=(rank, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    assert exit_codes_of(ranks) == [0, 7]


def test_what_fails_on_one_rank_ends_the_run_on_all_and_the_same_command_goes_on(tmp_path: Path) -> None:
    on_ranks(2, fail_and_go_on, tmp_path)


def test_a_run_that_is_lost_while_it_is_scored_ends_on_all_ranks(tmp_path: Path) -> None:
    on_ranks(2, lose_it, tmp_path)


def test_a_run_in_parts_that_another_job_trains_meanwhile_is_refused_on_all_ranks(tmp_path: Path) -> None:
    on_ranks(2, find_it_trained, tmp_path)


def test_a_rank_with_an_old_listing_of_the_parts_makes_no_damaged_checkpoint(tmp_path: Path) -> None:
    on_ranks(2, save_by_an_old_listing, tmp_path)


def test_the_others_tell_why_the_first_rank_failed_in_one_line(tmp_path: Path) -> None:
    on_ranks(2, tell_in_one_line, tmp_path)


def test_that_a_run_is_held_by_another_all_ranks_know(tmp_path: Path) -> None:
    on_ranks(2, find_it_held, tmp_path)
