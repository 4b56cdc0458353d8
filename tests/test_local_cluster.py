"""Is the local cluster a real one (nodes, GPUs, accounting, requeue), and does it leave nothing behind?"""

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from slurm_cluster import (
    MACHINE_LACKS_SOMETHING,
    MARK,
    PATIENCE_SECONDS,
    SCRIPT,
    Cluster,
    free_ports,
    run_script,
    temporary_cluster,
    wait_until,
)

FAILED = 1  # the script's exit statuses
WRONGLY_CALLED = 2
NOT_RUNNING = 4
DAEMONS = ["munged", "mariadbd", "slurmdbd", "slurmctld", "n1", "n2", "n3", "n4"]

# Each task of an array says where it runs, and waits until all eight have: then all eight run at once.
MEET = """
echo "$SLURMD_NODENAME $CUDA_VISIBLE_DEVICES" > {folder}/$SLURM_ARRAY_TASK_ID
for _ in $(seq 3000); do [ $(ls {folder} | wc -l) -lt 8 ] || exit 0; sleep 0.1; done
exit 1
"""
# Each task says its job, its node, its rank, and to what the first node's name resolves there.
WHERE = 'echo "$SLURM_JOB_ID $SLURMD_NODENAME $SLURM_PROCID $(getent ahostsv4 n1 | head -n 1)"'
# The first attempt waits to be requeued, the second ends.
TWO_ATTEMPTS = 'echo "attempt ${{SLURM_RESTART_COUNT:-0}}" >> {file}; [ -n "$SLURM_RESTART_COUNT" ] || sleep 600'
# A job that ignores being cancelled, and a process in a session of its own that outlives it.
STUBBORN = (
    "trap '' TERM; setsid sleep 600 & echo $! > {folder}/orphan.new; mv {folder}/orphan.new {folder}/orphan; sleep 600 & wait"
)


def pids(cluster: Cluster) -> dict[str, str]:
    return {name: (cluster.folder / "pids" / name).read_text().strip() for name in DAEMONS}


def processes_of(folder: Path) -> list[str]:
    """Processes whose command line names the folder, or that live in a mount namespace with a file of it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            mounts = (process / "mountinfo").read_text()
        except OSError:  # it ended meanwhile, or is a zombie that waits for init
            continue
        if f"{folder.parent.name}/" in command + mounts and process.name != str(os.getpid()):
            found.append(f"{process.name} {command}")
    return found


def traces_outside() -> set[str]:
    """Files that Slurm, munge or MariaDB could have left in the places where they leave them by default."""
    folders = [tempfile.gettempdir(), "/run", "/run/lock", "/dev/shm", "/var/tmp", "/var/log", "/var/spool", "/var/lib", "/etc"]
    words = ("slurm", "munge", "mariadb", "mysql")
    entries = [entry for folder in folders if Path(folder).is_dir() for entry in Path(folder).iterdir()]
    named = [entry for entry in entries if any(word in entry.name.lower() for word in words)]
    return {str(entry) for entry in named} | {str(inner) for entry in named if entry.is_dir() for inner in entry.rglob("*")}


def test_says_what_to_install(tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("bash", "dirname", "realpath", "env"):
        (commands / name).symlink_to(shutil.which(name) or name)
    done = run_script("up", str(tmp_path / "cluster"), PATH=str(commands))
    assert done.returncode == MACHINE_LACKS_SOMETHING
    assert "sbatch" in done.stderr
    assert "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge slurmdbd mariadb-server" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "cluster").exists()


def test_does_not_start_in_a_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = run_script("up", str(tmp_path))
    assert done.returncode == WRONGLY_CALLED
    assert "give a new or an empty folder" in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_does_not_remove_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert run_script("down", str(tmp_path)).returncode == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("arguments", [["up", "/tmp/a b"], ["up", "/tmp/" + 80 * "a"], ["stop"], ["restart"], []])
def test_wrong_calls(arguments: list[str]) -> None:
    done = run_script(*arguments)
    assert done.returncode == WRONGLY_CALLED
    assert done.stderr


def test_status_of_nothing(tmp_path: Path) -> None:
    done = run_script("status", str(tmp_path / "none"))
    assert done.returncode == NOT_RUNNING
    assert "start one with" in done.stderr


@pytest.mark.slurm
def test_status(cluster: Cluster) -> None:
    printed = cluster.script("status")
    for node in ("n1", "n2", "n3", "n4"):
        assert f"{node}       idle" in printed
    tiers = {line.split()[0]: line.split()[-1] for line in printed.splitlines() if line.startswith(("main", "low", "high"))}
    assert tiers == {"main*": "50", "low": "1", "low0": "1", "high": "100"}
    assert printed.endswith(f"export SLURM_CONF={cluster.folder}/slurm.conf\n")


@pytest.mark.slurm
def test_up_again_changes_nothing(cluster: Cluster) -> None:
    before = pids(cluster)
    assert cluster.up(CLUSTER_NODES="2") == f"export SLURM_CONF={cluster.folder}/slurm.conf\n"
    assert pids(cluster) == before


@pytest.mark.slurm
def test_up_brings_back_what_was_stopped(cluster: Cluster) -> None:
    before = pids(cluster)
    try:
        for name in ("n3", "slurmctld", "slurmdbd"):
            cluster.stop(name)
        status = run_script("status", str(cluster.folder))
    finally:
        cluster.up()
    assert status.returncode == NOT_RUNNING
    assert "slurmdbd slurmctld n3 not running" in status.stderr
    after = pids(cluster)
    assert {name for name in DAEMONS if before[name] != after[name]} == {"n3", "slurmctld", "slurmdbd"}
    assert cluster.run("srun", "--mem=100", "--nodelist=n3", "sh", "-c", "echo $SLURMD_NODENAME") == "n3\n"


@pytest.mark.slurm
def test_a_start_that_fails_says_why_and_leaves_nothing(cluster: Cluster) -> None:
    with pytest.raises(RuntimeError, match="NoSuchKey"), temporary_cluster(CLUSTER_EXTRA="NoSuchKey=1") as second:
        pytest.fail(f"a cluster with a wrong setting started in {second.folder}")


@pytest.mark.slurm
def test_ports_in_use_are_refused(cluster: Cluster) -> None:
    port = cluster.run("scontrol", "show", "config").split("SlurmctldPort")[1].split()[1]
    second = cluster.folder.parent / "second"
    done = run_script("up", str(second), CLUSTER_PORT=str(int(port) - 1))
    assert done.returncode == FAILED
    assert f"port {port} is in use: set CLUSTER_PORT" in done.stderr
    assert not second.exists()


@pytest.mark.slurm
def test_array_holds_eight_gpus_on_four_nodes(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(MEET.format(folder=tmp_path), "--array=0-7", "--gres=gpu:1")
    cluster.wait_for_states(job, ["COMPLETED"] * 8)
    places = sorted(tuple(entry.read_text().split()) for entry in tmp_path.iterdir())
    assert places == [(f"n{node}", str(device)) for node in (1, 2, 3, 4) for device in (0, 1)]
    assert all("gres/gpu=1" in resources for _, _, resources in cluster.accounting(job))


@pytest.mark.slurm
def test_one_job_on_two_nodes(cluster: Cluster) -> None:
    printed = cluster.run("srun", "--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2", "--mem=100", "sh", "-c", WHERE)
    tasks = sorted(tuple(line.split()[1:4]) for line in printed.splitlines())
    nodes = sorted({node for node, _, _ in tasks})
    assert len(nodes) == 2
    # Slurm numbers the tasks node by node; the nodes' names resolve inside the job.
    assert tasks == [(nodes[rank // 2], str(rank), "127.0.0.1") for rank in range(4)]
    job = printed.split()[0]
    cluster.wait_for_states(job, ["COMPLETED"])
    assert "gres/gpu=4" in cluster.accounting(job)[0][2]


@pytest.mark.slurm
def test_requeued_job_runs_again(cluster: Cluster, tmp_path: Path) -> None:
    attempts = tmp_path / "attempts"
    job = cluster.submit(TWO_ATTEMPTS.format(file=attempts))
    wait_until(attempts.exists, f"job {job} starts")
    cluster.run("scontrol", "requeue", job)
    cluster.wait_for_states(job, ["REQUEUED", "COMPLETED"])
    assert attempts.read_text().splitlines() == ["attempt 0", "attempt 1"]


@pytest.mark.slurm
def test_down_leaves_nothing(cluster: Cluster) -> None:
    traces = traces_outside()
    with temporary_cluster(CLUSTER_NODES="2", CLUSTER_KILL_WAIT="1") as second:
        folder = second.folder
        second.submit(STUBBORN.format(folder=folder), "--nodelist=n2")
        second.submit("sleep 600", "--nodelist=n2", "--cpus-per-task=4")  # stays pending
        wait_until((folder / "orphan").exists, "the stubborn job starts")
        orphan = (folder / "orphan").read_text().strip()
        assert any(line.startswith(f"{orphan} ") for line in processes_of(folder))
        assert len(processes_of(folder)) >= 6  # four daemons and two nodes, at the least
        assert (folder / MARK).exists()
        second.down()
        assert processes_of(folder) == []
        assert not folder.exists()
        assert list(folder.parent.iterdir()) == []
    assert traces_outside() == traces
    assert folder.parent.name not in Path("/proc/mounts").read_text()
    # The cluster beside it serves on.
    assert cluster.run("srun", "--mem=100", "echo", "here") == "here\n"


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="becomes another user: run as root, where setpriv is"
)
def test_without_root_it_starts_runs_and_leaves_nothing() -> None:
    """As the user nobody, who cannot read this folder and has no rights of root's."""
    user, traces = pwd.getpwnam("nobody"), traces_outside()
    drop = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--no-new-privs"]

    def as_user(*command: str, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "HOME": place, **settings}
        return subprocess.run(
            [*drop, *command],
            cwd=place,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )

    with tempfile.TemporaryDirectory(prefix="tsbench-") as place:
        for script in SCRIPT.parent.glob("local_cluster*.sh"):
            shutil.copy(script, place)
        shutil.chown(place, user.pw_name)
        folder, command = Path(place) / "slurm", f"{place}/{SCRIPT.name}"
        try:
            up = as_user(command, "up", str(folder), CLUSTER_NODES="2", CLUSTER_PORT=str(free_ports()))
            if up.returncode == MACHINE_LACKS_SOMETHING:
                pytest.skip(up.stderr.strip())
            assert up.returncode == 0, up.stderr
            job = as_user("srun", "--nodes=2", "--mem=100", "id", "-un", SLURM_CONF=f"{folder}/slurm.conf")
            assert (job.stdout, job.returncode) == (f"{user.pw_name}\n" * 2, 0), job.stderr
        finally:
            down = as_user(command, "down", str(folder))
        assert down.returncode == 0 and not folder.exists()
        assert processes_of(folder) == []
    assert traces_outside() == traces
