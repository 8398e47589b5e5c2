"""Finding and fetching checkpoints, against real servers on 127.0.0.1 that misbehave."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from okavango.models.backbone import create_model
from okavango.zoo import catalogue, hub
from okavango.zoo.catalogue import Entry
from okavango.zoo.checkpoint import CheckpointError, read_config, save_checkpoint
from okavango.zoo.hub import HubError, load, push, resolve

ROOT = str(Path(__file__).parents[1])
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(http.server.ThreadingHTTPServer):
    """Serves a dict path -> bytes, with ranges, and breaks on demand.

    Attributes:
        files: what there is; `requests`: (method, path, Range header) of all that came.
        cut: path -> list of byte counts after which the next answers break off.
        status: path -> list of statuses for the next answers.
        ranges: whether Range is honoured.
        repos: "org/name" -> files of an emulated model hub, all at one commit; `gate`: repositories that need permission.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.cut, self.status, self.ranges = {}, [], {}, {}, True
        self.repos, self.gate = {}, set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Clients that went away are part of the game."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0]
        server.requests.append((self.command, path, self.headers.get("Range")))
        if server.status.get(path):
            return self.answer(server.status[path].pop(0), b"")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.hub_api("/".join(parts[2:4]), parts[4:])
        if len(parts) == 5 and parts[2] == "resolve":
            content = server.repos.get("/".join(parts[:2]), {}).get(parts[4])
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content or b"").hexdigest()}"'}
            return self.missing("EntryNotFound") if content is None else self.answer(200, content, headers)
        content = server.files.get(path)
        return self.answer(404, b"no") if content is None else self.answer(200, content)

    def hub_api(self, repo, rest):
        if repo in self.server.gate:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if repo not in self.server.repos:
            return self.missing("RepoNotFound")
        if rest and rest[-1] not in ("main", "v1", COMMIT):
            return self.missing("RevisionNotFound")
        files = self.server.repos[repo]
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()} for k, v in files.items()]
            return self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        info = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0}
        info["siblings"] = [{"rfilename": name} for name in files]
        self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def missing(self, code):
        self.answer(404, b"", {"X-Error-Code": code})

    def answer(self, status, content, headers=None):
        wanted = self.headers.get("Range") if self.server.ranges and status == 200 else None
        start = 0
        if wanted:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            status = 206
        self.send_response(status)
        body = content[start:]
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.server.cut.get(self.path)
        if cuts:
            self.wfile.write(body[: cuts.pop(0)])
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(body)


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = create_model("elastic_vit_tiny", image_size=14, max_depth=2)
    return save_checkpoint(model, tmp_path_factory.mktemp("zoo") / "tiny", card={"licence": "mit"})


@pytest.fixture(autouse=True)
def _quick_and_private(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "PAUSE", 0.001)
    monkeypatch.setattr(hub, "TIMEOUT", 5)
    monkeypatch.setenv("OKAVANGO_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("OKAVANGO_OFFLINE", raising=False)


@pytest.fixture
def url(server, checkpoint):
    server.files = {f"/zoo/tiny/{path.name}": path.read_bytes() for path in checkpoint.iterdir()}
    return f"{server.url}/zoo/tiny"


WEIGHTS = "/zoo/tiny/model.safetensors"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- folders and names --------------------------------------------------------------------------------------------------------


def test_a_folder_a_file_and_a_name_are_one_code_path(checkpoint, monkeypatch):
    monkeypatch.setattr(catalogue, "WEIGHTS_FOLDER", checkpoint.parent)
    entries = [Entry(architecture="arch", tag="one", source="tiny"), Entry(architecture="arch", tag="two", source="none")]
    monkeypatch.setattr(catalogue, "CATALOGUE", {entry.name: entry for entry in entries})
    for spec in (checkpoint, str(checkpoint), checkpoint / "model.safetensors", "arch.one", "arch"):
        assert resolve(spec, offline=True) == checkpoint
    with pytest.raises(HubError, match="not part of this installation"):
        resolve("arch.two")
    model = load("arch", dtype=torch.bfloat16)
    assert not model.training and model.pos_embed.dtype == torch.bfloat16 and len(model.load_report.matched) > 20


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("elastic_vit_tinny", "did you mean 'elastic_vit_tiny'"),
        ("elastic_vit_base", "no published weights"),
        ("runs/none/export", "no such folder"),
        ("../../etc/passwd_", "no such folder"),
        ("..", "expected|not a checkpoint"),
        ("", "no such folder"),
        ("hf://../secrets", "expected hf://org/name"),
        ("hf://org/..", "expected hf://org/name"),
        ("hf://org/na..me@main", "expected hf://org/name"),
        ("hf://org/name/extra", "expected hf://org/name"),
        ("hf://org/name@../../x", "expected hf://org/name"),
        ("http://127.0.0.1:9/a#sha256=12", "64 hexadecimal digits"),
    ],
)
def test_wrong_names_are_told_in_one_line_without_network(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        load(spec)
    assert "\n" not in str(error.value)


def test_a_mistyped_folder_is_not_looked_up_on_the_web(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match="no such folder"):
        resolve("runs/exprot")


def test_a_stray_file_is_refused(tmp_path, checkpoint):
    stray = tmp_path / "model.safetensors"
    stray.write_bytes((checkpoint / "model.safetensors").read_bytes())
    with pytest.raises(HubError, match="config.json beside it"):
        resolve(stray)


def test_revision_belongs_to_repositories(url):
    with pytest.raises(HubError, match="a URL has no revision"):
        resolve(url, revision="main")
    with pytest.raises(HubError, match="contradicts"):
        resolve("hf://org/name@v1", revision="v2")


# -- URL ----------------------------------------------------------------------------------------------------------------------


def test_a_url_is_fetched_once_and_then_cached(server, url, checkpoint, tmp_path):
    folder = resolve(url)
    assert contents(folder) == contents(checkpoint) and tmp_path / "home" in folder.parents
    assert resolve(url + "/") == folder == resolve(f"{url}/model.safetensors")
    assert sum(path == WEIGHTS for _, path, _ in server.requests) == 1
    server.requests.clear()
    assert resolve(url, offline=True) == folder and server.requests == []
    assert torch.equal(load(url).pos_embed, load(checkpoint).pos_embed)


def test_pinned_urls(server, url, checkpoint):
    digest = read_config(checkpoint)["weights"]["sha256"]
    with pytest.raises(HubError, match=f"names sha256 {digest}; expected {'0' * 64}"):
        resolve(f"{url}#sha256={'0' * 64}")
    assert all(path != WEIGHTS for _, path, _ in server.requests)
    folder = resolve(f"{url}#sha256={digest}")
    server.requests.clear()
    assert resolve(f"{url}#sha256={digest.upper()}") == folder and server.requests == []


def test_a_catalogue_entry_pins_its_url(url, checkpoint, monkeypatch):
    def publish(sha256):
        entry = Entry(architecture="arch", tag="web", source=url, sha256=sha256)
        monkeypatch.setattr(catalogue, "CATALOGUE", {entry.name: entry})

    publish("1" * 64)
    with pytest.raises(HubError, match="the checkpoint was replaced"):
        resolve("arch.web")
    publish(read_config(checkpoint)["weights"]["sha256"])
    assert contents(resolve("arch.web")) == contents(checkpoint)


def test_a_republished_checkpoint_is_fetched_again(server, url, tmp_path):
    resolve(url)
    other = save_checkpoint(create_model("elastic_vit_tiny", image_size=14, max_depth=2), tmp_path / "tiny")
    server.files = {f"/zoo/tiny/{path.name}": path.read_bytes() for path in other.iterdir()}
    folder = resolve(url)
    assert contents(folder) == contents(other)
    server.status["/zoo/tiny/config.json"] = [503] * 9
    assert resolve(url) == folder  # out of order: the copy serves


def test_interrupted_downloads_go_on_where_they_stopped(server, url, checkpoint):
    size = (checkpoint / "model.safetensors").stat().st_size
    server.cut[WEIGHTS] = [1000, 5000, 0, 0, 70_000]
    folder = resolve(url)
    assert contents(folder) == contents(checkpoint)
    ranges = [asked for _, path, asked in server.requests if path == WEIGHTS]
    assert ranges == [None, "bytes=1000-", "bytes=6000-", "bytes=6000-", "bytes=6000-", "bytes=76000-"] and size > 76_000
    assert not list(folder.parent.glob("*.part"))


def test_the_next_process_resumes(server, url, checkpoint):
    server.cut[WEIGHTS] = [4000] + [0] * 20
    with pytest.raises(HubError, match="could not be fetched .*what came so far is kept"):
        resolve(url)
    server.cut.clear()
    server.requests.clear()
    assert contents(resolve(url)) == contents(checkpoint)
    assert [asked for _, path, asked in server.requests if path == WEIGHTS] == ["bytes=4000-"]


def test_a_server_without_ranges_starts_over(server, url, checkpoint):
    server.ranges = False
    server.cut[WEIGHTS] = [3000]
    assert contents(resolve(url)) == contents(checkpoint)


def test_errors_of_the_server(server, url, checkpoint):
    server.status[WEIGHTS] = [500, 503, 429]
    assert contents(resolve(url)) == contents(checkpoint)
    with pytest.raises(HubError, match="answers 404"):
        resolve(f"{server.url}/nowhere")
    assert sum(path == "/nowhere/config.json" for _, path, _ in server.requests) == 1
    server.files["/page/config.json"] = b"<html>hello</html>"
    with pytest.raises(HubError, match="not JSON"):
        resolve(f"{server.url}/page")
    server.files["/old/config.json"] = b'{"format_version": 99}'
    with pytest.raises(HubError, match="format_version 99"):
        resolve(f"{server.url}/old")
    server.status["/busy/config.json"] = [503] * 9
    with pytest.raises(HubError, match="could not be fetched .503"):
        resolve(f"{server.url}/busy")


def test_a_missing_card_does_not_matter(server, url, checkpoint):
    del server.files["/zoo/tiny/README.md"]
    assert load(url).load_report.missing == ()


def test_nobody_listens():
    with pytest.raises(HubError, match="could not be fetched .*refused"):
        resolve("http://127.0.0.1:9/tiny")


def test_a_wrong_hash_names_both_and_leaves_no_file(server, url, checkpoint, tmp_path):
    good = server.files[WEIGHTS]
    server.files[WEIGHTS] = good[:-1] + bytes([good[-1] ^ 1])
    found, expected = (hashlib.sha256(data).hexdigest() for data in (server.files[WEIGHTS], good))
    with pytest.raises(HubError, match=f"sha256 {found}; expected {expected}"):
        resolve(url)
    assert not list((tmp_path / "home").rglob("*model.safetensors*"))
    server.files[WEIGHTS] = good + b"more"
    with pytest.raises(HubError, match="sends more than"):
        resolve(url)
    server.files[WEIGHTS] = good
    assert contents(resolve(url)) == contents(checkpoint)


def test_damage_in_the_cache_is_noticed(url):
    folder = resolve(url)
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="sha256"):
        load(url)


def test_offline(server, url, monkeypatch):
    with pytest.raises(HubError, match="not in the cache .* and offline"):
        resolve(url, offline=True)
    monkeypatch.setenv("OKAVANGO_OFFLINE", "1")
    for spec in (url, "hf://org/name", "org/name@v1"):
        with pytest.raises(HubError, match="offline"):
            resolve(spec)
    assert server.requests == []
    monkeypatch.setenv("OKAVANGO_OFFLINE", "0")
    resolve(url)


def test_an_odd_url_stays_inside_the_cache(server, checkpoint, tmp_path):
    for odd in ("/a/..%2f..%2fx", "/a/.hidden", "/" + "ü" * 3, "/"):
        route = odd if odd != "/" else ""
        server.files |= {f"{route.replace('ü', '%C3%BC')}/{path.name}": path.read_bytes() for path in checkpoint.iterdir()}
        folder = resolve(f"{server.url}{odd}".replace("ü", "%C3%BC"))
        assert folder.parent == tmp_path / "home" / "web" and contents(folder) == contents(checkpoint)


def _processes(code, count, **env):
    script = f"import sys; sys.path.insert(0, {ROOT!r})\nfrom okavango.zoo import hub\n" + textwrap.dedent(code)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )
        for _ in range(count)
    ]
    return [(*child.communicate(timeout=120), child.returncode) for child in children]


def test_two_processes_at_once_fetch_once(server, url, checkpoint):
    server.cut[WEIGHTS] = [2000, 2000]
    answers = _processes(f"print(hub.resolve({url!r}))", 2)
    assert [code for *_, code in answers] == [0, 0], answers
    folders = {out.strip() for out, *_ in answers}
    assert len(folders) == 1 and contents(Path(folders.pop())) == contents(checkpoint)
    assert len([1 for _, path, _ in server.requests if path == WEIGHTS]) == 3


def test_a_full_disk_is_one_line_and_what_came_is_kept(server, url, checkpoint):
    code = f"""
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            hub.resolve({url!r})
        except hub.HubError as error:
            print(error)
    """
    ((out, err, status),) = _processes(code, 1)
    assert status == 0, err
    assert out.count("\n") == 1 and "no room for 1" in out and "OKAVANGO_HOME" in out
    server.requests.clear()
    assert contents(resolve(url)) == contents(checkpoint)
    assert [asked for _, path, asked in server.requests if path == WEIGHTS] == ["bytes=50000-"]


def test_a_cache_that_cannot_be_written(url, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match="cannot be written"):
        resolve(url, cache=tmp_path / "file")


# -- Hugging Face -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def repo(server, checkpoint, monkeypatch):
    """The real client, talking to our server."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    server.repos["org/tiny"] = {**contents(checkpoint), "optimizer.bin": b"never fetched"}
    return "org/tiny"


def test_a_repository_is_fetched_and_cached(server, repo, checkpoint):
    folder = resolve(f"hf://{repo}")
    assert contents(folder) == contents(checkpoint)
    for spec in (repo, f"{repo}@v1", f"hf://{repo}@main", f"{repo}@{COMMIT}"):
        assert resolve(spec) == folder
    assert resolve(repo, revision="v1") == folder
    server.requests.clear()
    assert resolve(repo, offline=True) == folder and resolve(f"{repo}@{COMMIT}", offline=True) == folder
    assert server.requests == []
    assert len(load(repo).load_report.matched) > 20


def test_what_a_repository_can_lack(server, repo):
    with pytest.raises(HubError, match="org/none: no such repository"):
        resolve("org/none")
    with pytest.raises(HubError, match="no such revision"):
        resolve(f"{repo}@v9")
    server.gate.add("org/gated")
    with pytest.raises(HubError, match="access must be granted"):
        resolve("org/gated")
    server.repos["org/other"] = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(HubError, match="has no model.safetensors"):
        resolve("org/other")


def test_a_damaged_repository_is_noticed_and_fetched_again(server, repo, checkpoint):
    good = server.repos[repo]["model.safetensors"]
    server.repos[repo]["model.safetensors"] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(HubError, match="sha256 .* the file was removed"):
        resolve(repo)
    server.repos[repo]["model.safetensors"] = good
    assert contents(resolve(repo)) == contents(checkpoint)


def test_a_hub_that_breaks_off_or_is_away(server, repo, checkpoint, monkeypatch):
    from huggingface_hub import constants

    path = f"/{repo}/resolve/{COMMIT}/model.safetensors"
    server.cut[path] = [3000]
    assert contents(resolve(repo)) == contents(checkpoint)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached"):
        resolve("org/other")
    assert contents(resolve(repo)) == contents(checkpoint)  # from the cache


def test_a_catalogue_entry_pins_its_repository(repo, monkeypatch):
    entry = Entry(architecture="arch", tag="hf", source=f"hf://{repo}@{COMMIT}", sha256="2" * 64)
    monkeypatch.setattr(catalogue, "CATALOGUE", {entry.name: entry})
    with pytest.raises(HubError, match="the catalogue says 2222"):
        resolve("arch.hf")


def test_push_sends_nothing_that_is_not_sound(server, checkpoint, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for name, content in contents(checkpoint).items():
        (bad / name).write_bytes(content)
    raw = bytearray((bad / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (bad / "model.safetensors").write_bytes(raw)
    with pytest.raises(HubError, match="not pushed: .*sha256"):
        push(bad, "org/new", endpoint=server.url, token="none")
    with pytest.raises(HubError, match="no such folder"):
        push(tmp_path / "none", "org/new", endpoint=server.url, token="none")
    with pytest.raises(HubError, match="expected org/name"):
        push(checkpoint, "../new", endpoint=server.url, token="none")
    assert server.requests == []
