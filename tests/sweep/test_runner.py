"""The pool of processes that trains and evaluates a sweep's points."""

import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import torch

from lightning_vae.sweep import runner
from lightning_vae.sweep.runner import Running, duration, remaining

ROOT = Path(__file__).parents[2]
LINEAR = str(ROOT / "configs" / "linear.yaml")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Point:
    """A point that does as it is told."""

    def __init__(self, folder, fit=(), test=()):
        self.folder, self.label, self.asked = folder, folder.name, {"fit": list(fit), "test": list(test)}
        self.evaluation, self.checkpoint = folder / "test" / "evaluation.json", None

    def is_evaluated(self):
        self.evaluation.parent.mkdir(parents=True)
        self.evaluation.touch()

    def commands(self, evaluate=True):
        return {**self.asked, **({} if evaluate else {"test": []})}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (60, "1 min 0 s"), (3599.5, "1 h 0 min"), (90, "1 min 30 s")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("done", "jobs", "left"), [(1, 1, 500), (1, 2, 300), (2, 2, 200), (5, 2, 100 / 3), (3, 8, 100)]
)
def test_the_time_left_is_counted_in_rounds(done, jobs, left):
    assert remaining(100.0, done, total=6, jobs=jobs) == pytest.approx(left)


def test_jobs_run_at_once_and_no_more_than_that(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    running, most, codes = [], [], count()

    def start(point, evaluate, threads):
        process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
        poll = process.poll

        def ends_when_looked_at():
            most.append(len(running))
            if process in running:
                running.remove(process)
                process.communicate(b"\n")
            return poll()

        running.append(process)
        process.poll = ends_when_looked_at
        assert (evaluate, threads) == (True, 2)
        point.is_evaluated()
        return Running(point, process, time.monotonic(), next(codes))

    monkeypatch.setattr(runner, "start", start)
    points = [Point(tmp_path / str(number)) for number in range(7)]
    assert runner.run(points, 3, lambda point: f"done with {point.label}") == []
    assert max(most) == 3
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in said] == [f"[{n + 1}/7] {n}: done with {n}" for n in range(7)]
    assert "to go" in said[5]
    assert "to go" not in said[6]


@pytest.mark.exhaustive
def test_a_process_that_fails_is_quoted_by_its_own_message(tmp_path, capsys):
    (tmp_path / "point").mkdir()
    (tmp_path / "point" / runner.LOG).write_text("error: of the time before\n")
    point = Point(tmp_path / "point", test=["test", "--config", LINEAR, "--ckpt_path=nowhere.ckpt"])
    assert runner.run([point], 1, lambda _: "done") == [point]
    said = capsys.readouterr().out
    assert "point: FAILED: `--ckpt_path`: there is no file 'nowhere.ckpt'. (full output: " in said
    assert (tmp_path / "point" / runner.LOG).read_text().startswith("error: of the time before\nerror: ")


def test_a_log_is_read_from_where_the_process_began(tmp_path, monkeypatch):
    class Quick:
        """A process that has written before its maker goes on."""

        def __init__(self, *_, stdout, **__):
            os.write(stdout.fileno(), b"error: at once\n")

    monkeypatch.setattr(subprocess, "Popen", Quick)
    (tmp_path / "point").mkdir()
    (tmp_path / "point" / runner.LOG).write_text("error: of the time before\n")
    running = runner.start(Point(tmp_path / "point"), True, 1)
    assert (tmp_path / "point" / runner.LOG).read_text()[running.log_from :] == "error: at once\n"


def test_a_process_that_says_nothing_is_quoted_by_its_exit_code(tmp_path, monkeypatch, capsys):
    def start(point, *_):
        process = subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"], stdin=subprocess.PIPE)
        return Running(point, process, time.monotonic(), 0)

    monkeypatch.setattr(runner, "start", start)
    (tmp_path / "point").mkdir()
    (tmp_path / "point" / runner.LOG).touch()
    runner.run([Point(tmp_path / "point")], 1, lambda _: "done")
    assert "FAILED: its process ended with exit code 3" in capsys.readouterr().out


@pytest.mark.parametrize("evaluate", [True, False])
def test_a_process_that_was_stopped_has_failed_and_the_others_go_on(evaluate, tmp_path, monkeypatch, capsys):
    """Lightning ends a fit that gets SIGTERM with exit code 0."""

    def start(point, *_):
        if point is done and evaluate:
            point.is_evaluated()
        elif point is done:
            point.checkpoint = tmp_path / "best.ckpt"
        process = subprocess.Popen([sys.executable, "-S", "-c", ""], stdin=subprocess.PIPE)
        return Running(point, process, time.monotonic(), 0)

    monkeypatch.setattr(runner, "start", start)
    stopped, done = Point(tmp_path / "stopped"), Point(tmp_path / "done")
    assert runner.run([stopped, done], 1, lambda _: "0.5 nats", evaluate) == [stopped]
    said = capsys.readouterr().out
    assert "stopped: FAILED: its process was stopped before it ended (full output: " in said
    assert "done: 0.5 nats (" in said


def test_what_interrupts_the_pool_ends_its_processes(tmp_path, monkeypatch):
    processes = []

    def start(point, *_):
        code = "raise SystemExit(bool(input()))" if processes else "raise SystemExit(0)"
        processes.append(subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE,
                                          stderr=subprocess.DEVNULL))  # fmt: skip
        point.is_evaluated()
        return Running(point, processes[-1], time.monotonic(), 0)

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "start", start)
    with pytest.raises(KeyboardInterrupt) as _kept:  # and with it the pool's frames, which must not be needed
        runner.run([Point(tmp_path / label) for label in "abc"], 2, interrupted)
    assert [process.returncode for process in processes] == [0, 1]  # by itself, as its input is closed


def test_a_process_that_does_not_end_with_the_pool_is_killed(tmp_path, monkeypatch):
    processes = []

    def start(point, *_):
        code = "import time; time.sleep(30)" if processes else ""
        processes.append(subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE))
        point.is_evaluated()
        return Running(point, processes[-1], time.monotonic(), 0)

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "start", start)
    monkeypatch.setattr(runner, "_PATIENCE", 0.1)
    with pytest.raises(KeyboardInterrupt):
        runner.run([Point(tmp_path / label) for label in "ab"], 2, interrupted)
    assert [process.returncode for process in processes] == [0, -signal.SIGKILL]


@pytest.fixture
def _ctrl_c():
    """Have children listen to Ctrl-C, which those of a job in the background do not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.exhaustive
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("_ctrl_c")
def test_a_sweep_that_is_stopped_leaves_no_process_behind(stop):
    command = [sys.executable, str(ROOT / "train.py"), "sweep", "--config", LINEAR, "--data.size=256",
               "--data.batch_size=128", "--trainer.max_epochs=100000"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        folder = Path("sweeps/linear")
        while not list(folder.glob("*/checkpoints/last.ckpt")):  # in the middle of its fit
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(stop)
        said = process.communicate()[1]  # the children write elsewhere
    if stop != signal.SIGKILL:
        assert process.returncode == 130
        assert said.endswith("Stopped. The same command continues from here.\n")
        assert "Traceback" not in said
    for _ in range(300):  # they share its process group
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("a process of the sweep is still there")
