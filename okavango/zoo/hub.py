"""From a name, folder, file, URL or Hugging Face repository to a checkpoint folder on this disk, and from there to a model.

Everything fetched lies under `OKAVANGO_HOME` (default: ``~/.cache/okavango``). A download continues where it stopped, counts only
when the full sha256 of the weights is right, and appears by one rename; processes that want the same file wait for each other.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

from filelock import FileLock

from okavango import caches
from okavango.zoo import catalogue

if TYPE_CHECKING:
    import torch
    from torch import nn

    from okavango.models.backbone import Backbone

log = logging.getLogger(__name__)

TIMEOUT = 30.0  # seconds without a byte
RETRIES = 4  # attempts in a row that bring nothing new
PAUSE = 0.5  # seconds before the second attempt; doubles
CHUNK = 1 << 20
SMALL = 4 << 20  # bytes; a config or a card is never larger
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HF_REPO = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?")


class HubError(ValueError):
    """A checkpoint cannot be found, fetched or pushed; the message says what to do."""


@overload
def load(
    spec: str | os.PathLike,
    *,
    offline: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    strict: bool = True,
    revision: str | None = None,
    cache: str | os.PathLike | None = None,
    heads: None = None,
    base: str | os.PathLike | None = None,
) -> Backbone: ...


@overload
def load(
    spec: str | os.PathLike,
    *,
    offline: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    strict: bool = True,
    revision: str | None = None,
    cache: str | os.PathLike | None = None,
    heads: Mapping[str, Callable[..., nn.Module]] | None,
    base: str | os.PathLike | None = None,
) -> nn.Module: ...


def load(
    spec: str | os.PathLike,
    *,
    offline: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    strict: bool = True,
    revision: str | None = None,
    cache: str | os.PathLike | None = None,
    heads: Mapping[str, Callable[..., nn.Module]] | None = None,
    base: str | os.PathLike | None = None,
) -> nn.Module:
    """The model of a checkpoint, in eval mode, with a `LoadReport` as ``model.load_report``.

    Args:
        spec, offline, revision, cache: see `resolve`.
        device, dtype, strict, heads: see `okavango.zoo.checkpoint.load_checkpoint`.
        base: see `base_of`.
    Raises:
        HubError: it cannot be found or fetched.
        CheckpointError: it is damaged or does not fit.
    """
    from okavango.zoo.checkpoint import load_checkpoint

    folder = resolve(spec, offline=offline, revision=revision, cache=cache)
    base = base_of(folder, base, offline=offline, cache=cache)
    return load_checkpoint(folder, device=device, dtype=dtype, strict=strict, heads=heads, base=base)[0]


def base_of(
    folder: Path, base: str | os.PathLike | None = None, *, offline: bool = False, cache: str | os.PathLike | None = None
) -> Path | None:
    """The frozen network's checkpoint, where a checkpoint holds only what was trained on it; None where it holds all, or is none.

    Args:
        folder: the checkpoint.
        base: what `resolve` takes, where the frozen network is not where the checkpoint says.
        offline, cache: see `resolve`.
    Raises:
        HubError, CheckpointError: it cannot be found.
    """
    from okavango.zoo.checkpoint import CheckpointError, base_folder, read_config

    try:
        config = read_config(folder)
    except CheckpointError:
        return None  # whoever reads it next says so
    if not config.get("partial"):
        return None
    if base is None and Path(folder, config["parent"]["name"]).is_dir():
        return base_folder(folder, config)
    try:
        return base_folder(folder, config, resolve(base or config["parent"]["name"], offline=offline, cache=cache))
    except HubError as error:
        raise HubError(
            f"{folder}: holds only what was trained on its base, which cannot be found ({error}); name it by base="
        ) from None


def resolve(
    spec: str | os.PathLike, *, offline: bool = False, revision: str | None = None, cache: str | os.PathLike | None = None
) -> Path:
    """The folder of a checkpoint, fetched if need be.

    Args:
        spec: a name of the catalogue (``arch.tag``; ``arch`` means its first tag), a folder, its ``model.safetensors``, the URL of
            a folder (``#sha256=...`` pins the weights), or ``hf://org/name@revision`` (also without ``hf://``).
        offline: never open a connection; also by the environment variable ``OKAVANGO_OFFLINE=1``.
        revision: branch, tag or commit of a Hugging Face repository.
        cache: folder for what is fetched; see `cache_folder`.
    Raises:
        HubError: unknown name, not cached while offline, not reachable, wrong hash, disk full.
    """
    text = os.fspath(spec)
    offline = offline or os.environ.get("OKAVANGO_OFFLINE", "") not in ("", "0")
    entry = catalogue.find(text)
    if entry is not None:
        if revision is not None:
            raise HubError(f"{text}: a name of the catalogue is pinned already; leave revision out")
        if entry.folder is not None:
            if not entry.available:
                raise HubError(f"{entry.name}: its weights are not part of this installation; create_model builds it untrained")
            return entry.folder
        if not entry.source:
            raise HubError(f"{entry.name}: {entry.note}")
        text = entry.source
    if text.startswith(("http://", "https://")):
        if revision is not None:
            raise HubError(f"{text}: a URL has no revision; pin it by #sha256=...")
        return _from_url(text, entry.sha256 if entry else "", cache_folder(cache), offline)
    if text.startswith("hf://"):
        return _from_hugging_face(text, revision, cache_folder(cache), offline, entry.sha256 if entry else "")

    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    if path.is_file():
        if path.name != "model.safetensors" or not (path.parent / "config.json").is_file():
            raise HubError(f"{path}: expected a checkpoint folder, or its model.safetensors with config.json beside it")
        return path.parent
    # `runs/export` where `runs` exists is a mistyped folder, not somebody's repository
    if _HF_REPO.fullmatch(text) and Path(text).parts[0] not in os.listdir():
        return _from_hugging_face(f"hf://{text}", revision, cache_folder(cache), offline)
    if "/" in text or os.sep in text or text in ("", ".", ".."):
        raise HubError(f"{text}: no such folder, and not a name of the catalogue, a URL or org/name of a Hugging Face repository")
    from okavango.models.backbone import architectures, unknown_name

    known = architectures()
    if text in known:
        raise HubError(f"{text}: has no published weights; create_model({text!r}) builds it untrained")
    raise HubError(unknown_name("model", text, [*catalogue.CATALOGUE, *known]))


def cache_folder(cache: str | os.PathLike | None = None) -> Path:
    """Where fetched checkpoints lie: the argument, else ``OKAVANGO_HOME``, else okavango in the user's cache folder."""
    return caches.home() if cache is None else Path(cache).expanduser()


# -- URL ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Remote:
    """A checkpoint folder on a web server and its place in the cache."""

    url: str
    pin: str
    folder: Path

    @classmethod
    def parse(cls, text: str, pin: str, cache: Path) -> _Remote:
        address, _, fragment = text.partition("#")
        if fragment:
            match = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment.lower())
            if not match:
                raise HubError(f"{text}: expected #sha256= and 64 hexadecimal digits after the URL")
            pin = match[1]
        parts = urllib.parse.urlsplit(address)
        route = parts.path.removesuffix("/model.safetensors").rstrip("/")
        address = urllib.parse.urlunsplit(parts._replace(path=route))
        name = re.sub(r"[^\w.-]", "_", route.rpartition("/")[2]).strip(".") or "checkpoint"
        key = hashlib.sha256(f"{address}#{pin}".encode()).hexdigest()[:16]
        return cls(address, pin, cache / "web" / f"{name}-{key}")

    def file(self, name: str) -> str:
        parts = urllib.parse.urlsplit(self.url)
        return urllib.parse.urlunsplit(parts._replace(path=f"{parts.path}/{name}"))


def _from_url(text: str, pin: str, cache: Path, offline: bool) -> Path:
    from okavango.zoo.checkpoint import read_config

    remote = _Remote.parse(text, pin, cache)
    cached = (remote.folder / "config.json").is_file()
    if cached:
        caches.touch(remote.folder / "config.json")
    if cached and (remote.pin or offline):
        return remote.folder
    if offline:
        raise HubError(f"{text}: not in the cache {cache} and offline; load it once with a connection, or unset OKAVANGO_OFFLINE")
    with _disk_errors(remote.folder):
        remote.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{remote.folder}.lock")
    with lock:
        cached = (remote.folder / "config.json").is_file()
        if cached and remote.pin:  # another process was faster
            return remote.folder
        try:
            raw = _fetch_small(remote.file("config.json"))
        except _Unreachable as error:
            if not cached:
                raise
            log.warning("%s; using the copy in the cache", error)
            return remote.folder
        config = _parse(raw, remote.file("config.json"))
        digest, size = config["weights"]["sha256"], config["weights"]["bytes"]
        if remote.pin and digest != remote.pin:
            raise HubError(
                f"{remote.url}: its config.json names sha256 {digest}; expected {remote.pin}; the checkpoint was replaced"
            )
        if cached and read_config(remote.folder)["weights"]["sha256"] == digest:
            return remote.folder
        card = _fetch_small(remote.file("README.md"), optional=True)
        staging = remote.folder.with_name(f"{remote.folder.name}.part")
        with _disk_errors(remote.folder):
            staging.mkdir(exist_ok=True)
        download(remote.file("model.safetensors"), staging / "model.safetensors", sha256=digest, size=size)
        with _disk_errors(remote.folder):
            (staging / "README.md").write_bytes(card)
            (staging / "config.json").write_bytes(raw)
            from okavango.zoo.checkpoint import replace_folder

            replace_folder(staging, remote.folder)
    return remote.folder


def _parse(raw: bytes, url: str) -> dict[str, Any]:
    from okavango.zoo.checkpoint import config_problems

    try:
        config = json.loads(raw)
    except ValueError:
        raise HubError(f"{url}: not JSON; expected the address of a checkpoint folder") from None
    problems = config_problems(config)
    if problems:
        raise HubError(f"{url}: {problems[0]}")
    return config


class _Unreachable(HubError):
    """The server could not be reached or answered that it is out of order."""


def _retry(url: str, attempt: Callable[[], bool]) -> None:
    """Call `attempt` until it returns True; give up after RETRIES calls in a row that raised a network error.

    An attempt that got further than before raises `_Progress`, which starts the count anew.
    """
    failures, reason = 0, ""
    while failures < RETRIES:
        if failures:
            time.sleep(PAUSE * 2 ** (failures - 1))
        failures += 1
        try:
            if attempt():
                return
        except _Progress as error:
            failures, reason = 1, str(error)
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise HubError(f"{url}: the server answers {error.code} {error.reason}; check the address") from None
            reason = f"{error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
    raise _Unreachable(f"{url}: could not be fetched ({reason}); try again later, what came so far is kept")


class _Progress(Exception):
    """The connection broke, but not before new bytes came."""


def _open(url: str, **headers: str):
    request = urllib.request.Request(url, headers={"User-Agent": "okavango", "Accept-Encoding": "identity", **headers})
    return urllib.request.urlopen(request, timeout=TIMEOUT)


def _fetch_small(url: str, *, optional: bool = False) -> bytes:
    """A config or card; with `optional`, b"" when the server has none."""
    content = b""

    def attempt() -> bool:
        nonlocal content
        try:
            with _open(url) as response:
                content = response.read(SMALL + 1)
        except urllib.error.HTTPError as error:
            if optional and error.code == 404:
                return True
            raise
        length = response.headers.get("Content-Length")
        if length is not None and len(content) < min(int(length), SMALL):
            raise ConnectionError("the connection broke")
        return True

    _retry(url, attempt)
    if len(content) > SMALL:
        raise HubError(f"{url}: larger than {SMALL} bytes; expected the address of a checkpoint folder")
    return content


def download(url: str, path: Path, *, sha256: str, size: int) -> Path:
    """Fetch a file whose hash and size are known; `path` appears only when both are right.

    What has come is kept in a file beside it, named after the hash, and the next call goes on from there.

    Raises:
        HubError: not reachable, wrong size or hash (the file is removed then), disk full.
    """
    part = path.with_name(f"{path.name}.{sha256[:16]}.part")

    def attempt() -> bool:
        start = part.stat().st_size if part.exists() else 0
        if start > size:
            part.unlink()
            start = 0
        if start == size:
            return True
        have = start
        with _open(url, **({"Range": f"bytes={start}-"} if start else {})) as response:
            if response.status != 206:  # the server sends all of it again
                have = 0
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise ConnectionError("the server sent another range than the one asked for")
            with _disk_errors(part, size):
                part.touch()
            with open(part, "ab" if have else "wb") as file:
                try:
                    while block := response.read(CHUNK):
                        have += len(block)
                        if have > size:
                            break
                        with _disk_errors(part, size):
                            file.write(block)
                            file.flush()
                except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
                    if have > start:
                        raise _Progress(str(error) or type(error).__name__) from None
                    raise
        if have > size:
            part.unlink()
            raise HubError(f"{url}: sends more than the {size} bytes that config.json names; the checkpoint is inconsistent")
        if have < size:
            raise _Progress("the connection broke") if have > start else ConnectionError("the connection broke")
        return True

    _retry(url, attempt)
    with _disk_errors(part, size):
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            part.unlink()
            raise HubError(f"{url}: sha256 {found}; expected {sha256}; the file was removed, try again or ask its publisher")
        os.replace(part, path)
    return path


@contextlib.contextmanager
def _disk_errors(path: Path, size: int = 0):
    """Errors of the local disk in one line; errors of the network pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise HubError(f"{path}: cannot be written ({error.strerror}); set OKAVANGO_HOME to a folder of your own") from None
        need = f" for {size / 1e6:.1f} MB" if size else ""
        raise HubError(f"{path.parent}: no room{need} ({error.strerror}); free some or set OKAVANGO_HOME to another disk") from None


# -- Hugging Face -------------------------------------------------------------------------------------------------------------


def _from_hugging_face(text: str, revision: str | None, cache: Path, offline: bool, pin: str = "") -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from okavango.zoo.checkpoint import FILES, read_config, weights_problem

    web_error = cast(type[Exception], HfHubHTTPError.__bases__[0])  # HTTPError of the web client that huggingface_hub uses
    match = _HF_REPO.fullmatch(text.removeprefix("hf://"))
    if not match or ".." in text:
        raise HubError(f"{text}: expected hf://org/name or hf://org/name@revision")
    repo = match["repo"]
    if revision and match["revision"] and revision != match["revision"]:
        raise HubError(f"{text}: revision={revision!r} contradicts the name; give one of them")
    revision = revision or match["revision"]
    at = f"hf://{repo}" + (f"@{revision}" if revision else "")

    def fetch(*, only_cached: bool, force: bool = False) -> Path:
        folder = snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache / "hf",
            allow_patterns=list(FILES),
            local_files_only=only_cached,
            force_download=force,
            etag_timeout=TIMEOUT,
        )
        return Path(folder)

    try:
        folder = fetch(only_cached=offline)
    except GatedRepoError:
        raise HubError(f"{at}: access must be granted on its page first; then log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise HubError(f"{at}: no such repository or folder (or it is private and you are not logged in)") from None
    except RevisionNotFoundError:
        raise HubError(f"{at}: the repository has no such revision") from None
    except LocalEntryNotFoundError:
        why = "offline" if offline else "the hub cannot be reached"
        raise HubError(f"{at}: not (wholly) in the cache {cache} and {why}; load it once with a connection") from None
    except web_error as error:
        raise HubError(f"{at}: could not be fetched ({str(error).splitlines()[0]}); try again, what came is kept") from None
    except OSError as error:
        with _disk_errors(cache / "hf"):
            raise error
        raise
    missing = [name for name in FILES[:2] if not (folder / name).is_file()]
    if missing:
        raise HubError(f"{at}: has no {missing[0]}, so it is not an okavango checkpoint; a converter may take its weights")
    caches.touch(folder / FILES[0])
    config = read_config(folder)
    problem = weights_problem(folder, config)
    if problem:
        damaged = (folder / FILES[1]).resolve()
        damaged.unlink()
        (folder / FILES[1]).unlink(missing_ok=True)
        raise HubError(f"{at}: {problem}; the file was removed, try again or ask its publisher")
    if pin and config["weights"]["sha256"] != pin:
        raise HubError(f"{at}: sha256 {config['weights']['sha256']}; the catalogue says {pin}; the checkpoint was replaced")
    return folder


def push(
    folder: str | os.PathLike, repo: str, *, private: bool = False, token: str | None = None, endpoint: str | None = None
) -> str:
    """Publish a checkpoint in a Hugging Face repository, which is made if need be.

    Args:
        folder: a checkpoint; nothing is sent unless `verify_checkpoint` finds it sound.
        repo: ``org/name``.
        private: whether a new repository is private.
        token: access token; None means the one of `hf auth login`.
        endpoint: address of the hub; None means the public one or ``HF_ENDPOINT``.
    Returns:
        The commit's address.
    Raises:
        HubError: the checkpoint is not sound, or the hub refuses.
    """
    from okavango.zoo.checkpoint import FILES, verify_checkpoint

    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", repo):
        raise HubError(f"repository {repo!r}: expected org/name")
    problems = verify_checkpoint(folder, base=base_of(Path(folder)))
    if problems:
        more = f" (and {len(problems) - 1} more, see `okavango zoo verify`)" if len(problems) > 1 else ""
        raise HubError(f"not pushed: {problems[0]}{more}")
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=Path(folder), allow_patterns=list(FILES), commit_message="Okavango checkpoint"
        )
    except OSError as error:  # HfHubHTTPError is one
        raise HubError(f"{repo}: the hub refuses ({str(error).splitlines()[0]}); check the token and its rights") from None
    return str(commit.commit_url)
