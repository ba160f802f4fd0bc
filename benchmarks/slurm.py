"""Run jobs under a real SLURM on this machine: one that is requeued twice, and a sweep as a job array.

    python benchmarks/slurm.py

munged, slurmctld and slurmd run in a temporary folder, as a cluster of one node with two CPUs, and end with the script.
Run it as root, such as in a container. It needs Debian's packages `slurm-wlm` and `munge`, but not systemd.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kills import curves, same
from runs import header, heading, row

from lightning_vae.checkpoints import checkpoint_io, run_folder

ROOT = Path(__file__).parent.parent
CLUSTER = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
"""
FIT = """#!/bin/bash
#SBATCH --nodes=1 --ntasks-per-node=2 --requeue --open-mode=append --output={name}.txt
srun python train.py fit --config configs/digits.yaml --data.batch_size 32 \\
  --trainer.devices 2 --trainer.strategy ddp --ckpt_path last --same_run true \\
  --trainer.max_epochs 30 --trainer.enable_progress_bar false --trainer.logger.version {name}
"""
ARRAY = """#!/bin/bash
#SBATCH --no-requeue --output=point-%A-%a.txt
eval "$(sed -n "${SLURM_ARRAY_TASK_ID}p" commands.txt)"
"""
SWEEP = "python train.py sweep --config configs/digits.yaml --betas [0.1,1,10] --trainer.max_epochs 6"


def call(command: str) -> str:
    """Run a command and return what it prints."""
    ended = subprocess.run(command.split(), capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{command}: {ended.stdout}{ended.stderr}")
    return ended.stdout.strip()


def wait(condition: Callable[[], bool], seconds: float, subject: str) -> None:
    """Wait until a condition holds, and raise an error after this time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"{subject}: not within {seconds:.0f} seconds.")
        time.sleep(0.2)


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Run SLURM with its files in a folder, and end it with all its jobs."""
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as other:
        ports = [each.getsockname()[1] for each in (one, other)]
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CLUSTER.format(host=host, ports=ports, folder=folder))
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    files = " ".join(f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed"))
    munged = f"munged --foreground --force --socket={folder}/munge.socket {files}"
    daemons = []
    with (folder / "daemons.txt").open("wb") as log:
        try:
            for command in (munged, "slurmctld -D", "slurmd -D"):
                daemons.append(subprocess.Popen(command.split(), stdout=log, stderr=log))
                wait((folder / "munge.socket").exists, 10, "The start of munged")
            idle = ["sinfo", "--noheader", "--format=%T"]
            wait(lambda: subprocess.run(idle, capture_output=True).stdout == b"idle\n", 60, "The start of SLURM")
            try:
                yield
            finally:
                call("scancel --user=root")
                wait(lambda: not call("squeue --noheader"), 60, "The end of all jobs")
        except TimeoutError:
            print((folder / "daemons.txt").read_text(), file=sys.stderr)
            raise
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait()


def submit(script: str, options: str = "") -> str:
    """Submit a job and return its number."""
    Path("job.sbatch").write_text(script)
    return call(f"sbatch --parsable {options} job.sbatch")


def states(job: str) -> list[str]:
    """Return the states of a job, or of all tasks of an array."""
    return call(f"squeue --noheader --array --states=all --jobs={job} --format=%T").split()


def finish(job: str) -> None:
    """Wait for the end of a job."""
    wait(
        lambda: {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL"}.issuperset(states(job)), 600, f"The end of job {job}"
    )
    if set(states(job)) != {"COMPLETED"}:
        raise RuntimeError(f"Job {job}: {states(job)}\n" + "\n".join(each.read_text() for each in Path().glob("*.txt")))


def saved(run: Path) -> int:
    """Return the steps of the newest checkpoint."""
    newest = run_folder.newest_checkpoint(run, resumes=True)
    return int(checkpoint_io.read(newest)["global_step"]) if newest else 0


def fits() -> None:
    """Compare a run that is requeued twice in mid-run with an undisturbed one, and print a table."""
    widths = (52, 5, 8, 10, 9, 6)
    header(("disturbed by", "steps", "restarts", "parameters", "optimizer", "curves"), widths)
    runs = alone, requeued = Path("logs/digits/alone"), Path("logs/digits/requeued")
    jobs = [submit(FIT.format(name="alone"))]
    finish(jobs[0])
    jobs.append(submit(FIT.format(name="requeued")))
    steps = []
    for third in (saved(alone) // 3, saved(alone) * 2 // 3):
        wait(partial(lambda least: saved(requeued) >= least, third), 300, f"A save of step {third}")
        call(f"scontrol requeue {jobs[1]}")
        steps.append(saved(requeued))
    finish(jobs[1])
    one, other = (checkpoint_io.read(run / "checkpoints" / "last.ckpt") for run in runs)
    equal = [same(one[name], other[name]) for name in ("state_dict", "optimizer_states")]
    equal.append(curves(alone) == curves(requeued))
    restarts = [call(f"scontrol show job {job}").partition("Restarts=")[2].split()[0] for job in jobs]
    row(("nothing", one["global_step"], restarts[0], "", "", ""), widths)
    disturbed = f"scontrol requeue, newest save at steps {steps[0]} and {steps[1]}"
    row((disturbed, other["global_step"], restarts[1], *("same" if each else "DIFFERENT" for each in equal)), widths)


def job_array() -> None:
    """Run the printed commands of a sweep as a job array, and let the sweep finish."""
    commands = call(f"{SWEEP} --print_commands")
    Path("commands.txt").write_text(commands + "\n")
    job = submit(ARRAY, f"--array=1-{len(commands.splitlines())}")
    finish(job)
    left = call(f"{SWEEP} --print_commands").splitlines()
    print(f"\nJob array: {len(states(job))} tasks completed, {len(left)} commands left. Then the sweep itself:\n")
    print(call(SWEEP))
    print("\nWritten: " + ", ".join(sorted(path.name for path in Path("sweeps/digits").glob("*.*") if path.is_file())))


def main() -> None:
    if missing := [each for each in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if not shutil.which(each)]:
        sys.exit(f"{', '.join(missing)} not found: install Debian's packages `slurm-wlm` and `munge`.")
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = str(ROOT)  # a checkout need not be installed
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        Path("train.py").symlink_to(ROOT / "train.py")
        Path("configs").symlink_to(ROOT / "configs")
        (folder := Path(name, "slurm")).mkdir()
        with cluster(folder):
            heading("configs/digits.yaml under SLURM, the runs of the table in two processes", call("sbatch --version"))
            fits()
            job_array()


if __name__ == "__main__":
    main()
