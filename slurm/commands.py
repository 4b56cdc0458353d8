"""How are Slurm's commands asked, so that a controller that restarts, or never answers, does no harm?"""

import os
import re
import shutil
import subprocess
import time

PATIENCE_SECONDS = 60.0  # a controller that restarts is back within that
PAUSE_SECONDS = 1.0
CALL_SECONDS = 30.0  # of one call; squeue itself tries for 9 s to reach a controller that is down
NOT_FOUND, TOO_LONG = 127, 124  # exit statuses, as shells have them
OUR_JOBS = ("squeue", "--me", "--all")  # also in partitions that are hidden: there they would seem to have left the queue
ANOTHER_VIEW = ("SQUEUE_", "SACCT_", "SCANCEL_")  # a user's own filters and formats, which would change the answers


class ClusterUnreachable(RuntimeError):
    """The cluster does not answer; its message is one sentence. Nothing is known about any job."""


def call(*command: str, seconds: float = CALL_SECONDS) -> subprocess.CompletedProcess[str]:
    """One call that never raises: what is not there, or takes too long, has an exit status that says so.

    Times are printed in seconds since the epoch, and lists of array elements in full. In a session of its own: what ends
    the caller's processes by group does not end it halfway.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith(ANOTHER_VIEW)}
    environment = own | {"SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0"}
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            start_new_session=True,
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, NOT_FOUND, "", f"{command[0]} is not on the PATH")
    except subprocess.TimeoutExpired as error:
        said = error.stderr or b""  # bytes, whatever was asked for
        words = said if isinstance(said, str) else said.decode(errors="replace")
        return subprocess.CompletedProcess(command, TOO_LONG, "", words.strip() or f"no answer within {seconds:g} s")


def ask(*command: str, patience_seconds: float = PATIENCE_SECONDS) -> str:
    """What a command prints; ClusterUnreachable if it has not succeeded after that long, but for the last call."""
    deadline = time.monotonic() + patience_seconds
    while True:
        done = call(*command)
        if done.returncode == 0:
            return done.stdout
        if shutil.which(command[0]) is None:
            raise ClusterUnreachable(f"{command[0]} is not on the PATH: run this where Slurm's commands are")
        if time.monotonic() >= deadline:
            raise ClusterUnreachable(
                f"the cluster does not answer {command[0]} ({why(done)}): wait until its controller is up, or correct SLURM_CONF"
            )
        time.sleep(min(PAUSE_SECONDS, max(0.0, deadline - time.monotonic())))


def why(done: subprocess.CompletedProcess[str]) -> str:
    """A failed command's last words, without its name before them."""
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return re.sub(r"^\w+: (error|fatal): ", "", lines[-1])


def records(printed: str, num_fields: int) -> list[list[str]]:
    """Fields between bars, one record per job. The last is the job's name, which may hold bars and further lines."""
    begins = re.compile(r"\d+(_\d+|_\[[^]|]*\])?(\.\w+)?\|")  # a job's id; other lines go on with a name
    return [line.split("|", num_fields - 1) for line in printed.splitlines() if begins.match(line)]


def to_seconds(duration: str) -> float | None:
    """Of `[days-][hours:]minutes:seconds`; None for words such as UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", duration)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((24 * days + hours) * 60 + minutes) * 60 + seconds)


def to_time(printed: str) -> float | None:
    """Seconds since the epoch; None for words such as Unknown and N/A."""
    return float(printed) if printed.isdigit() else None
