"""How does an expert train in a job of its own?

Where no two intervals share a parameter, each expert's job takes the steps that joint training would give it and needs
nothing of the others. It works in `experts/<index>` of the run's folder as a run does in its own, and leaves `done`
last. `bench.assemble` makes one run of them.
"""

from pathlib import Path

from bench import checkpoint
from bench.config import RunConfig, content_hash, scientific_part
from bench.files import make_folder, read_yaml, write_json_atomically, write_text_atomically
from bench.method import Method
from bench.run_folder import summary_of
from bench.runs import Run, read_metric_rows
from bench.runs import expert_is_trained as is_trained
from bench.trainer import Trainer

COSTS = ("images_seen", "train_images_per_second", "device_seconds", "peak_memory_bytes")  # what its summary tells


def check(config: RunConfig, method: Method) -> None:
    """ValueError in one sentence unless the experts of this run can be trained apart."""
    if not method.independent_experts:
        raise ValueError(
            "system.experts is separate_jobs, but the intervals of this method share parameters: set it to together, "
            "or choose a method of independent experts"
        )
    if config.budget.unit == "device_seconds":
        raise ValueError(
            "system.experts is separate_jobs, but jobs that do not communicate cannot share a budget of device_seconds: "
            "choose budget.unit=images or train_flops, or system.experts=together"
        )
    if shown := method.diagnostics():
        raise ValueError(
            f"system.experts is separate_jobs, but what this method shows over training ({', '.join(shown)}) takes all of its "
            "experts at once: set it to together"
        )


def check_folder(config: RunConfig, folder: Path) -> None:
    """ValueError if the run in this folder was begun in the other way and is not done, or is another run."""
    if (folder / "config.yaml").exists():
        check_same(config, folder)
    if (folder / "done").exists():
        return
    separate, apart = config.system.experts == "separate_jobs", (folder / "experts").is_dir()
    begun = apart or any((folder / "checkpoints").glob("step-*"))
    if begun and apart != separate:
        begun_with = "separate_jobs" if apart else "together"
        raise ValueError(f"run {folder.name} was begun with system.experts={begun_with}: go on so, or delete its folder")


def begin(config: RunConfig, folder: Path) -> None:
    """Make the run known before its first expert begins: whoever looks at the folder sees which run it is."""
    make_folder(folder / "experts")
    if not (folder / "config.yaml").exists():
        write_text_atomically(folder / "config.yaml", config.to_yaml())


def train_expert(trainer: Trainer) -> None:
    """Train to the end what `trainer` (of one expert, in that expert's folder) is there for, from its last checkpoint.

    The caller holds the folder, which has its configuration and provenance. All ranks take part.
    """
    folder = trainer.folder
    assert folder is not None and len(trainer.intervals) == 1
    trainer.fit()
    with trainer.world.together():
        if trainer.world.is_main:
            summary = summary_of(trainer, initial_flops=0.0)
            write_json_atomically(folder / "summary.json", {name: summary[name] for name in COSTS})
            _read_back(trainer, folder)
            write_text_atomically(folder / "done", "")


def all_done(folder: Path, num_experts: int) -> bool:
    return all(is_trained(folder, index) for index in range(num_experts))


def final_checkpoint(trainer: Trainer, place: Path) -> checkpoint.Checkpoint:
    """Of an expert at the end of its training; ValueError if it is not there yet."""
    found = checkpoint.load_latest(place / "checkpoints")
    steps_done = found.counters["steps_done"] if found else 0
    if found is None or steps_done != trainer.budget.num_steps:
        raise ValueError(
            f"the expert in {place} is at step {steps_done} of {trainer.budget.num_steps}, though it should be at its end: "
            "delete the file `done` there, if there is one, and train it again"
        )
    return found


def check_same(config: RunConfig, folder: Path) -> None:
    """ValueError if a folder holds another run."""
    if content_hash(scientific_part(read_yaml(folder / "config.yaml"))) != content_hash(config.scientific):
        raise ValueError(f"{folder} holds another run than {config.run_id}: choose another folder, or delete it")


def _read_back(trainer: Trainer, place: Path) -> None:
    """Every artefact is there and can be read; only then is an expert done."""
    final_checkpoint(trainer, place)
    run = Run(place)
    if not (run.summary and run.provenance and read_metric_rows(place)):
        raise ValueError(f"summary.json, provenance.json or metrics.jsonl in {place} is empty: delete it and train again")
    check_same(trainer.config, place)
