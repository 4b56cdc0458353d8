"""How is a method trained? One set-up and one loop for all of them; which method it is, is never asked."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from bench import measuring, saving, switches
from bench.adamw import AdamW
from bench.ahead import Ahead
from bench.allocator import keep_freed_memory
from bench.averaging import average, averaging
from bench.budget import Budget, plan
from bench.compiled import begin_step, compile_blocks
from bench.config import RunConfig
from bench.data import DataSource
from bench.data.resident import keep_on_device
from bench.distributed import Agreement, World, gradient_norm
from bench.ema import EMA
from bench.flops import Cost
from bench.flops import measure as measure_cost
from bench.heldout import make_heldout_set
from bench.journal import Journal, Record
from bench.learning_rate import lr_factor
from bench.method import Method, Outer, offered
from bench.objective import make_objective
from bench.progress import TrainingBar
from bench.randomness import Batch
from bench.recompute import recompute_blocks
from bench.sharding import is_sharded
from bench.shares import draw_step, losses_of_all, mean, num_passes, shares_of

SAVES_APART = 20  # times what the last checkpoint took: so long, at least, the next one by time is waited for


class Interrupted(RuntimeError):
    """A run was asked to stop before its end. Its last checkpoint holds all that it has done."""


def never() -> bool:
    return False


class Trainer:
    """Trains `method` in place. With a `folder`, it logs, saves, and resumes from what it finds there.

    `experts`: train only the steps of these intervals, as a job of its own; by default all. `should_stop` is asked at
    every step: when it is true on any rank, all save at the same step and raise Interrupted. `only_scored`: for what was trained
    before, of which it holds one network, the averages where there are some; it is neither trained nor saved.
    """

    def __init__(
        self,
        method: Method,
        config: RunConfig,
        data: DataSource,
        folder: Path | None = None,
        world: World | None = None,
        cost: Cost | None = None,
        experts: frozenset[int] | None = None,
        should_stop: Callable[[], bool] = never,
        only_scored: bool = False,
    ) -> None:
        self.config, self.data, self.folder, self.experts, self.should_stop = config, data, folder, experts, should_stop
        self.world = world or World()
        self.device = torch.device(config.system.device)
        self.intervals = tuple(i for i in method.intervals if experts is None or i.index in experts)
        torch.set_num_threads(config.train.threads)
        self.method = method.to(self.device)
        self.objective = make_objective(config.diffusion, config.model, method)
        self.objective.module.to(self.device)
        image_shape = (data.channels, data.input_size, data.input_size)
        self.cost = cost or measure_cost(method, image_shape)
        self.is_sharded = is_sharded(method)
        switches.set_plain(switches.parse(config.system.plain))
        if self.device.type == "cpu":
            keep_freed_memory(switches.is_on("memory"))
        compile_blocks(method, config.system.compile, self.device)
        if config.system.recompute:  # after the cost, of which it is no part
            recompute_blocks(method)
        self.num_passes = num_passes(config.train, self.world.size)
        self.budget: Budget = plan(config.budget, self.cost, config.train.batch_size, self.num_passes)
        self.shares = shares_of(config.train, method, self.world)
        groups = method.param_groups(config.train.lr)
        loss_parameters = list(self.objective.module.parameters())
        if loss_parameters:
            groups.append({"params": loss_parameters, "lr": config.diffusion.uncertainty_lr})
        betas = (config.train.beta1, config.train.beta2)
        kernel = {"fused": True} if switches.is_on("optimizer") else {"foreach": False}
        self.outer: dict[nn.Parameter, Outer] = {}  # this step's gradients that are no parameter's `.grad`
        self.optimizer = AdamW(groups, self.outer, betas=betas, weight_decay=config.train.weight_decay, **kernel)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.only_scored = only_scored
        self.ema = EMA(method, 0 if only_scored else config.train.ema_half_life_images, config.train.ema_warmup)
        continuous = config.diffusion.objective == "flow"
        self.heldout = make_heldout_set(config.heldout, data, config.diffusion.num_timesteps, continuous)
        self.steps_done = 0
        self.updates = [0] * len(method.intervals)  # optimiser steps, or parts of steps, of each interval
        self.device_seconds = 0.0  # spent training, over all devices
        self.lost = {"images": 0, "device_seconds": 0.0}  # work that crashes undid
        self.heldout_points = 0
        self.last_save, self.save_seconds = time.monotonic(), 0.0
        self.journal = Journal(folder if self.world.is_main else None, self.world)
        self.bar = TrainingBar(config.label or config.method, self.world.is_main)

    # One step

    def step(self, *batches: Batch) -> dict[str, Tensor]:
        """One optimiser step on already drawn batches, one of each of this rank's `shares`; the loss and its terms, as tensors.

        Raises Diverged if a loss term, a penalty or the gradient's norm is not finite.
        """
        assert not self.only_scored
        intervals = batches[0].intervals_of_step or (batches[0].interval,)
        expected = len(self.shares), self.config.train.intervals_per_step
        assert (len(batches), len(intervals)) == expected, "one batch of each share, which name all intervals if they are several"
        batches = tuple(batch.to(self.device) for batch in batches)
        self.optimizer.zero_grad(set_to_none=True)
        begin_step(self.config.system.compile)
        shares = [self._train_on(batch, len(batches), len(intervals) == 1) for batch in batches]
        if len(intervals) > 1:
            average(self.parameters, self.world)
        norm, t = gradient_norm(self.parameters, self.outer.values()), torch.cat([batch.t for batch in batches])
        passes = [samples for share in shares for _, samples in share]
        samples = {name: torch.cat([part[name] for part in passes]) for name in passes[0]}  # each (B,)
        of_intervals = losses_of_all([mean([losses for losses, _ in share]) for share in shares], len(intervals), self.world)
        for interval, losses in zip(intervals, of_intervals, strict=True):
            losses["grad_norm"] = norm
            self.journal.record(Record(interval, self.steps_done, losses, samples, t))
        if self.device.type == "cpu":  # elsewhere looking would wait for the device: see `flush`
            self.journal.check_finite()
        factor = lr_factor(self.config.train, batches[0].progress, self.steps_done * self.config.train.batch_size)
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor
        self.optimizer.step()
        self.ema.update(self.config.train.batch_size, self.outer)
        for interval in intervals:
            self.updates[interval.index] += 1
        self.steps_done += 1
        return mean(of_intervals)

    def _train_on(self, batch: Batch, num_shares: int, is_common: bool) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """The passes of one share's batch; its gradients are averaged over ranks here if its interval is common to them."""
        num_parts, of_loss = self.config.train.micro_batches, self.objective.module.parameters()
        ranks = self.world if is_common else World()
        outer = self.outer if is_common and switches.is_on("outer") else None  # what is added up or sent later is made whole
        with (
            offered(self.method, outer),
            self.method.one_step(batch.interval) as leaves,
            averaging([*leaves, *of_loss], ranks, num_parts),
        ):
            return [self._backward(part, num_parts * num_shares) for part in batch.cut(num_parts)]

    def _backward(self, part: Batch, num_parts: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add a micro-batch's gradients; its mean losses by name, and the terms of each sample."""
        x_t = self.objective.noised(part.x0, part.t, part.noise)
        bf16 = self.config.train.precision == "bf16"
        caches = not self.config.system.recompute  # it would hold copies of all weights
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16, cache_enabled=caches):
            prediction = self.method(x_t, part.t, part.y, part.interval, part.progress)
        terms = self.objective.terms(prediction.output, x_t, part)
        loss = self.objective.loss(terms, part.t)
        total = torch.stack([loss, *(penalty.float() for penalty in prediction.penalties.values())]).sum()
        (total / num_parts).backward()
        samples = {name: term.detach() for name, term in terms.items()}
        means = {name: term.mean() for name, term in samples.items()}
        penalties = {f"penalty/{name}": penalty.detach() for name, penalty in prediction.penalties.items()}
        return {"loss": loss.detach(), **means, **penalties}, samples

    # The loop

    def fit(self) -> None:
        """Train until the budget is spent, from the last checkpoint in the folder if there is one. Raises Interrupted when
        asked to stop, with everything saved.
        """
        if self.device.type == "cuda":  # what an earlier run of this process took is not this one's
            torch.cuda.reset_peak_memory_stats(self.device)
        self.resume()
        data = keep_on_device(self.data, self.device, self.config.system.resident_gb)
        draw = partial(draw_step, method=self.method, own=self.intervals, shares=self.shares, config=self.config, data=data)
        stop = Agreement(self.world)
        with self.bar, Ahead(draw, early=self.device.type == "cuda" and data is self.data) as batches:
            while not self.finished():
                if stop.ask(self.should_stop()):
                    stop.settle()
                    self.save_for_later()
                measuring.measure_if_due(self)
                started = time.perf_counter()
                drawn = batches.take(self.steps_done)
                if drawn:
                    self.step(*(batch._replace(progress=self.spent) for batch in drawn))
                else:
                    self.steps_done += 1
                due = self.steps_done % self.config.system.log_every == 0
                if due or measuring.is_due(self):
                    self.journal.check_finite()  # on a GPU this waits for the steps so far: part of their time
                self._count_time(time.perf_counter() - started)
                if due:
                    self.flush()
                if due and not self.finished():  # at the end one is saved when it is measured
                    self.save_if_due()
        stop.settle()
        measuring.measure_if_due(self)
        self.flush()
        self.save()

    def save_for_later(self) -> NoReturn:
        """Leave everything as the step to come needs it; raises Interrupted on all ranks, once it is saved."""
        self.journal.check_finite()
        with self.world.together():
            self.journal.heartbeat({**self.place(), "lost": self.lost})
        self.save()
        raise Interrupted(f"stopped after step {self.steps_done}; everything is saved")

    @property
    def spent(self) -> float:
        """The part of the budget that is spent, in [0, 1]."""
        return self.budget.progress(self.steps_done, self.device_seconds)

    @property
    def steps_trained(self) -> int:
        """Of those done: all, but where `experts` are trained alone."""
        return sum(self.updates) // self.config.train.intervals_per_step

    @property
    def images_seen(self) -> int:
        return self.steps_trained * self.config.train.batch_size

    @property
    def train_flops(self) -> float:
        return self.steps_trained * self.cost.train_flops(self.config.train.batch_size, self.num_passes)

    def _count_time(self, seconds: float) -> None:
        self.device_seconds += seconds * self.world.size
        if self.budget.num_steps is None:  # the clock decides what comes next: rank 0's, for all
            self.device_seconds = self.world.agree(self.device_seconds, self.device)

    def finished(self) -> bool:
        return self.spent >= 1

    def flush(self) -> None:
        """Write what was recorded since the last time, and refuse to go on with numbers that are not finite."""
        self.journal.check_finite()
        lr = self.optimizer.param_groups[0]["lr"]
        with self.world.together():  # rank 0's disk may be full
            loss = self.journal.flush(self.place(), lr)
            self.journal.heartbeat({**self.place(), "lost": self.lost})
        images_per_second = self.images_seen / self.device_seconds if self.device_seconds else 0.0
        self.bar.update(self.spent, images_per_second, loss)

    def place(self) -> dict[str, Any]:
        """How far training is."""
        return {
            "step": self.steps_done,
            "images_seen": self.images_seen,
            "train_flops": self.train_flops,
            "device_seconds": round(self.device_seconds, 3),
        }

    # State

    def save_if_due(self) -> None:
        every, seconds = self.config.system.checkpoint_every, self.config.system.checkpoint_every_seconds
        by_steps = every > 0 and self.steps_done // every > (self.steps_done - self.config.system.log_every) // every
        by_time = time.monotonic() - self.last_save > max(seconds, SAVES_APART * self.save_seconds)
        if self.world.decide(by_steps or by_time, self.device):
            self.save()

    def save(self) -> None:
        """A checkpoint of everything that the next step depends on. (Generators need none: they are seeded by step.)"""
        assert not self.only_scored
        started = time.monotonic()
        saving.save(self)
        self.last_save = time.monotonic()
        self.save_seconds = self.last_save - started

    def prepare_to_train(self) -> None:
        """Where it was only to be scored, and that cannot be: with weights and averages, which the caller loads."""
        if self.only_scored:
            self.only_scored = False
            self.ema = EMA(self.method, self.config.train.ema_half_life_images, self.config.train.ema_warmup)

    def restore(self) -> None:
        """Take the newest sound checkpoint's state, to evaluate it; ValueError if there is none."""
        if saving.take_newest(self) is None:
            raise ValueError(f"{self.folder} holds no checkpoint yet: train the run first")

    def resume(self) -> None:
        """Continue from the newest sound checkpoint; without one, from the start."""
        counters = saving.take_newest(self)
        with self.world.together():
            heartbeat = self.journal.last_heartbeat()
            self.journal.rewind(counters["journal"] if counters else None)
            if heartbeat:  # it knows what earlier crashes undid, too; written at once, as the next may come before the next flush
                images = max(0, heartbeat["images_seen"] - self.images_seen)
                seconds = max(0.0, heartbeat["device_seconds"] - self.device_seconds)
                before = heartbeat["lost"]
                self.lost = {"images": before["images"] + images, "device_seconds": before["device_seconds"] + seconds}
                self.journal.heartbeat({**self.place(), "lost": self.lost})
