"""What do our finished runs say of a published row?

A run belongs to a row if it has the settings that the suite gives the row, the seed aside, and is scored as the suite says.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.config import RunConfig
from bench.runs import Run, hash_of_settings
from bench.tables.fairness import TableRefusal, differing_fields

SCORING = ("extractor", "num_samples", "sampler", "steps", "eta", "guidance_scale", "guidance_channels")
COEFFICIENT = "alpha_basis"  # and the number of the basis, from 1: a metric of a row that is one expert


@dataclass
class OwnRuns:
    """The finished runs of a folder. `protocols` and `notes` gather what was used and what could not be."""

    runs: dict[str, list[Run]]  # by the hash of the settings
    configs: dict[str, dict[str, Any]]  # of the suite's runs, by id
    protocols: dict[str, Any] = field(default_factory=dict)  # hash -> protocol
    notes: list[str] = field(default_factory=list)

    def of(self, config: RunConfig) -> list[Run]:
        return self.runs.get(self.settings_hash(config), [])

    def settings_hash(self, config: RunConfig) -> str:
        """As `Run.config_hash`: the same for runs that differ in nothing but the seed."""
        return hash_of_settings(asdict(config), lambda run_id: self.configs.get(run_id, {}))

    def hash_of_run(self, run: Run) -> str:
        return hash_of_settings(run.config, lambda run_id: run.config_beside(run_id) or self.configs.get(run_id, {}))

    def values(self, config: RunConfig, metric: str, expert: int | None = None) -> list[float]:
        """One value a seed, of the runs that have it; `metric` is a cost, a score or, of an `expert`, a mixing coefficient."""
        found = [self._value(run, config, metric, expert) for run in self.of(config)]
        return [value for value in found if value is not None]

    def _value(self, run: Run, config: RunConfig, metric: str, expert: int | None) -> float | None:
        if metric.startswith(COEFFICIENT):
            diagnostic = run.diagnostics.get("mixing_coefficients")
            if diagnostic is None or diagnostic.axes != ("expert", "basis") or expert is None:
                return None
            return float(diagnostic.values[expert, int(metric.removeprefix(COEFFICIENT)) - 1])
        if metric == "train_steps_per_second":
            speed = run.summary.get("train_images_per_second")
            return None if speed is None else float(speed) / config.train.batch_size
        scores = self._scores(run, config)
        value = scores[metric] if metric in scores else run.summary.get(metric)
        return None if value is None else float(value)

    def _scores(self, run: Run, config: RunConfig) -> dict[str, float]:
        """Its scores under the suite's way of scoring; empty, with a note, if it was scored otherwise only."""
        wanted = {name: getattr(config.evaluation, name) for name in SCORING}
        fitting = [r for r in run.evaluations if all(r["protocol"].get(name) == wanted[name] for name in SCORING)]
        if not fitting:
            self._note(f"Run {run.run_id} is not scored as the suite says, so its scores are left out.")
            return {}
        self.protocols |= {record["protocol_hash"]: record["protocol"] for record in fitting}
        return dict(fitting[-1]["metrics"])

    @property
    def seeds_note(self) -> str:
        counts = [len(runs) for runs in self.runs.values()]
        if not counts:
            return ""
        how = "with three or more the mean ± its 95% interval (Student's t), with fewer all points"
        return f"Seeds per row: {min(counts)} to {max(counts)}; {how}."

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def check_protocols(self) -> None:
        """Refuse scores of two protocols; called when a section is complete, and begins the next."""
        hashes = sorted(self.protocols)
        if len(hashes) > 1:
            one, other = (self.protocols[name] for name in hashes[:2])
            raise TableRefusal(
                f"runs of one section were scored by the protocols {hashes[0]} and {hashes[1]}, which differ in "
                f"{'; '.join(differing_fields(one, other)) or 'their hash alone'}: score all with one protocol, or choose one "
                "by its hash"
            )
        self.protocols.clear()


def gather(runs: Iterable[Run], configs: Sequence[RunConfig]) -> OwnRuns:
    """The runs that have the settings of one of `configs`; those that are not done are named in a note."""
    own = OwnRuns(defaultdict(list), {config.run_id: asdict(config) for config in configs})
    wanted = {own.settings_hash(config) for config in configs}
    for run in runs:
        settings = own.hash_of_run(run)
        if settings not in wanted:
            continue
        if run.state == "done":
            own.runs[settings].append(run)
        else:
            own.notes.append(f"Run {run.run_id} is {run.state}, not done, and is left out.")
    return own
