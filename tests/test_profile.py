"""Does a job ask for what the profile says, and start with the code of its snapshot? Is a faulty profile one sentence?"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from slurm_cluster import Cluster
from submitit.slurm.slurm import _make_sbatch_string

from slurm.profile import FOLDER, Profile, load_profile
from slurm.snapshot import take_snapshot

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def options(script: str) -> dict[str, str]:
    """The options of a batch script; "" for those without a value."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))


def batch_script(profile: Profile, snapshot: Path, command: str = "true", folder: Path = Path("/logs")) -> str:
    return _make_sbatch_string(command=command, folder=folder, map_count=9, **profile.sbatch_parameters("sweep", snapshot))


def test_there_are_the_profiles_that_are_spoken_of() -> None:
    assert SHIPPED == ["a100", "h100", "local"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_is_a_job_that_bash_can_read(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name and profile.description and profile.world_size == 1
    script = batch_script(profile, Path("/code"))
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    found = options(script)
    assert found["time"] == str(profile.minutes) and found["signal"] == f"USR2@{profile.signal_seconds}"
    assert "requeue" in found and found["job-name"] == "sweep" and found["array"] == f"0-8%{min(9, profile.array_parallelism)}"
    assert ("gres" in found or "gpus-per-node" in found) == (profile.device == "cuda")
    text = (FOLDER / f"{name}.yaml").read_text()
    assert "Assumed" in text and "teraflops" in text, "says where the figure for estimates is from"


def test_all_that_a_profile_asks_for_is_asked_of_the_cluster(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "{partition: gpu, account: lab, qos: high, constraint: 'a100&nvlink', gres: 'gpu:a100:4', nodes: 2, tasks_per_node: 4, "
        "cpus_per_task: 8, memory_gb: 1.5, minutes: 720, signal_seconds: 240, array_parallelism: 7, "
        "additional: {exclusive: true, mail-type: FAIL, switches: 1}}",
    )
    profile = load_profile(path)
    found = options(batch_script(profile, Path("/code")))
    expected = {"partition": "gpu", "account": "lab", "qos": "high", "constraint": "'a100&nvlink'", "gres": "gpu:a100:4"}
    expected |= {"nodes": "2", "ntasks-per-node": "4", "cpus-per-task": "8", "mem": "1536MB", "time": "720"}
    expected |= {"signal": "USR2@240", "array": "0-8%7", "exclusive": "", "mail-type": "FAIL", "switches": "1", "requeue": ""}
    assert found | expected == found
    assert profile.world_size == 8 and profile.name == "mine"
    for gigabytes, asked in ((64, "64GB"), (0.9, "922MB"), (0.0001, "1MB")):
        assert Profile(device="cpu", memory_gb=gigabytes).sbatch_parameters("a", Path("/code"))["mem"] == asked


def test_what_is_not_given_is_not_asked_for(tmp_path: Path) -> None:
    """An empty option would be refused by the cluster, or ask for nothing where its default is something."""
    parameters = load_profile(write(tmp_path, "device: cpu\nqos:\nsetup:\n# - a comment\n")).sbatch_parameters("a", Path("/code"))
    assert set(parameters) & {"partition", "account", "qos", "constraint", "gres", "gpus_per_node", "mem"} == set()
    assert all(value not in (None, "", 0) for value in parameters.values())


def run_setup(profile: Profile, snapshot: Path, command: str, folder: Path, **environment: str) -> CompletedProcess[str]:
    """What the batch script does before srun, and then a command in its place."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    script = "\n".join([*profile.setup_lines(snapshot), command])
    return subprocess.run(["bash"], input=script, cwd=folder, env=kept | environment, text=True, capture_output=True, check=False)


@pytest.mark.parametrize("line", ["true", "export PYTHONPATH=/nowhere", "export PYTHONPATH=$HOME", "cd {edited}"])
def test_a_job_runs_the_code_of_its_snapshot(line: str, tmp_path: Path) -> None:
    """Not that of the folder that it starts in, of the environment, or of a set-up line."""
    for name in ("the snapshot's", "edited"):
        (tmp_path / name / "bench").mkdir(parents=True)
        (tmp_path / name / "bench/__init__.py").write_text(f"text = {name!r}")
        (tmp_path / name / "bench/__main__.py").write_text("import bench; print(bench.text)")
    edited = tmp_path / "edited"
    profile = Profile(device="cpu", setup=(line.format(edited=edited),))
    command = f"{profile.python_command} -u -m bench"
    for environment in ({}, {"PYTHONPATH": str(edited), "HOME": str(edited)}):
        done = run_setup(profile, tmp_path / "the snapshot's", command, edited, **environment)
        assert (done.stdout, done.stderr) == ("the snapshot's\n", "tsbench: start 1 of this job\n")


def test_set_up_ends_the_job_at_the_first_line_that_fails(tmp_path: Path) -> None:
    done = run_setup(Profile(device="cpu", setup=("echo one", "false", "echo two")), tmp_path, "echo started", tmp_path)
    assert done.returncode != 0 and done.stdout == "one\n"


def test_set_up_lines_are_the_shell_s_own(tmp_path: Path) -> None:
    """`${...}` is filled in by bash on the node, not by the reader of the YAML."""
    lines = ["export WHERE=${NODE_DISK:-/tmp}/${name%%.*}", r'echo "$WHERE \${kept} \\${name}" $((1 + ${#name}))', "# ${minutes"]
    profile = load_profile(write(tmp_path, json.dumps({"device": "cpu", "cpus_per_task": 3, "setup": lines})))
    assert profile.setup == tuple(lines)
    done = run_setup(profile, tmp_path, "echo $OMP_NUM_THREADS $SRUN_CPUS_PER_TASK", tmp_path, NODE_DISK="/disk", name="n.b")
    assert done.stdout == "/disk/n ${kept} \\n.b 4\n3 3\n"
    on_gpu = Profile(gpus_per_node=1, cpus_per_task=3)
    assert run_setup(on_gpu, tmp_path, "echo -$OMP_NUM_THREADS-", tmp_path, OMP_NUM_THREADS="").stdout == "--\n"


@pytest.mark.parametrize(
    ("settings", "command"),
    [
        ({}, sys.executable),
        ({"python": "/opt/my python"}, "'/opt/my python'"),
        ({"container": "apptainer exec --nv a.sif"}, "apptainer exec --nv a.sif python3"),
        ({"container": "apptainer exec --nv a.sif", "python": "/venv/bin/python"}, "apptainer exec --nv a.sif /venv/bin/python"),
    ],
)
def test_python_is_started_in_the_container(settings: dict[str, Any], command: str) -> None:
    assert Profile(device="cpu", **settings).python_command == command


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("time: 60", ("no setting time", "did you mean minutes?")),
        ("partitions: a", ("no setting partitions", "did you mean partition?")),
        ("mem: 64", ("memory_gb",)),
        ("ntasks-per-node: 2", ("tasks_per_node",)),
        ("colour: red", ("no setting colour", "minutes", "additional")),
        ("minutes: 0", ("minutes is 0", "at least 1")),
        ("minutes: 1.5", ("minutes cannot be set so", "give a whole number")),
        ("minutes: 12:00:00", ("minutes is 12:00:00", "a whole number of minutes")),
        ("minutes: '12:00:00'", ("minutes cannot be set so", "give a whole number")),
        ("minutes: ${x}", ("minutes cannot be set so",)),
        ("memory_gb: 64GB", ("memory_gb cannot be set so", "give a number")),
        ("memory_gb: 0", ("memory_gb is 0", "above 0")),
        ("memory_gb: .nan", ("memory_gb is nan",)),
        ("teraflops: -1", ("teraflops is -1",)),
        ("nodes: 0", ("nodes is 0",)),
        ("tasks_per_node: -1", ("tasks_per_node is -1",)),
        ("max_array_elements: 0", ("max_array_elements is 0",)),
        ("array_parallelism: 0", ("array_parallelism is 0",)),
        ("restarts_without_progress: -1", ("restarts_without_progress is -1",)),
        ("submit_every_seconds: .inf", ("submit_every_seconds is inf",)),
        ("{minutes: 2, signal_seconds: 120}", ("signal_seconds is 120, in jobs of 2 minutes", "1 to 119")),
        ("signal_seconds: 0", ("signal_seconds is 0",)),
        ("device: gpu", ("device is 'gpu'", "cuda, cpu")),
        ("{device: cuda, partition: gpu}", ("no GPU is asked for", "gpus_per_node or gres")),
        ("{gpus_per_node: 1, gres: 'gpu:1'}", ("gres is 'gpu:1' and gpus_per_node 1", "one of the two")),
        ("{device: cuda, gpus_per_node: 2, tasks_per_node: 4}", ("tasks_per_node is 4 and gpus_per_node 2",)),
        ("setup: module load cuda", ("setup is 'module load cuda'", "a list of lines")),
        ("setup: {module: load}", ("setup is {'module': 'load'}", "a list of lines")),
        ("setup: [{module: load}]", ("setup holds {'module': 'load'}", "colon")),
        ("partition: [a, b]", ("partition cannot be set so", "give text")),
        ("partition: ???", ("partition is left open",)),
        ("additional: exclusive", ("additional cannot be set so", "a mapping")),
        ("additional: {time: 60}", ("additional sets time", "minutes of the profile")),
        ("additional: {cpus-per-task: 60}", ("additional sets cpus-per-task", "cpus_per_task of the profile")),
        ("additional: {no-requeue: true}", ("additional sets no-requeue", "take it out")),
        ("additional: {exclusive: false}", ("additional.exclusive is False", "true for an option without a value")),
        ("additional: {mail-type: [END]}", ("additional.mail-type is ['END']",)),
        ("- minutes", ("holds a list",)),
        ("3", ("holds a int",)),
        ("", ("no GPU is asked for",)),
        ("{minutes: 1", ("cannot be read as YAML",)),
        ("minutes: 1\nminutes: 2", ("minutes is given more than once",)),
        ("description: \xff", ("cannot be read as YAML",)),
    ],
)
def test_a_faulty_profile_is_one_sentence(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(str(path))}[^\n]*$") as refusal:
        load_profile(path)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_a_profile_that_is_not_there_is_one_sentence() -> None:
    for name in ("a1000", "/nowhere/mine.yaml"):
        with pytest.raises(ValueError, match=rf"^there is no cluster profile '{name}': [^\n]* one of a100, h100, local$"):
            load_profile(name)


@pytest.mark.slurm
def test_a_real_cluster_runs_the_snapshot_and_it_is_written_down(cluster: Cluster, tmp_path: Path) -> None:
    """Two elements of an array, in a folder with edited code; each tells its provenance."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/__init__.py").write_text("raise SystemExit('edited')")
    snapshot = take_snapshot(ROOT, tmp_path / "store")
    profile = load_profile("local")
    tell = "import json, bench.provenance as p; print(json.dumps(p.provenance('cpu', 1, 1)))"
    command = f"{profile.python_command} -c {json.dumps(tell)}"
    parameters = profile.sbatch_parameters("sweep", snapshot)
    script = _make_sbatch_string(command=command, folder=tmp_path / "logs", map_count=2, **parameters)
    (tmp_path / "job.sh").write_text(script)
    (tmp_path / "logs").mkdir()
    job = cluster.run("sbatch", "--parsable", f"--chdir={tmp_path}", str(tmp_path / "job.sh")).strip()
    cluster.wait_for_states(job, ["COMPLETED", "COMPLETED"])
    for element in range(2):
        found = json.loads((tmp_path / f"logs/{job}_{element}_0_log.out").read_text())
        assert found["snapshot"] == snapshot.name and found["code_hash"] and found["command"] == ["-c"]
        assert found["node"] in ("n1", "n2", "n3", "n4") and found["slurm"]["nodes"] == found["node"]
        of_array = {key: found["slurm"][key] for key in ("array_job_id", "array_task_id", "restart_count", "cluster")}
        assert of_array == {"array_job_id": job, "array_task_id": str(element), "restart_count": None, "cluster": "ci"}
