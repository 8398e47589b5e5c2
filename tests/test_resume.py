"""Runs that are killed, stopped or find damaged states end with the weights of a run that was left alone, byte for byte."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import TINY, command, environ, run, weights


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """One finished run for each number of processes."""
    finished: dict[int, Path] = {}

    def get(processes: int) -> Path:
        if processes not in finished:
            out = tmp_path_factory.mktemp("undisturbed") / "run"
            printed = run(*TINY, "--out", out, processes=processes)
            assert json.loads((out / "state" / "step-00000012" / "meta.json").read_text())["environment"]["processes"] == processes
            assert "12/12" in printed.stdout
            finished[processes] = out
        return finished[processes]

    return get


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait until a file exists or the process is gone."""
    end = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


def members(group: int) -> list[int]:
    """Processes whose command line mentions the run, by process group."""
    alive = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                alive.append(int(entry.name))
    return alive


def wait_until_gone(group: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while members(group) and time.monotonic() < end:
        time.sleep(0.05)
    assert not members(group), "processes of the run outlive it"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("victim", ["group", "launcher"])
def test_killed_at_random_moments(undisturbed, tmp_path, processes, victim):
    expected = weights(undisturbed(processes))
    out, draw = tmp_path / "run", random.Random(f"{processes} {victim}")
    kills = 0
    for attempt in range(12):
        process = subprocess.Popen(
            command(*TINY, "--out", out, processes=processes),
            env=environ(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if kills < 2:
            # Not before something was saved in this attempt, or no progress would ever be made; then at a random moment.
            wait_for(out / "state" / f"step-{3 * (kills + 1):08d}", process)
            time.sleep(draw.uniform(0, 0.4))
        if kills < 2 and process.poll() is None:
            if victim == "group":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
            wait_until_gone(process.pid)
            kills += 1
            continue
        if process.wait(timeout=240) == 0:
            break
        assert attempt < 11
    assert kills == 2 or (out / "export").exists()
    assert weights(out) == expected
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(12))


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_resumes(undisturbed, tmp_path, processes):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(*TINY, "--save-every", "100", "--out", out, processes=processes),
        env=environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for(out / "log.jsonl", process)
    os.kill(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    wait_until_gone(process.pid)
    saved = sorted((out / "state").glob("step-*"))
    assert saved, printed
    assert "stopped at step" in printed and not (out / "export").exists(), printed
    if processes == 1:
        assert process.returncode == 0
    again = run(*TINY, "--save-every", "100", "--out", out, processes=processes)
    assert f"resuming at step {int(saved[-1].name[5:])}" in again.stdout
    assert weights(out) == weights(undisturbed(processes))


@pytest.mark.parametrize("damage", ["torn", "flipped", "manifest"])
def test_damaged_state_is_reported_and_the_one_before_used(undisturbed, tmp_path, damage):
    source, out = undisturbed(1), tmp_path / "run"
    shutil.copytree(source, out)
    shutil.rmtree(out / "export")
    newest = sorted((out / "state").iterdir())[-1]
    path = newest / "objective.safetensors"
    if damage == "torn":
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size // 2)
    elif damage == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        (newest / "manifest.json").write_text("{")
    printed = run(*TINY, "--out", out).stdout
    assert f"{newest.name} is damaged" in printed and "resuming at step 9" in printed
    assert weights(out) == weights(source)


def test_second_run_in_the_same_folder_is_refused(tmp_path):
    from okavango.pretrain.state import StateError, run_lock

    out = tmp_path / "run"
    with run_lock(out):
        done = run(*TINY, "--out", out, check=False)
        assert done.returncode == 1 and "is in use by process" in done.stderr and len(done.stderr.strip().splitlines()) == 1
        with pytest.raises(StateError, match="in use"), run_lock(out):
            pass
    with run_lock(out):
        pass


def test_another_recipe_in_the_same_folder_is_refused(undisturbed, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed(1), out)
    done = run(*TINY, "--optim.lr", "0.5", "--out", out, check=False)
    assert done.returncode == 1 and "another recipe (optim.lr" in done.stderr


def test_workers_do_not_change_the_result(undisturbed, tmp_path):
    run(*TINY, "--workers", "0", "--out", tmp_path / "run")
    assert weights(tmp_path / "run") == weights(undisturbed(1))
