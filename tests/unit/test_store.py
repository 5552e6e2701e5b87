"""Model files on disk and their transfers, against real origins on this machine's loopback."""

from __future__ import annotations

import io
import json
import pickle
import struct
import threading
import time
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import urllib3
from structlog.testing import capture_logs

from experimance_controlnet import catalog
from experimance_controlnet.catalog.backoff import Backoff
from experimance_controlnet.catalog.disk import disk_errors
from experimance_controlnet.catalog.job import Manner
from experimance_controlnet.catalog.location import LocalPlace, locate
from experimance_controlnet.catalog.safetensors_file import verify_safetensors
from experimance_controlnet.catalog.specs import Source
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.catalog.web import tokens_of
from experimance_controlnet.errors import (
    AccessDeniedError,
    BadWeightsError,
    CatalogError,
    ChecksumMismatchError,
    DiskFullError,
    DownloadError,
    ModelFileError,
    NotFoundUpstreamError,
)
from tests.hub import COMMIT, serve_repository
from tests.origin import Origin, Reply
from tests.weights import safetensors, sha256

WEIGHTS = safetensors()
IMPATIENT = Manner(backoff=Backoff(tries=3, first_s=0.0))


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models", manner=IMPATIENT)


class ScriptedHttp:
    """Answers of hosts that are not on this machine: by URL, a status and headers.

    The body of a 200 is WEIGHTS.
    """

    def __init__(self, script: dict[str, tuple[int, dict[str, str]]]) -> None:
        self._script = script
        self.asked: list[tuple[str, Mapping[str, str]]] = []

    def request(
        self, method: str, url: str, *, headers: Mapping[str, str], **options: bool
    ) -> urllib3.BaseHTTPResponse:
        self.asked.append((url, headers))
        status, sent = self._script[url]
        body = io.BytesIO(WEIGHTS if status == 200 else b"")
        return urllib3.HTTPResponse(body, sent, status, preload_content=False)

    def clear(self) -> None:
        pass


def leftovers(store_folder: Path) -> list[Path]:
    """Everything below a folder that is a file or an abandoned transfer."""
    found = store_folder.rglob("*")
    return sorted(path for path in found if path.is_file() or "partial" in path.name)


def assert_refused(store: ModelStore, source: Source, error: type[Exception]) -> str:
    """The fetch fails with just this error, and no trace of it stays on disk."""
    with pytest.raises(error) as caught:
        store.fetch(source)
    assert store.path(source) is None
    assert store.content_hash(source) is None
    assert leftovers(store.models_dir) == []
    return str(caught.value)


# -- files over https (here: http to the loopback) ---------------------------------------------


def test_a_file_arrives_whole_and_is_not_fetched_twice(
    origin: Origin, store: ModelStore, tmp_path: Path
) -> None:
    source = origin.serve("/bucket/moss.safetensors", Reply(body=WEIGHTS))
    assert store.is_remote(source)
    assert store.path(source) is None
    assert store.content_hash(source) is None
    path = store.fetch(source)
    assert path == tmp_path / f"models/127.0.0.1_{origin.port}/bucket/moss.safetensors"
    assert path.read_bytes() == WEIGHTS
    assert store.path(source) == store.fetch(source) == path
    assert ModelStore(tmp_path / "models").fetch(source) == path
    assert origin.requests == ["/bucket/moss.safetensors"]
    assert leftovers(tmp_path / "models") == [path, path.with_name("moss.safetensors.sha256")]


def test_length_and_hash_of_the_catalogue_are_met(origin: Origin, store: ModelStore) -> None:
    uri = origin.serve("/a.safetensors", Reply(body=WEIGHTS)).uri
    source = Source(uri, sha256=sha256(WEIGHTS), size_bytes=len(WEIGHTS))
    assert store.fetch(source) == store.path(source)


def test_one_name_at_two_places_is_two_files(origin: Origin, store: ModelStore) -> None:
    bodies = {"/a/x.safetensors": b"\2", "/b/x.safetensors": b"\3"}
    for path, fill in bodies.items():
        source = origin.serve(path, Reply(body=safetensors(fill=fill)))
        assert store.fetch(source).read_bytes() == safetensors(fill=fill)
    one, two = (Source(f"{origin.url}/a/x.safetensors?v={n}") for n in (1, 2))
    assert store.fetch(one) != store.fetch(two)
    assert len(origin.requests) == 4


def test_nothing_has_the_final_name_before_the_end(origin: Origin, store: ModelStore) -> None:
    release = threading.Event()
    source = origin.serve("/a.safetensors", Reply(body=safetensors(1 << 20), hold=release))
    with ThreadPoolExecutor(1) as pool:
        transfer = pool.submit(store.fetch, source)
        while not list(store.models_dir.rglob(".partial-*/*")):
            time.sleep(0.005)
        assert store.path(source) is None
        assert list(store.models_dir.glob("*/a.safetensors")) == []
        release.set()
        assert transfer.result() == store.path(source)


@pytest.mark.parametrize(
    ("status", "error", "advice"),
    [
        (401, AccessDeniedError, "token"),
        (403, AccessDeniedError, "token"),
        (404, NotFoundUpstreamError, "check its address"),
        (410, NotFoundUpstreamError, "check its address"),
    ],
)
def test_what_the_origin_does_not_give_is_not_asked_for_again(
    origin: Origin, store: ModelStore, status: int, error: type[Exception], advice: str
) -> None:
    source = origin.serve("/a.safetensors", Reply(status))
    message = assert_refused(store, source, error)
    assert message.startswith(f"{source.uri}: the origin answers {status}: ")
    assert advice in message
    assert len(origin.requests) == 1


def test_a_cut_connection_is_tried_again(origin: Origin, store: ModelStore) -> None:
    source = origin.serve(
        "/a.safetensors", Reply(body=WEIGHTS, cut_after=100), Reply(503), Reply(body=WEIGHTS)
    )
    assert store.fetch(source).read_bytes() == WEIGHTS
    assert len(origin.requests) == 3


@pytest.mark.parametrize("reply", [Reply(body=WEIGHTS, cut_after=100), Reply(500), Reply(429)])
def test_tries_end(origin: Origin, store: ModelStore, reply: Reply) -> None:
    source = origin.serve("/a.safetensors", reply)
    message = assert_refused(store, source, DownloadError)
    assert message.startswith(f"{source.uri}: ")
    assert len(origin.requests) == 3


def test_an_origin_that_is_not_there(origin: Origin, store: ModelStore) -> None:
    origin.close()
    assert_refused(store, Source(f"{origin.url}/a.safetensors"), DownloadError)


def test_a_wrong_length_is_seen_before_the_transfer(origin: Origin, store: ModelStore) -> None:
    uri = origin.serve("/a.safetensors", Reply(body=WEIGHTS, hold=threading.Event())).uri
    message = assert_refused(store, Source(uri, size_bytes=7), BadWeightsError)
    assert message == f"{uri} has {len(WEIGHTS)} bytes; the catalogue says 7"


def test_a_wrong_length_that_the_origin_did_not_announce(tmp_path: Path) -> None:
    store = ModelStore(tmp_path, http=ScriptedHttp({"https://origin.test/a": (200, {})}))
    source = Source("https://origin.test/a", size_bytes=7)
    assert "length" in assert_refused(store, source, BadWeightsError)


def test_a_flipped_byte_is_found_by_the_hash(origin: Origin, store: ModelStore) -> None:
    damaged = WEIGHTS[:-1] + b"\0"
    uri = origin.serve("/a.safetensors", Reply(body=damaged)).uri
    message = assert_refused(store, Source(uri, sha256=sha256(WEIGHTS)), ChecksumMismatchError)
    assert "sha256" in message
    assert len(origin.requests) == 1


def test_a_login_page_is_not_a_model(origin: Origin, store: ModelStore) -> None:
    headers = {"Content-Type": "text/html; charset=utf-8"}
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS, headers=headers))
    assert "web page" in assert_refused(store, source, DownloadError)


@pytest.mark.parametrize("path", ["/a.safetensors", "/api/download/123"])
@pytest.mark.parametrize(
    "body", [pickle.dumps({"w": list(range(99))}), WEIGHTS[:-1], WEIGHTS + b"\0", b""]
)
def test_whatever_its_name_only_whole_safetensors_stay(
    origin: Origin, store: ModelStore, path: str, body: bytes
) -> None:
    assert_refused(store, origin.serve(path, Reply(body=body)), BadWeightsError)


def test_a_file_larger_than_the_disk_is_not_begun(origin: Origin, store: ModelStore) -> None:
    headers = {"Content-Length": str(10**18)}
    source = origin.serve("/a.safetensors", Reply(headers=headers, hold=threading.Event()))
    assert "GB free" in assert_refused(store, source, DiskFullError)


def test_a_models_dir_that_cannot_be_written(origin: Origin, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = ModelStore(tmp_path / "file" / "models")
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS))
    with pytest.raises(ModelFileError, match=r"^cannot write MODELS_DIR/.*: Not a directory"):
        store.fetch(source)


def test_a_disk_that_fills_up_on_the_way(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="No space left"), disk_errors(tmp_path):
        Path("/dev/full").write_bytes(b"x")


def test_redirects_on_this_machine(origin: Origin, store: ModelStore) -> None:
    source = origin.serve("/a", Reply(302, headers={"Location": "/b"}))
    origin.serve("/b", Reply(307, headers={"Location": f"{origin.url}/c"}))
    origin.serve("/c", Reply(body=WEIGHTS))
    assert store.fetch(source).name == "a.safetensors"
    assert origin.requests == ["/a", "/b", "/c"]


def test_redirects_end(origin: Origin, store: ModelStore) -> None:
    source = origin.serve("/a", Reply(302, headers={"Location": "/a"}))
    assert "redirects" in assert_refused(store, source, DownloadError)
    assert len(origin.requests) == 6


@pytest.mark.parametrize(
    ("start", "location"),
    [
        ("https://origin.test/a", "http://origin.test/a"),
        ("https://origin.test/a", "http://127.0.0.1/a"),
        ("https://origin.test/a", "ftp://origin.test/a"),
        ("https://origin.test/a", "file:///etc/passwd"),
        ("https://origin.test/a", "https://user:word@origin.test/a"),
        ("http://127.0.0.1/a", "http://origin.test/a"),
        ("http://127.0.0.1/a", "http://169.254.169.254/a"),
    ],
)
def test_no_redirect_leaves_https(tmp_path: Path, start: str, location: str) -> None:
    http = ScriptedHttp({start: (302, {"Location": location})})
    store = ModelStore(tmp_path, http=http)
    assert "redirects away from https" in assert_refused(store, Source(start), DownloadError)
    assert [url for url, _ in http.asked] == [start]


def test_a_redirect_that_is_not_a_url(tmp_path: Path) -> None:
    store = ModelStore(
        tmp_path,
        http=ScriptedHttp({"https://origin.test/a": (302, {"Location": "https://[::1/a"})}),
    )
    assert "not a URL" in assert_refused(store, Source("https://origin.test/a"), DownloadError)


def test_a_token_is_for_its_own_host_only(tmp_path: Path) -> None:
    first, second, third = (
        "https://civitai.com/api/download/models/7",
        "https://civitai.com/signed",
        "https://cdn.test/signed?key=1",
    )
    http = ScriptedHttp(
        {
            first: (307, {"Location": "/signed"}),
            second: (307, {"Location": third}),
            third: (200, {}),
        }
    )
    tokens = {**tokens_of({"CIVITAI_TOKEN": "SECRET"}), "cdn.test": "ANOTHER"}
    store = ModelStore(tmp_path, http=http, tokens=tokens)
    assert store.fetch(Source(first)).read_bytes() == WEIGHTS
    assert [url for url, _ in http.asked] == [first, second, third]
    sent = [headers.get("Authorization") for _, headers in http.asked]
    assert sent == ["Bearer SECRET", "Bearer SECRET", None]


def test_no_token_no_header() -> None:
    assert tokens_of({}) == tokens_of({"CIVITAI_TOKEN": " "}) == {}


@pytest.mark.parametrize("path", ["/../../evil.safetensors", "/a/%2e%2e/evil.safetensors"])
def test_names_do_not_leave_the_folder(origin: Origin, store: ModelStore, path: str) -> None:
    source = origin.serve(path, Reply(body=WEIGHTS))
    for ask in (store.fetch, store.path, store.content_hash, store.is_remote):
        with pytest.raises(CatalogError):
            ask(source)
    assert origin.requests == []


# -- many threads ------------------------------------------------------------------------------


def fetch_together(store: ModelStore, source: Source, release: threading.Event) -> list[Any]:
    """What each of 20 threads gets, the origin being held until all have asked."""

    def ask(_: int) -> Path | DownloadError:
        gate.wait()
        try:
            return store.fetch(source)
        except DownloadError as error:
            return error

    gate = threading.Barrier(21)
    with ThreadPoolExecutor(20) as pool:
        answers = pool.map(ask, range(20))
        gate.wait()
        time.sleep(0.2)
        release.set()
        return list(answers)


def test_twenty_threads_share_one_transfer(origin: Origin, store: ModelStore) -> None:
    release = threading.Event()
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS, hold=release))
    assert set(fetch_together(store, source, release)) == {store.path(source)}
    assert len(origin.requests) == 1


def test_twenty_threads_share_one_failure_and_a_later_one_tries_anew(
    origin: Origin, store: ModelStore
) -> None:
    release = threading.Event()
    source = origin.serve("/a.safetensors", Reply(404, hold=release), Reply(body=WEIGHTS))
    answers = fetch_together(store, source, release)
    assert {type(answer) for answer in answers} == {NotFoundUpstreamError}
    assert len(origin.requests) == 1
    assert store.fetch(source).read_bytes() == WEIGHTS


def test_two_sources_do_not_wait_for_each_other(origin: Origin, store: ModelStore) -> None:
    release = threading.Event()
    slow = origin.serve("/slow.safetensors", Reply(body=WEIGHTS, hold=release))
    quick = origin.serve("/quick.safetensors", Reply(body=WEIGHTS))
    with ThreadPoolExecutor(1) as pool:
        transfer = pool.submit(store.fetch, slow)
        while not origin.requests:
            time.sleep(0.005)
        assert store.fetch(quick).exists()
        assert not transfer.done()
        release.set()
        assert transfer.result().exists()


# -- hashes --------------------------------------------------------------------------------------


def test_the_hash_of_a_download_is_remembered_beside_it(
    origin: Origin, store: ModelStore, tmp_path: Path
) -> None:
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS))
    path = store.fetch(source)
    beside = path.with_name("a.safetensors.sha256")
    assert beside.read_text().split()[0] == sha256(WEIGHTS) == store.content_hash(source)
    # a later process believes it, instead of reading gigabytes again ...
    beside.write_text(beside.read_text().replace(sha256(WEIGHTS), "0" * 64))
    later = ModelStore(tmp_path / "models")
    assert later.content_hash(source) == "0" * 64
    # ... until the file is another one
    path.write_bytes(safetensors(65))
    assert later.content_hash(source) == sha256(safetensors(65))
    assert beside.read_text().split()[0] == sha256(safetensors(65))


@pytest.mark.parametrize("change", ["size", "hash"])
def test_a_file_that_is_not_the_catalogue_s_is_replaced(
    origin: Origin, store: ModelStore, change: str
) -> None:
    newer = safetensors(65 if change == "size" else 64, fill=b"\2")
    old = origin.serve("/a.safetensors", Reply(body=WEIGHTS), Reply(body=newer))
    path = store.fetch(old)
    size, digest = (len(newer), None) if change == "size" else (None, sha256(newer))
    new = Source(old.uri, size_bytes=size, sha256=digest)
    assert store.path(new) is None
    assert store.fetch(new) == path
    assert path.read_bytes() == newer
    assert store.content_hash(old) == sha256(newer)


# -- local files and those of the package --------------------------------------------------------


def test_a_local_file(store: ModelStore, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    source = Source(str(path))
    assert not store.is_remote(source)
    assert store.path(source) is None
    # a client may read it, so it holds no path of this server; the log does
    with (
        capture_logs() as events,
        pytest.raises(ModelFileError, match=r"^a\.safetensors does not exist"),
    ):
        store.fetch(source)
    assert [event["path"] for event in events] == [str(path)]
    path.write_bytes(WEIGHTS)
    assert store.path(source) == store.fetch(source) == path
    assert store.content_hash(source) == sha256(WEIGHTS)
    assert store.path(Source(str(path), sha256="0" * 64)) is None
    with pytest.raises(ModelFileError, match="is not what the catalogue says"):
        store.fetch(Source(str(path), sha256="0" * 64))
    assert list(tmp_path.iterdir()) == [path], "an operator's folder is not written to"


def test_asking_where_a_file_is_does_not_read_it(
    origin: Origin, store: ModelStore, tmp_path: Path
) -> None:
    path = store.fetch(origin.serve("/a.safetensors", Reply(body=WEIGHTS)))
    path.with_name("a.safetensors.sha256").unlink()
    assert store.path(Source(f"{origin.url}/a.safetensors")) == path
    assert not path.with_name("a.safetensors.sha256").exists()


def test_a_local_folder(store: ModelStore, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    source = Source(str(folder))
    (folder / "unet").mkdir(parents=True)
    (folder / "config.json").touch()
    assert store.path(source) == folder
    assert store.content_hash(source) is None, "no weights, no hash"
    (folder / "unet/a.safetensors").write_bytes(WEIGHTS)
    one = store.content_hash(source)
    assert one is not None and len(one) == 64
    assert store.content_hash(source) == one
    (folder / "unet/a.safetensors").rename(folder / "unet/b.safetensors")
    two = store.content_hash(source)
    (folder / "unet/b.safetensors").write_bytes(safetensors(65))
    assert len({one, two, store.content_hash(source)}) == 3


def test_what_the_package_does_not_ship(store: ModelStore) -> None:
    source = Source("package:no-such-model")
    assert not store.is_remote(source)
    assert store.path(source) is None
    with pytest.raises(ModelFileError, match=r"^no-such-model does not exist"):
        store.fetch(source)


def test_what_the_package_ships_is_beside_its_code() -> None:
    place = locate(Source("package:loras/a.safetensors"))
    folder = Path(catalog.__file__).parent / "embedded"
    assert place == LocalPlace(folder / "loras" / "a.safetensors")


# -- events --------------------------------------------------------------------------------------


def test_transfers_leave_events_without_secrets(origin: Origin, store: ModelStore) -> None:
    origin.serve("/a.safetensors", Reply(503), Reply(body=WEIGHTS))
    with capture_logs() as events:
        store.fetch(Source(f"{origin.url}/a.safetensors?token=SECRET"))
        with pytest.raises(NotFoundUpstreamError) as caught:
            store.fetch(Source(f"{origin.url}/b.safetensors?token=SECRET"))
    assert "SECRET" not in f"{events} {caught.value}"
    assert [event["event"] for event in events] == [
        "download_started",
        "download_interrupted",
        "download_finished",
        "download_started",
        "download_failed",
    ]
    assert events[0]["uri"] == f"{origin.url}/a.safetensors"
    assert events[2]["size_bytes"] == len(WEIGHTS)
    assert 0 <= events[2]["seconds"] < 60
    assert events[4]["code"] == "not_found_upstream"


# -- the Hugging Face Hub --------------------------------------------------------------------------


@pytest.fixture
def hub_store(origin: Origin, tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models", hub_endpoint=origin.url, manner=IMPATIENT)


REPOSITORY = {
    "model_index.json": b"{}",
    "README.md": b"hello",
    "run.py": b"raise SystemExit",
    "../evil.json": b"{}",
    "unet/config.json": b"{}",
    "unet/w.safetensors": safetensors(65),
    "unet/w.fp16.safetensors": WEIGHTS,
    "unet/w.bin": b"pickle",
    "unet/w.ckpt": b"pickle",
    "unet/w.pt": b"pickle",
    "unet/w.pth": b"pickle",
}
LFS = {name: sha256(body) for name, body in REPOSITORY.items() if "safetensors" in name}


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_repository_arrives_without_code_and_pickles(
    origin: Origin, hub_store: ModelStore, tmp_path: Path
) -> None:
    serve_repository(origin, REPOSITORY, LFS)
    source = Source("hf://acme/tiny")
    assert hub_store.is_remote(source)
    assert hub_store.path(source) is None
    folder = hub_store.fetch(source)
    assert folder == hub_store.path(source) == tmp_path / "models/huggingface.co/acme/tiny@main"
    assert names_in(folder) == {
        "model_index.json",
        "unet/config.json",
        "unet/w.safetensors",
        "unet/w.safetensors.sha256",
        "unet/w.fp16.safetensors",
        "unet/w.fp16.safetensors.sha256",
    }
    assert (folder / "unet/w.fp16.safetensors").read_bytes() == WEIGHTS
    asked = len(origin.requests)
    assert not [path for path in origin.requests if "evil" in path]
    assert hub_store.fetch(source) == folder
    assert len(origin.requests) == asked
    assert list((tmp_path / "models").rglob(".partial-*")) == []


def test_only_the_wanted_part_of_a_repository_arrives(
    origin: Origin, hub_store: ModelStore
) -> None:
    serve_repository(origin, REPOSITORY, LFS)
    fp16 = Source("hf://acme/tiny", files=("*/config.json", "unet/*.fp16.*"))
    texts = Source("hf://acme/tiny", files=("*.json",))
    folder = hub_store.fetch(fp16)
    assert names_in(folder) == {
        "unet/config.json",
        "unet/w.fp16.safetensors",
        "unet/w.fp16.safetensors.sha256",
    }
    assert hub_store.path(texts) is None, "another part of the repository is another folder"
    assert names_in(hub_store.fetch(texts)) == {"model_index.json", "unet/config.json"}
    assert hub_store.content_hash(texts) is None
    expected = sha256(f"{sha256(WEIGHTS)}  unet/w.fp16.safetensors\n".encode())
    assert hub_store.content_hash(fp16) == expected


def test_one_file_of_a_repository(origin: Origin, hub_store: ModelStore) -> None:
    serve_repository(origin, REPOSITORY, LFS)
    source = Source("hf://acme/tiny/unet/w.safetensors", sha256=LFS["unet/w.safetensors"])
    path = hub_store.fetch(source)
    assert path == hub_store.path(source)
    assert path.read_bytes() == REPOSITORY["unet/w.safetensors"]
    assert path.with_name("w.safetensors.sha256").exists()
    assert hub_store.path(Source("hf://acme/tiny")) is None, "the folder is not there for that"
    assert not [name for name in origin.requests if name.endswith(".json")]


@pytest.mark.parametrize(
    ("uri", "files"),
    [
        ("hf://acme/nothing", ()),
        ("hf://acme/tiny@v9", ()),
        ("hf://acme/tiny/gone.safetensors", ()),
        ("hf://acme/tiny", ("*.json", "vae/*.safetensors")),
        ("hf://acme/tiny", ("*.bin",)),
    ],
)
def test_what_the_hub_does_not_have(
    origin: Origin, hub_store: ModelStore, uri: str, files: tuple[str, ...]
) -> None:
    serve_repository(origin, REPOSITORY, LFS)
    assert_refused(hub_store, Source(uri, files=files), NotFoundUpstreamError)


def test_a_gated_repository(origin: Origin, hub_store: ModelStore) -> None:
    serve_repository(origin, REPOSITORY, LFS)
    path = f"/acme/tiny/resolve/{COMMIT}/model_index.json"
    origin.serve(path, Reply(403, headers={"X-Error-Code": "GatedRepo"}))
    assert_refused(hub_store, Source("hf://acme/tiny"), NotFoundUpstreamError)


def test_a_byte_flipped_on_the_way_from_the_hub(origin: Origin, hub_store: ModelStore) -> None:
    serve_repository(origin, REPOSITORY, LFS | {"unet/w.fp16.safetensors": "0" * 64})
    message = assert_refused(hub_store, Source("hf://acme/tiny"), BadWeightsError)
    assert "unet/w.fp16.safetensors" in message


def test_a_text_that_was_damaged_on_the_way_from_the_hub(
    origin: Origin, hub_store: ModelStore
) -> None:
    serve_repository(origin, REPOSITORY, LFS)
    origin.serve(f"/acme/tiny/resolve/{COMMIT}/unet/config.json", Reply(body=b"[]"))
    message = assert_refused(hub_store, Source("hf://acme/tiny"), ChecksumMismatchError)
    assert "unet/config.json" in message


def cut_in_the_last_file(origin: Origin, models: Path) -> Source:
    """A transfer that ended when a third of the last file was there."""
    path = f"/acme/tiny/resolve/{COMMIT}/unet/w.fp16.safetensors"
    whole = origin.replies[path][0]
    origin.serve(path, replace(whole, cut_after=len(whole.body) // 3), Reply(503))
    source = Source("hf://acme/tiny")
    with pytest.raises(DownloadError):
        ModelStore(models, hub_endpoint=origin.url, manner=IMPATIENT).fetch(source)
    origin.serve(path, whole)
    origin.asked.clear()
    return source


def test_a_cut_repository_goes_on_in_the_middle_of_a_file(
    origin: Origin, hub_store: ModelStore, tmp_path: Path
) -> None:
    serve_repository(origin, REPOSITORY, LFS)
    source = cut_in_the_last_file(origin, tmp_path / "models")
    folder = hub_store.fetch(source)
    assert (folder / "unet/w.fp16.safetensors").read_bytes() == WEIGHTS
    assert [asked.span for asked in origin.asked] == [None, (len(WEIGHTS) // 3, len(WEIGHTS))]
    assert list((tmp_path / "models").rglob(".partial-*")) == []


def test_a_repository_that_went_on_to_another_commit(
    origin: Origin, hub_store: ModelStore, tmp_path: Path
) -> None:
    serve_repository(origin, REPOSITORY, LFS)
    source = cut_in_the_last_file(origin, tmp_path / "models")
    newer = {"unet/w.safetensors": safetensors(66)}
    hashes = {name: sha256(body) for name, body in newer.items()}
    serve_repository(origin, newer, hashes, commit="d0" * 20)
    folder = hub_store.fetch(source)
    assert names_in(folder) == {"unet/w.safetensors", "unet/w.safetensors.sha256"}
    assert (folder / "unet/w.safetensors").read_bytes() == safetensors(66)
    assert list((tmp_path / "models").rglob(".partial-*")) == []


def test_the_hub_gets_its_own_token(
    origin: Origin, hub_store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    serve_repository(origin, {"a.json": b"{}"}, {})
    elsewhere = Origin()
    elsewhere.serve("/a.json", Reply(body=b"{}"))
    moved = Reply(302, headers={"Location": f"{elsewhere.url}/a.json"})
    origin.serve(f"/acme/tiny/resolve/{COMMIT}/a.json", moved)
    hub_store.fetch(Source("hf://acme/tiny"))
    elsewhere.close()
    sent = [asked.headers.get("authorization") for asked in origin.asked]
    assert sent == ["Bearer hf_SECRET"] * 2
    assert [asked.headers.get("authorization") for asked in elsewhere.asked] == [None]


def test_a_pickle_in_a_repository(origin: Origin, hub_store: ModelStore) -> None:
    body = pickle.dumps(list(range(99)))
    serve_repository(origin, {"a.safetensors": body}, {"a.safetensors": sha256(body)})
    assert_refused(hub_store, Source("hf://acme/tiny"), BadWeightsError)


def test_a_hub_that_recovers(origin: Origin, hub_store: ModelStore) -> None:
    serve_repository(origin, REPOSITORY, LFS)
    origin.replies["/api/models/acme/tiny/revision/main"].insert(0, Reply(502))
    assert hub_store.fetch(Source("hf://acme/tiny")).is_dir()


def test_a_hub_that_is_not_there(origin: Origin, hub_store: ModelStore) -> None:
    origin.close()
    message = assert_refused(hub_store, Source("hf://acme/tiny"), DownloadError)
    assert "\n" not in message


def test_a_name_that_the_hub_cannot_have(hub_store: ModelStore) -> None:
    assert_refused(hub_store, Source("hf://acme/a--b"), DownloadError)


@pytest.mark.parametrize("commit", ["../../evil", "", "main"])
def test_a_commit_that_is_none(origin: Origin, hub_store: ModelStore, commit: str) -> None:
    serve_repository(origin, REPOSITORY, LFS, commit=commit)
    assert "commit" in assert_refused(hub_store, Source("hf://acme/tiny"), DownloadError)


def test_a_repository_larger_than_the_disk(origin: Origin, hub_store: ModelStore) -> None:
    info = {
        "id": "acme/tiny",
        "sha": COMMIT,
        "siblings": [{"rfilename": "a.safetensors", "size": 10**18}],
    }
    origin.serve("/api/models/acme/tiny/revision/main", Reply(body=json.dumps(info).encode()))
    assert_refused(hub_store, Source("hf://acme/tiny"), DiskFullError)
    assert origin.requests == ["/api/models/acme/tiny/revision/main"]


# -- the gate -----------------------------------------------------------------------------------


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def a_zip() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return buffer.getvalue()


@pytest.mark.parametrize("content", [WEIGHTS, safetensors(0), with_header(b"{}")])
def test_whole_files_pass(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    verify_safetensors(path)


HOLE = b'{"w":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}'


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(pickle.dumps(list(range(99))), id="pickle"),
        pytest.param(a_zip(), id="zip"),
        pytest.param(WEIGHTS[:-1], id="truncated data"),
        pytest.param(WEIGHTS[:20], id="truncated header"),
        pytest.param(WEIGHTS + b"\0", id="bytes behind"),
        pytest.param(struct.pack("<Q", 100_000_001) + b"{}", id="giant header"),
        pytest.param(struct.pack("<Q", 1000) + b"{}", id="header beyond the file"),
        pytest.param(with_header(b"{{{{"), id="no JSON"),
        pytest.param(with_header(b"[1]"), id="no object"),
        pytest.param(with_header(b"[" * 100_000), id="deep JSON"),
        pytest.param(with_header(HOLE, b"\0" * 4), id="hole"),
    ],
)
def test_everything_else_does_not(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadWeightsError, match=r"a\.safetensors is not a whole safetensors file: "):
        verify_safetensors(path)
