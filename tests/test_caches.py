"""Caches: what is found, what goes and what stays, and that a run which uses one is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from helpers import environ

from okavango import caches, cli

DAY = 86400


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("OKAVANGO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write(path, size=1000, days=0.0):
    """A file that was last used so many days ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    then = time.time() - days * DAY
    os.utime(path, (then, then))
    return path


def features(folder, **days):
    """A cache of features with a file for each letter."""
    with caches.used(folder, "features"):
        return {letter: write(folder / f"{letter * 64}.safetensors", days=age) for letter, age in days.items()}


def quiet(line):
    pass


def test_what_is_cached_is_found_wherever_it_lies(home, tmp_path, capsys):
    assert caches.find() == [] and not home.exists()
    write(home / "web" / "tiny-0123" / "model.safetensors", 3000, days=3)
    write(home / "web" / "tiny-0123" / "config.json", 10, days=1)
    (home / "web" / "tiny-0123.lock").touch()
    blob = write(home / "hf" / "models--org--name" / "blobs" / "abc", 5000, days=2)
    snapshot = home / "hf" / "models--org--name" / "snapshots" / "main" / "model.safetensors"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(blob)
    features(tmp_path / "r.cache", a=0, b=4)
    store = tmp_path / "report" / "descriptors"
    with caches.used(store, "descriptors"):
        for name in ("store.json", "global-00000.npy", "keys-00000.npy"):
            write(store / name, 100)
    found = {(item.kind, item.folder, len(item.paths), item.bytes) for item in caches.find()}
    cache = (tmp_path / "r.cache").resolve()
    assert found == {
        ("web", home / "web" / "tiny-0123", 1, 3010),
        ("hf", home / "hf" / "models--org--name", 1, 5000),  # the link is not counted twice
        ("features", cache, 1, 1000),
        ("descriptors", store.resolve(), 3, 300),
    }
    assert len(caches.find("features")) == 2
    (web,) = caches.find("web")
    assert time.time() - web.used == pytest.approx(DAY, abs=100)  # the latest use of any file counts
    assert cli.main(["cache", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[2].split()[:2] == ["0.0", "MB"] and str(cache) in lines[2] and "0.0 MB in all" in lines[-1]


def test_files_of_a_user_are_neither_counted_nor_removed(home, tmp_path):
    folder = tmp_path / "mine"
    kept = [write(folder / name) for name in ("notes.txt", "weights.safetensors", "a" * 63 + ".npy", "deep/" + "a" * 64 + ".npy")]
    kept.append(write(tmp_path / "other" / ("b" * 64 + ".npy")))  # a folder that nobody noted
    made = features(folder, c=0)["c"]
    torn = write(folder / f".{'d' * 64}.npy.4242")  # what a run that was killed left
    assert sum(item.bytes for item in caches.find()) == 2000
    assert caches.clean(say=quiet) == (2000, 0)
    assert not made.exists() and not torn.exists() and all(path.exists() for path in kept)
    assert caches.find() == [] and not list((home / "known").iterdir())


def test_an_empty_folder_goes_too_and_comes_back_by_use(home, tmp_path):
    features(tmp_path / "x", a=0)
    caches.clean(say=quiet)
    assert not (tmp_path / "x").exists()
    features(tmp_path / "x", a=0)
    assert len(caches.find()) == 1


def test_by_age_and_by_size(home, tmp_path):
    files = features(tmp_path / "x", a=1, b=20, c=40, d=3)
    lines = []
    assert caches.clean(older=30, say=lines.append) == (1000, 3000)
    assert not files["c"].exists() and lines == [f"{(tmp_path / 'x').resolve()}: removed features, 0.0 MB"]
    caches.touch(files["b"])  # now the last one that was used
    written = files["b"].stat().st_mtime
    assert time.time() - written > 19 * DAY
    assert caches.clean(max_gb=1500e-9, say=quiet) == (2000, 1000)
    assert files["b"].exists() and not files["a"].exists() and not files["d"].exists()
    assert caches.clean(max_gb=1.0, say=quiet) == (0, 1000)
    assert caches.clean("studies", say=quiet) == (0, 0) and files["b"].exists()
    with pytest.raises(ValueError, match="expected at least 0"):
        caches.clean(older=-1)
    with pytest.raises(ValueError, match="unknown kind"):
        caches.clean("user")


def test_what_a_run_uses_stays(home, tmp_path):
    files = features(tmp_path / "x", a=50)
    code = f"from okavango import caches; caches.hold({str(tmp_path / 'x')!r}, 'features'); print(flush=True); input()"
    run = subprocess.Popen(
        [sys.executable, "-c", code], env=environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        run.stdout.readline()
        lines = []
        assert caches.clean(say=lines.append) == (0, 1000) and files["a"].exists()
        assert lines == [f"{(tmp_path / 'x').resolve()}: in use, left alone"]
    finally:
        run.communicate("\n")
    assert caches.clean(say=quiet) == (1000, 0) and not files["a"].exists()


def test_a_checkpoint_that_was_just_fetched_stays(home):
    new, old = (write(home / "web" / name / "config.json", days=days) for name, days in (("new", 0), ("old", 1)))
    assert caches.clean(say=quiet) == (1000, 1000)
    assert new.exists() and not old.parent.exists()


def test_a_home_that_cannot_be_written_does_not_matter(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("OKAVANGO_HOME", str(tmp_path / "file" / "home"))
    features(tmp_path / "x", a=0)
    caches.touch(tmp_path / "nowhere")
    assert caches.find() == [] and caches.clean(say=quiet) == (0, 0)


def test_notes_that_are_none_are_passed_over(home, tmp_path):
    for text in ("", "{", "[]", '{"kind": "zap", "path": "/"}', '{"kind": "features"}'):
        write(home / "known" / f"{len(text)}.json").write_text(text)
    assert caches.find() == []
