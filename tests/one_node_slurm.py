"""A real Slurm of one node with two CPUs, for tests: its daemons are this machine's, its state lies in a folder.

Jobs of the partition `high` preempt those of `low`, which are then requeued.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

CONFIGURATION = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={next}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=2
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,preempt_youngest_first
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=10
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 State=UP
"""
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey")


def missing() -> str:
    """Why there can be no Slurm here, or nothing."""
    lacking = [name for name in NEEDED if not shutil.which(name)]
    if lacking:
        return f"{lacking[0]} is not installed (Debian: slurm-wlm)"
    return "" if os.geteuid() == 0 else "the daemons need root"


class Slurm:
    """Started when made; `stop()` ends its daemons and nothing else."""

    def __init__(self, folder: Path):
        self.folder, self.pids = folder, [folder / f"{name}.pid" for name in ("slurmctld", "slurmd", "munged")]
        self.waiting: dict[str, float] = {}  # job or element: since when
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        port = _free_port()
        try:
            self._start(port)
        except BaseException:
            self.stop()
            raise

    def _start(self, port: int) -> None:
        folder = self.folder
        names = {"host": socket.gethostname(), "folder": folder, "port": port, "next": port + 1}
        (folder / "slurm.conf").write_text(CONFIGURATION.format(**names))
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        key, place = folder / "munge.key", f"--socket={folder}/munge.socket"
        self._run("mungekey", "--create", f"--keyfile={key}")
        self._run(
            "munged", "--force", f"--key-file={key}", place, f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed",
        )  # fmt: skip
        self._run("slurmctld")
        self._run("slurmd")
        deadline = time.monotonic() + 30
        while "idle" not in self.said("sinfo", "-h", "-o", "%T"):
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.2)

    def said(self, *command: str) -> str:
        """What a command of Slurm prints."""
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout

    def queue(self) -> dict[str, str]:
        """State of every job and array element that is not over, by its number."""
        command = ("squeue", "-h", "-r", "-o", "%i %T")
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return dict(line.split(" ", 1) for line in done.stdout.split("\n") if line)

    def hurry(self) -> None:
        """Let jobs that were requeued begin soon, not two minutes later; at once they would be taken for their former
        selves, whose credentials have been revoked."""
        pending = [number for number, state in self.queue().items() if state == "PENDING"]
        self.waiting = {number: self.waiting.get(number, time.monotonic()) for number in pending}
        for number in (number for number, since in self.waiting.items() if time.monotonic() - since > 5):
            self.said("scontrol", "update", f"JobId={number}", "StartTime=now")

    def stop(self) -> None:
        self.said("scancel", "--state=RUNNING", "--full")
        for path in self.pids:
            if path.exists() and path.read_text().strip():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(path.read_text()), signal.SIGTERM)

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stderr)


def _free_port() -> int:
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            try:
                second.bind(("127.0.0.1", first.getsockname()[1] + 1))
            except OSError:
                continue
            return first.getsockname()[1]
