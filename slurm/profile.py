"""What does a cluster want to know of a job, and what may a job take there? Reads the profiles in `slurm/clusters`."""

import difflib
import math
import re
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from slurm.cause import SAY_START

FOLDER = Path(__file__).parent / "clusters"
SBATCH_WORDS = {  # options of sbatch that go by another name here
    "time": "minutes",
    "mem": "memory_gb",
    "signal": "signal_seconds",
    "ntasks_per_node": "tasks_per_node",
    "gpus": "gpus_per_node",
    "array": "array_parallelism",
}
OF_THE_SWEEP = ("requeue", "no_requeue", "output", "error", "open_mode", "job_name", "chdir", "wrap")  # no profile sets these
GIVE: dict[Any, str] = {int: "a whole number", float: "a number", float | None: "a number", str: "text"}


@dataclass(frozen=True)
class Profile:
    """One job of a cluster: what it asks for, and how it is started. What is empty, or None, is not asked for."""

    name: str = ""
    description: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    gres: str = ""  # GPUs as `gpu:a100:1`, on clusters that want it so; else:
    gpus_per_node: int = 0
    nodes: int = 1
    tasks_per_node: int = 1  # one task a device
    cpus_per_task: int = 1
    memory_gb: float | None = None  # of one node, in Slurm's GB of 1024 MB
    minutes: int = 60  # time limit of one job; a run that needs longer goes on in the next
    signal_seconds: int = 120  # how long before that limit the job is told to save
    array_parallelism: int = 64  # elements of one array that run at a time
    max_array_elements: int = 1000  # of one array; Slurm allows MaxArraySize of them (`scontrol show config`)
    submit_every_seconds: float = 1.0  # pause between two submissions
    restarts_without_progress: int = 3  # of one run, before it is given up
    device: str = "cuda"  # cuda, cpu
    setup: tuple[str, ...] = ()  # lines of bash, before Python starts; the first that fails ends the job
    container: str = ""  # what Python is started with, such as `apptainer exec --nv image.sif`
    python: str = ""  # the interpreter; empty: the one that submits, or python3 of the container
    teraflops: float = 1.0  # sustained by one device: an assumption, from which device-hours are estimated
    additional: dict[str, Any] = field(default_factory=dict)  # further options of sbatch; true for one without a value

    def __post_init__(self) -> None:
        object.__setattr__(self, "setup", tuple(self.setup))
        for name in ("nodes", "tasks_per_node", "cpus_per_task", "minutes", "array_parallelism", "max_array_elements"):
            _least(name, getattr(self, name), 1)
        for name in ("gpus_per_node", "submit_every_seconds", "restarts_without_progress"):
            _least(name, getattr(self, name), 0)
        for name in ("memory_gb", "teraflops"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: give a number above 0")
        if not 1 <= self.signal_seconds < 60 * self.minutes:
            raise ValueError(
                f"signal_seconds is {self.signal_seconds}, in jobs of {self.minutes} minutes: "
                f"choose from 1 to {60 * self.minutes - 1}, long enough to save a checkpoint"
            )
        if self.device not in ("cuda", "cpu"):
            raise ValueError(f"device is {self.device!r}: choose one of cuda, cpu")
        for line in self.setup:
            if not isinstance(line, str):
                raise ValueError(f"setup holds {line!r}: give a list of lines of bash, quoted where they hold a colon")
        for option, value in self.additional.items():
            _check_additional(option, value)
        self._check_gpus()

    @property
    def world_size(self) -> int:
        """Tasks of one job, over all its nodes."""
        return self.nodes * self.tasks_per_node

    @property
    def python_command(self) -> str:
        """Shell text that starts Python in a job."""
        interpreter = shlex.quote(self.python or ("python3" if self.container else sys.executable))
        return f"{self.container} {interpreter}".strip()

    def sbatch_parameters(self, job_name: str, snapshot: Path) -> dict[str, Any]:
        """Keyword arguments for submitit's `SlurmExecutor.update_parameters`: a job that runs the code in `snapshot`."""
        asked = {
            "job_name": job_name,
            **{key: getattr(self, key) for key in ("partition", "account", "qos", "constraint", "gres", "gpus_per_node")},
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node,
            "cpus_per_task": self.cpus_per_task,
            "mem": _memory(self.memory_gb),
            "time": self.minutes,  # as a number: with text submitit's handler of signals fails
            "signal_delay_s": self.signal_seconds,
            "array_parallelism": self.array_parallelism,
            "setup": self.setup_lines(snapshot),
            "additional_parameters": {"requeue": True, **self.additional},
        }
        return {key: value for key, value in asked.items() if value not in (None, "", 0)}

    def setup_lines(self, snapshot: Path) -> list[str]:
        """Bash before Python starts. The snapshot comes last, or a set-up line (`module load`) could put other code before it."""
        threads = [f"export OMP_NUM_THREADS={self.cpus_per_task}"] if self.device == "cpu" else []
        return [
            "set -e",
            SAY_START,
            f"export SRUN_CPUS_PER_TASK={self.cpus_per_task}",  # from Slurm 22.05 on srun need not take over sbatch's
            *threads,
            *self.setup,
            f"export PYTHONPATH={shlex.quote(str(snapshot))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "export PYTHONSAFEPATH=1",  # or the folder that the job starts in would come before it
        ]

    def _check_gpus(self) -> None:
        if self.gres and self.gpus_per_node:
            raise ValueError(f"gres is {self.gres!r} and gpus_per_node {self.gpus_per_node}: give one of the two")
        asked = self.gres or self.gpus_per_node or any("gpu" in key for key in self.additional)
        if self.device == "cuda" and not asked:
            raise ValueError("device is cuda and no GPU is asked for: give gpus_per_node or gres, or set device to cpu")
        if self.device == "cuda" and 0 < self.gpus_per_node < self.tasks_per_node:
            raise ValueError(
                f"tasks_per_node is {self.tasks_per_node} and gpus_per_node {self.gpus_per_node}: "
                "each task needs a GPU, so give at least as many"
            )


def load_profile(name_or_path: str | Path) -> Profile:
    """A profile by name (`slurm/clusters/NAME.yaml`) or path; ValueError in one sentence if it is not there or not one."""
    given = str(name_or_path)
    path = Path(given) if given.endswith((".yaml", ".yml")) else FOLDER / f"{given}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise ValueError(f"there is no cluster profile {given!r}: give the path of a YAML file, or one of {known}")
    tree = {"name": path.stem, **_read(path)}
    try:
        profile = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Profile), _literally(tree)))
    except OmegaConfBaseException as error:
        raise ValueError(f"cluster profile {path}: {_one_sentence(error)}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"cluster profile {path}: {error}") from None
    assert isinstance(profile, Profile)
    return profile


def _read(path: Path) -> dict[str, Any]:
    """The settings that a file gives, as they stand in it: `${...}` in a set-up line is the shell's, not OmegaConf's."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as YAML ({reason}): mend or replace it") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}: give a mapping of keys to values")
    _check_text(path, text)
    known = [each.name for each in fields(Profile)]
    for key, value in tree.items():
        if key not in known:
            raise ValueError(f"cluster profile {path}: there is no setting {key}: {_meant(str(key), known)}")
        if value == "???":  # OmegaConf's word for a value that is still to come
            raise ValueError(f"cluster profile {path}: {key} is left open by ???: give a value")
    if not isinstance(tree.get("setup") or [], list):
        raise ValueError(f"cluster profile {path}: setup is {tree['setup']!r}: give a list of lines of bash, each behind a dash")
    return {key: value for key, value in tree.items() if value is not None}


def _check_text(path: Path, text: str) -> None:
    """Refuse what YAML reads without a word as something else: of a key given twice the last, of a time 12:00:00 its seconds."""
    keys = re.findall(r"^([\w-]+)\s*:", text, re.MULTILINE)
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"cluster profile {path}: {', '.join(twice)} is given more than once: keep one")
    if clock := re.search(r"\bminutes\s*:\s*(\d+:[\d:]+)", text):
        raise ValueError(f"cluster profile {path}: minutes is {clock[1]}: give a whole number of minutes")


def _meant(key: str, known: list[str]) -> str:
    word = key.replace("-", "_")
    close = [SBATCH_WORDS[word]] if word in SBATCH_WORDS else difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}, or give an option of sbatch in additional"


def _literally(value: Any) -> Any:
    """The same, escaped so that OmegaConf leaves its `${` alone."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, list):
        return [_literally(item) for item in value]
    return {key: _literally(item) for key, item in value.items()} if isinstance(value, dict) else value


def _one_sentence(error: OmegaConfBaseException) -> str:
    line, key = str(error).splitlines()[0], str(error.full_key or "").partition("[")[0]
    kind = {each.name: each.type for each in fields(Profile)}.get(key)
    return f"{key} cannot be set so ({line}): give {GIVE.get(kind, 'a mapping of options to values')}"


def _check_additional(option: str, value: Any) -> None:
    word = str(option).replace("-", "_")
    own = SBATCH_WORDS.get(word, word)
    if own in {each.name for each in fields(Profile)}:
        raise ValueError(f"additional sets {option}: set it as {own} of the profile")
    if word in OF_THE_SWEEP:
        raise ValueError(f"additional sets {option}, which the sweep itself needs: take it out")
    if value is False or not isinstance(value, str | int | float):
        raise ValueError(f"additional.{option} is {value!r}: give text, a number, or true for an option without a value")


def _least(name: str, value: float, low: int) -> None:
    if not low <= value < float("inf"):
        raise ValueError(f"{name} is {value}: choose a value of at least {low}")


def _memory(gigabytes: float | None) -> str | None:
    """As sbatch takes it: in whole GB, else in MB. Never 0, which would be all of a node's."""
    if gigabytes is None:
        return None
    return f"{gigabytes:.0f}GB" if gigabytes == int(gigabytes) else f"{math.ceil(gigabytes * 1024)}MB"
