"""Children that die are started again so many times; what stops showing life is killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from serve.launch.supervise import Supervisor
from serve.launch.tied import tied

ROOT = Path(__file__).parents[3]


class Watched:
    def __init__(self, tmp_path, script, **options):
        self.log = tmp_path / "starts"
        body = f"import os, sys, time\nopen({str(self.log)!r}, 'a').write(str(os.getpid()) + '\\n')\n" + script
        self.ended = threading.Event()
        self.why = []
        self.supervisor = Supervisor("child", [sys.executable, "-c", body], on_given_up=self._end, **options)
        self.supervisor.start()

    def _end(self, why):
        self.why.append(why)
        self.ended.set()

    @property
    def pids(self):
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []

    def until(self, condition, seconds=15):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.02)


def test_a_child_that_keeps_dying_is_given_up_after_the_stated_restarts(tmp_path):
    child = Watched(tmp_path, "sys.exit(5)", max_restarts=2)
    assert child.ended.wait(15)
    assert child.why == ["child ended with exit code 5; 2 restarts in 600 s are the limit"]
    assert len(child.pids) == 3


def test_a_child_that_cannot_start_is_not_started_again(tmp_path):
    child = Watched(tmp_path, "sys.exit(1)")
    assert child.ended.wait(15)
    assert child.why == ["child ended with exit code 1: it cannot start"]
    assert len(child.pids) == 1


def test_a_killed_child_comes_back(tmp_path):
    child = Watched(tmp_path, "time.sleep(60)", max_restarts=1)
    child.until(lambda: len(child.pids) == 1)
    os.kill(child.pids[0], signal.SIGKILL)
    child.until(lambda: len(child.pids) == 2)
    assert child.supervisor.restarts == 1
    os.kill(child.pids[1], signal.SIGKILL)
    assert child.ended.wait(15)
    assert "was ended by signal 9; 1 restarts" in child.why[0]


def test_old_deaths_are_forgotten(tmp_path):
    child = Watched(tmp_path, "time.sleep(0.4); sys.exit(5)", max_restarts=1, window_s=0.6)
    child.until(lambda: len(child.pids) >= 4)
    assert not child.why
    child.supervisor.stop()


def test_a_stopped_child_is_killed_and_comes_back(tmp_path):
    script = "while True: sys.stdout.write('.'); sys.stdout.flush(); time.sleep(0.1)"
    child = Watched(tmp_path, script, shows_life=True, silent_s=0.8)
    child.until(lambda: len(child.pids) == 1)
    time.sleep(1.2)
    assert len(child.pids) == 1
    os.kill(child.pids[0], signal.SIGSTOP)
    child.until(lambda: len(child.pids) == 2)
    child.supervisor.stop()


def test_what_goes_in_is_read_and_a_stop_ends_the_child(tmp_path):
    script = f"open({str(tmp_path / 'in')!r}, 'wb').write(sys.stdin.buffer.read(5)); time.sleep(60)"
    child = Watched(tmp_path, script, stdin=b"hello")
    child.until(lambda: (tmp_path / "in").exists() and (tmp_path / "in").read_bytes() == b"hello")
    child.supervisor.stop()
    assert not child.why
    with pytest.raises(ProcessLookupError):
        os.kill(child.pids[0], 0)


def test_children_do_not_outlive_a_killed_launcher(tmp_path):
    log = tmp_path / "pid"
    script = (
        "import sys, time\n"
        "from serve.launch.supervise import Supervisor\n"
        f'body = \'import os, time; open("{log}", "w").write(str(os.getpid())); time.sleep(60)\'\n'
        "Supervisor('child', [sys.executable, '-c', body]).start()\n"
        "time.sleep(60)\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    deadline = time.monotonic() + 20
    while not log.exists() or not log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    stat = Path(f"/proc/{log.read_text()}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_child_whose_launcher_ended_before_it_could_be_tied_runs_nothing(tmp_path):
    """The death it wished to be told of has been: who starts it here is not who the command names."""
    ran = tmp_path / "ran"
    touch = [sys.executable, "-c", f"open({str(ran)!r}, 'w')"]
    assert subprocess.run(tied(touch), check=False).returncode == 0
    ran.unlink()
    somebody_else = [part if part != str(os.getpid()) else str(os.getppid()) for part in tied(touch)]
    done = subprocess.run(somebody_else, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "the process that started this one has ended\n")
    assert not ran.exists()
