"""Transfers that are cut, killed, lied to, asked for twice: real origins, files, processes."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import urllib3
from structlog.testing import capture_logs

from experimance_controlnet.catalog.backoff import Backoff
from experimance_controlnet.catalog.job import Manner
from experimance_controlnet.catalog.location import locate
from experimance_controlnet.catalog.progress import Progress, Transfer
from experimance_controlnet.catalog.specs import Source
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.errors import (
    CatalogError,
    ChecksumMismatchError,
    DiskFullError,
    DownloadError,
    ModelFileError,
    NotFoundUpstreamError,
)
from tests.disk import fill, small_disk
from tests.origin import Origin, Reply
from tests.tls import Proxy, certificate, server_context
from tests.weights import safetensors, sha256

ROOT = Path(__file__).parents[2]
STEP = 1 << 16
WEIGHTS = safetensors(1_000_000, os.urandom(1_000_000))
SIZE = len(WEIGHTS)
V1, V2 = '"one"', '"two"'
WAIT_S = 20.0


def manner(**changes: Any) -> Manner:
    """Small ranges, no pauses, two tries."""
    usual: dict[str, Any] = {
        "connections": 4,
        "range_bytes": STEP,
        "save_every_s": 0.01,
        "backoff": Backoff(tries=2, first_s=0.0),
    }
    return Manner(**(usual | changes))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def store(models: Path) -> ModelStore:
    return ModelStore(models, manner=manner())


def until(condition: Callable[[], Any]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def asked_bytes(origin: Origin) -> int:
    return sum(min(span[1], SIZE) - span[0] for asked in origin.asked if (span := asked.span))


def begin(origin: Origin, models: Path, reply: Reply | None = None) -> Source:
    """A transfer that an earlier process left in its middle: half of it is there."""
    half = Reply(body=WEIGHTS, etag=V1, cut_after=SIZE // 2)
    source = origin.serve("/a.safetensors", half)
    once = manner(connections=1, range_bytes=SIZE, backoff=Backoff(tries=1))
    with pytest.raises(DownloadError, match="broke off"):
        ModelStore(models, manner=once).fetch(source)
    assert partials(models) != []
    origin.asked.clear()
    if reply is not None:
        origin.serve("/a.safetensors", reply)
    return source


def partials(models: Path) -> list[Path]:
    return list(models.rglob(".partial-*"))


def journal(models: Path) -> Path:
    (path,) = models.rglob(".partial-*/journal")
    return path


# -- ranges ----------------------------------------------------------------------------------------


def test_ranges_come_in_parallel_and_each_byte_once(origin: Origin, store: ModelStore) -> None:
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS, etag=V1))
    assert store.fetch(source).read_bytes() == WEIGHTS
    assert store.content_hash(source) == sha256(WEIGHTS)
    spans = sorted(asked.span or (0, 0) for asked in origin.asked)
    assert spans[0][0] == 0
    assert [end for _, end in spans[:-1]] == [start for start, _ in spans[1:]]
    assert all(end - start <= STEP for start, end in spans)
    conditions = [asked.headers.get("if-range") for asked in origin.asked]
    assert conditions == [None] + [V1] * (len(spans) - 1)
    assert 1 < origin.connections <= 4, "and connections are used again"


def test_a_date_will_do_where_there_is_no_etag(origin: Origin, store: ModelStore) -> None:
    date = "Wed, 21 Oct 2026 07:28:00 GMT"
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS, changed=date))
    assert store.fetch(source).read_bytes() == WEIGHTS
    assert origin.asked[1].headers["if-range"] == date


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(Reply(body=WEIGHTS), id="range ignored"),
        pytest.param(Reply(416), id="416 to any range"),
        pytest.param(
            Reply(206, WEIGHTS[:STEP], {"Content-Range": f"bytes 0-{STEP - 1}/{SIZE}"}),
            id="no name for the state of the file",
        ),
        pytest.param(
            Reply(
                206,
                WEIGHTS[:STEP],
                {"Content-Range": f"bytes 0-{STEP - 1}/{SIZE}", "ETag": 'W/"weak"'},
            ),
            id="a weak ETag",
        ),
        pytest.param(
            Reply(
                206,
                WEIGHTS[:STEP],
                {"Content-Range": f"bytes 0-{STEP - 1}/*", "ETag": V1},
            ),
            id="no length",
        ),
        pytest.param(
            Reply(
                206,
                WEIGHTS[7:STEP],
                {"Content-Range": f"bytes 7-{STEP - 1}/{SIZE}", "ETag": V1},
            ),
            id="another range than asked for",
        ),
    ],
)
def test_where_ranges_are_not_safe_there_is_one_stream(
    origin: Origin, store: ModelStore, models: Path, first: Reply
) -> None:
    source = origin.serve("/a.safetensors", first, Reply(body=WEIGHTS))
    assert store.fetch(source).read_bytes() == WEIGHTS
    assert [asked.span is None for asked in origin.asked[1:]] in ([], [True])
    assert partials(models) == []


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(206, WEIGHTS[:9], {"ETag": V1}), "without saying which"),
        (Reply(206, WEIGHTS[:9], {"Content-Range": f"bytes 0-9/{SIZE}", "ETag": V1}), "contradict"),
        (Reply(206, b"", {"Content-Range": f"bytes 5-4/{SIZE}", "ETag": V1}), "contradict"),
        (Reply(206, WEIGHTS[:9], {"Content-Range": "bytes 0-8/5", "ETag": V1}), "contradict"),
        (Reply(body=WEIGHTS, headers={"Content-Encoding": "gzip"}), "compressed"),
        (Reply(204), "answers 204"),
        (Reply(418), "answers 418"),
    ],
)
def test_an_answer_that_makes_no_sense(
    origin: Origin, store: ModelStore, models: Path, reply: Reply, reason: str
) -> None:
    source = origin.serve("/a.safetensors", reply)
    with pytest.raises(DownloadError, match=reason):
        store.fetch(source)
    assert len(origin.asked) == 1
    assert partials(models) == []


def test_an_origin_that_allows_few_connections(origin: Origin, store: ModelStore) -> None:
    good, full = Reply(body=WEIGHTS, etag=V1), Reply(503)
    source = origin.serve("/a.safetensors", good, full, full, full, good)
    with capture_logs() as events:
        assert store.fetch(source).read_bytes() == WEIGHTS
    assert "download_interrupted" not in [event["event"] for event in events]


def test_an_address_that_expires_is_asked_for_again(origin: Origin, store: ModelStore) -> None:
    good, expired = Reply(body=WEIGHTS, etag=V1), Reply(403)
    source = origin.serve("/a", Reply(302, headers={"Location": "/signed?for=one"}))
    origin.serve("/signed", good, *[expired] * 4, good)
    assert store.fetch(source).read_bytes() == WEIGHTS
    assert origin.requests.count("/a") == 2


# -- resuming --------------------------------------------------------------------------------------


def test_a_cut_transfer_goes_on_where_it_was(origin: Origin, store: ModelStore) -> None:
    whole = Reply(body=WEIGHTS, etag=V1)
    cut = Reply(body=WEIGHTS, etag=V1, cut_after=STEP // 3)
    source = origin.serve("/a.safetensors", whole, *[cut] * 8, whole)
    assert store.fetch(source).read_bytes() == WEIGHTS
    assert origin.sent_bytes == SIZE, "nothing is sent twice"


def test_progress_resets_the_count_of_tries(origin: Origin, models: Path) -> None:
    one = ModelStore(models, manner=manner(connections=1, range_bytes=SIZE))
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS, etag=V1, cut_after=SIZE // 10))
    assert one.fetch(source).read_bytes() == WEIGHTS
    assert len(origin.asked) == 10


def test_without_ranges_a_cut_is_no_progress(origin: Origin, models: Path) -> None:
    store = ModelStore(models, manner=manner(backoff=Backoff(tries=5, first_s=0.0)))
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS, cut_after=SIZE // 10))
    with pytest.raises(DownloadError):
        store.fetch(source)
    assert len(origin.asked) == 5
    assert partials(models) == []


def test_a_later_process_fetches_only_what_is_missing(
    origin: Origin, store: ModelStore, models: Path
) -> None:
    source = begin(origin, models, Reply(body=WEIGHTS, etag=V1))
    with capture_logs() as events:
        assert store.fetch(source).read_bytes() == WEIGHTS
    assert asked_bytes(origin) == SIZE - SIZE // 2
    assert store.content_hash(source) == sha256(WEIGHTS)
    resumed = next(event for event in events if event["event"] == "download_resumed")
    assert resumed["done_bytes"] == SIZE // 2
    assert partials(models) == []


def test_an_origin_that_understands_no_conditions(
    origin: Origin, store: ModelStore, models: Path
) -> None:
    reply = Reply(body=WEIGHTS, etag=V1, dislikes_conditions=True)
    source = begin(origin, models, reply)
    assert store.fetch(source).read_bytes() == WEIGHTS
    conditions = [asked for asked in origin.asked if "if-range" in asked.headers]
    assert len(conditions) == 1, "it is not asked so again"
    parts = [asked.span or (0, 0) for asked in origin.asked[1:]]
    assert sum(end - start for start, end in parts) == SIZE - SIZE // 2


OTHER = safetensors(900_000, os.urandom(900_000))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param([Reply(body=OTHER, etag=V2)], id="changed"),
        pytest.param([Reply(body=OTHER, etag=V1)], id="another length under the same ETag"),
        pytest.param([Reply(body=OTHER)], id="range ignored"),
        pytest.param([Reply(416), Reply(body=OTHER, etag=V2)], id="416"),
        pytest.param(
            [
                Reply(
                    206,
                    OTHER[SIZE // 2 : SIZE // 2 + STEP],
                    {
                        "Content-Range": f"bytes {SIZE // 2}-{SIZE // 2 + STEP - 1}/{len(OTHER)}",
                        "ETag": V2,
                    },
                ),
                Reply(body=OTHER, etag=V2),
            ],
            id="If-Range ignored",
        ),
    ],
)
def test_what_is_on_disk_of_another_file_is_not_used(
    origin: Origin, store: ModelStore, models: Path, change: list[Reply]
) -> None:
    source = begin(origin, models)
    origin.serve("/a.safetensors", *change)
    with capture_logs() as events:
        assert store.fetch(source).read_bytes() == OTHER
    assert "download_begins_anew" in [event["event"] for event in events]
    assert store.content_hash(source) == sha256(OTHER)
    assert partials(models) == []


def test_a_file_that_changes_in_mid_transfer(origin: Origin, store: ModelStore) -> None:
    old, new = Reply(body=WEIGHTS, etag=V1), Reply(body=OTHER, etag=V2)
    source = origin.serve("/a.safetensors", old, old, old, new)
    assert store.fetch(source).read_bytes() == OTHER


def test_a_file_that_changes_all_the_time(origin: Origin, store: ModelStore, models: Path) -> None:
    replies = [Reply(body=WEIGHTS, etag=f'"{number}"') for number in range(100)]
    source = origin.serve("/a.safetensors", *replies)
    with pytest.raises(DownloadError, match="changes while it is fetched"):
        store.fetch(source)
    assert partials(models) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda note: b"",
        lambda note: b"{",
        lambda note: b"[]",
        lambda note: json.dumps(note | {"format": 2}),
        lambda note: json.dumps(note | {"version": None}),
        lambda note: json.dumps(note | {"size_bytes": 10**9}),
        lambda note: json.dumps(note | {"size_bytes": "1"}),
        lambda note: json.dumps(note | {"done": [[0, 10**9]]}),
        lambda note: json.dumps(note | {"done": [[-5, 10]]}),
        lambda note: json.dumps(note | {"done": [[10, 20], [5, 15]]}),
        lambda note: json.dumps(note | {"done": [[0, 1.5]]}),
        lambda note: json.dumps(note | {"done": [5]}),
    ],
)
def test_a_journal_that_makes_no_sense_is_not_believed(
    origin: Origin, store: ModelStore, models: Path, change: Callable[[Any], str | bytes]
) -> None:
    source = begin(origin, models, Reply(body=WEIGHTS, etag=V1))
    text = change(json.loads(journal(models).read_bytes()))
    journal(models).write_bytes(text.encode() if isinstance(text, str) else text)
    assert store.fetch(source).read_bytes() == WEIGHTS
    assert asked_bytes(origin) == SIZE


def test_a_file_that_was_all_there_is_confirmed_by_the_origin(
    origin: Origin, store: ModelStore, models: Path
) -> None:
    source = begin(origin, models, Reply(body=WEIGHTS, etag=V1))
    note = json.loads(journal(models).read_bytes())
    (data,) = models.rglob(".partial-*/*.safetensors")
    data.write_bytes(WEIGHTS)
    journal(models).write_text(json.dumps(note | {"done": [[0, SIZE]]}))
    assert store.fetch(source).read_bytes() == WEIGHTS
    assert [asked.span for asked in origin.asked] == [(SIZE - 1, SIZE)]


def test_bytes_that_suffered_on_the_disk_are_fetched_again(
    origin: Origin, store: ModelStore, models: Path
) -> None:
    uri = begin(origin, models, Reply(body=WEIGHTS, etag=V1)).uri
    (data,) = models.rglob(".partial-*/*.safetensors")
    with data.open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    source = Source(uri, sha256=sha256(WEIGHTS))
    assert store.fetch(source).read_bytes() == WEIGHTS
    assert asked_bytes(origin) == SIZE + SIZE - SIZE // 2


def test_a_flipped_byte_on_the_way(origin: Origin, store: ModelStore, models: Path) -> None:
    damaged = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])
    uri = origin.serve("/a.safetensors", Reply(body=damaged, etag=V1)).uri
    with pytest.raises(ChecksumMismatchError, match="sha256"):
        store.fetch(Source(uri, sha256=sha256(WEIGHTS)))
    assert asked_bytes(origin) == SIZE, "the origin would send the same again"
    assert [path for path in models.rglob("*") if path.is_file()] == []


def test_a_token_that_expired_does_not_cost_what_is_there(
    origin: Origin, store: ModelStore, models: Path
) -> None:
    source = begin(origin, models, Reply(403))
    with pytest.raises(NotFoundUpstreamError):
        store.fetch(source)
    origin.serve("/a.safetensors", Reply(body=WEIGHTS, etag=V1))
    origin.asked.clear()
    assert store.fetch(source).read_bytes() == WEIGHTS
    assert asked_bytes(origin) == SIZE - SIZE // 2


# -- slow and silent origins -----------------------------------------------------------------------


@pytest.mark.parametrize("etag", [V1, None])
def test_a_slow_drip(origin: Origin, models: Path, etag: str | None) -> None:
    slow = manner(slow_after_s=0.2)
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS, etag=etag, drip_s=0.1))
    started_s = time.monotonic()
    with pytest.raises(DownloadError, match=r"sends less than 256 kB in 0\.2 s"):
        ModelStore(models, manner=slow).fetch(source)
    assert time.monotonic() - started_s < 5


def test_one_slow_connection_is_replaced(origin: Origin, models: Path) -> None:
    slow = manner(slow_after_s=0.4)
    good, drip = Reply(body=WEIGHTS, etag=V1), Reply(body=WEIGHTS, etag=V1, drip_s=1.0)
    source = origin.serve("/a.safetensors", good, drip, good)
    started_s = time.monotonic()
    assert ModelStore(models, manner=slow).fetch(source).read_bytes() == WEIGHTS
    assert time.monotonic() - started_s < 5, "the drip alone would take 16 s"


def test_a_silent_origin(origin: Origin, models: Path) -> None:
    quick = manner(silence_s=0.2)
    silent = Reply(body=WEIGHTS, etag=V1, hold=threading.Event())
    source = origin.serve("/a.safetensors", silent, Reply(body=WEIGHTS, etag=V1))
    assert ModelStore(models, manner=quick).fetch(source).read_bytes() == WEIGHTS


def test_pauses_grow_up_to_a_limit_and_heed_the_origin() -> None:
    backoff = Backoff(first_s=1.0, most_s=60.0)
    for failures, usual_s in ((1, 1.0), (2, 2.0), (3, 4.0), (10, 60.0), (10_000, 60.0)):
        pauses = [backoff.pause_s(failures, None) for _ in range(50)]
        assert usual_s / 2 <= min(pauses) < max(pauses) <= usual_s
    assert backoff.pause_s(1, 17.0) == 17.0
    assert backoff.pause_s(1, 9999.0) == 60.0


# -- processes -------------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
from experimance_controlnet.catalog.job import Manner
from experimance_controlnet.catalog.specs import Source
from experimance_controlnet.catalog.store import ModelStore
store = ModelStore(Path(sys.argv[1]), manner=Manner(range_bytes=65536, save_every_s=0.01))
print(store.fetch(Source(sys.argv[2])), flush=True)
"""


def start_child(models: Path, source: Source, code: str = CHILD) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, str(models), source.uri]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_killed_process_leaves_what_the_next_one_goes_on_with(
    origin: Origin, store: ModelStore, models: Path
) -> None:
    slow = Reply(body=WEIGHTS, etag=V1, drip_s=0.02)
    source = origin.serve("/a.safetensors", slow)
    child = start_child(models, source)
    done = 0
    try:

        def half_is_saved() -> bool:
            nonlocal done
            for path in models.rglob(".partial-*/journal"):
                done = sum(end - start for start, end in json.loads(path.read_bytes())["done"])
            return done > SIZE // 3

        until(half_is_saved)
    finally:
        child.kill()
        child.communicate()
    done = sum(end - start for start, end in json.loads(journal(models).read_bytes())["done"])
    assert SIZE // 3 < done < SIZE
    assert store.path(source) is None
    assert [path.name for path in models.rglob("*.lock")] == [".partial-a.safetensors.lock"]
    until(lambda: origin.open_connections == 0)  # the dead one's requests have been read
    origin.serve("/a.safetensors", Reply(body=WEIGHTS, etag=V1))
    origin.asked.clear()
    path = store.fetch(source)
    assert path.read_bytes() == WEIGHTS
    assert asked_bytes(origin) == SIZE - done
    assert {file.name for file in models.rglob("*") if file.is_file()} == {
        path.name,
        f"{path.name}.sha256",
    }


def test_two_processes_share_one_transfer(origin: Origin, store: ModelStore, models: Path) -> None:
    hold = threading.Event()
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS, etag=V1, hold=hold))
    first = start_child(models, source)
    until(lambda: origin.asked)
    second = start_child(models, source)
    for line in second.stdout or ():
        if "download_awaited" in line:
            break
    hold.set()
    for child in (first, second):
        output, _ = child.communicate(timeout=WAIT_S)
        assert child.returncode == 0, output
        assert output.splitlines()[-1] == str(store.path(source))
    assert asked_bytes(origin) == SIZE


def test_who_waits_takes_over_from_a_killed_process(
    origin: Origin, store: ModelStore, models: Path
) -> None:
    hold = threading.Event()
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS, etag=V1, hold=hold))
    child = start_child(models, source)
    until(lambda: origin.asked)
    with capture_logs() as events:
        waiting = threading.Thread(target=store.fetch, args=(source,))
        waiting.start()
        until(lambda: "download_awaited" in [event["event"] for event in events])
        child.kill()
        child.communicate()
        hold.set()
        waiting.join(WAIT_S)
    path = store.path(source)
    assert path is not None and path.read_bytes() == WEIGHTS


CHATTY_CHILD = """
import sys, traceback
from pathlib import Path
from urllib.parse import urlsplit
from experimance_controlnet.catalog.backoff import Backoff
from experimance_controlnet.catalog.job import Manner
from experimance_controlnet.catalog.specs import Source
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.errors import ModelFileError
from experimance_controlnet.logs import configure_logging
folder, *uris = sys.argv[1:]
configure_logging("debug", Path(folder, "model.log"))
manner = Manner(silence_s=0.2, backoff=Backoff(tries=2, first_s=0))
store = ModelStore(Path(folder), manner=manner, tokens={urlsplit(uris[0]).netloc: "SECRET"})
for uri in uris:
    try:
        store.fetch(Source(uri + "?token=SECRET"))
    except ModelFileError:
        traceback.print_exc()
"""


def test_no_fault_shows_a_secret(origin: Origin, models: Path) -> None:
    """Whatever goes wrong: no query, no token in messages, causes, logs, also of libraries."""
    dead = Origin()
    dead.close()
    faults = {
        "/404": Reply(404),
        "/503": Reply(503),
        "/cut": Reply(body=WEIGHTS, cut_after=9),
        "/header": Reply(body=b"x", headers={"no header": "\r\nat all"}),
        "/away": Reply(302, headers={"Location": "http://192.0.2.1/?key=SECRET"}),
        "/bad": Reply(302, headers={"Location": "http://[::1/?key=SECRET"}),
        "/dead": Reply(302, headers={"Location": f"{dead.url}/?key=SECRET"}),
        "/silent": Reply(body=WEIGHTS, hold=threading.Event()),
        "/pickle": Reply(body=pickle.dumps(list(range(99)))),
    }
    uris = [origin.serve(path, reply).uri for path, reply in faults.items()]
    models.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CHATTY_CHILD, str(models), *uris],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    )
    said = done.stdout + done.stderr + (models / "model.log").read_text()
    assert said.count("Traceback") >= len(faults)
    assert origin.asked[0].headers["authorization"] == "Bearer SECRET"
    assert [line for line in said.splitlines() if "SECRET" in line] == []


# -- encrypted connections -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def secure(trusted: Path) -> Iterator[Origin]:
    origin = Origin(server_context(trusted))
    yield origin
    origin.close()


def run_child(models: Path, source: Source, **variables: str) -> tuple[int, str]:
    """Exit status, and the last line of what it says."""
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(models), source.uri],
        cwd=ROOT,
        env=clean | variables,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    return done.returncode, (done.stderr + done.stdout).splitlines()[-1]


def test_https_with_cuts(secure: Origin, store: ModelStore, models: Path, trusted: Path) -> None:
    whole = Reply(body=WEIGHTS, etag=V1)
    cut = Reply(body=WEIGHTS, etag=V1, cut_after=STEP // 3)
    source = secure.serve("/a.safetensors", whole, *[cut] * 5, whole)
    status, said = run_child(models, source, SSL_CERT_FILE=str(trusted))
    assert status == 0, said
    assert Path(said).read_bytes() == WEIGHTS
    assert store.content_hash(source) == sha256(WEIGHTS)


def test_an_authority_that_is_not_trusted(secure: Origin, models: Path) -> None:
    source = secure.serve("/a.safetensors", Reply(body=WEIGHTS, etag=V1))
    status, said = run_child(models, source)
    assert status == 1
    assert "certificate is not trusted" in said
    assert secure.asked == []


def test_a_proxy_of_the_environment(secure: Origin, models: Path, trusted: Path) -> None:
    source = secure.serve("/a.safetensors", Reply(body=WEIGHTS, etag=V1))
    proxy = Proxy(secure.port)
    moved = Source(source.uri.replace("127.0.0.1", "origin.test"))
    variables = {"SSL_CERT_FILE": str(trusted), "HTTPS_PROXY": proxy.url}
    status, said = run_child(models, moved, **variables)
    proxy.close()
    assert status == 0, said
    assert proxy.asked
    assert all(line.startswith(f"CONNECT origin.test:{secure.port} ") for line in proxy.asked)


def test_what_an_interrupted_connection_still_says_is_not_kept(models: Path) -> None:
    """As TLS does: after the interruption come bytes that were never decrypted."""
    http = InterruptedHttp()
    source = Source("https://origin.test/a.safetensors")
    two = manner(connections=2, range_bytes=SIZE // 2)
    with pytest.raises(DownloadError, match="answers 418"):
        ModelStore(models, manner=two, http=http).fetch(source)
    assert http.interrupted.is_set()
    note = json.loads(journal(models).read_bytes())
    (data,) = models.rglob(".partial-*/*.safetensors")
    content = data.read_bytes()
    assert note["done"] == [[0, 1000]]
    assert content[:1000] == WEIGHTS[:1000]
    assert b"garbage" not in content


class InterruptedHttp:
    """The first answer waits after 1000 bytes until it is interrupted; any other is a 418."""

    def __init__(self) -> None:
        self.waits = threading.Event()
        self.interrupted = threading.Event()

    def request(
        self, method: str, url: str, *, headers: Mapping[str, str], **options: bool
    ) -> urllib3.BaseHTTPResponse:
        if "If-Range" in headers:
            self.waits.wait(WAIT_S)
            return urllib3.HTTPResponse(b"", status=418, preload_content=False)
        end = SIZE // 2
        sent = {"ETag": V1, "Content-Range": f"bytes 0-{end - 1}/{SIZE}"}
        return InterruptedResponse(self, sent)

    def clear(self) -> None:
        pass


class InterruptedResponse(urllib3.HTTPResponse):
    def __init__(self, http: InterruptedHttp, headers: Mapping[str, str]) -> None:
        super().__init__(headers=headers, status=206, preload_content=False)
        self._http = http

    def read(
        self,
        amt: int | None = None,
        decode_content: bool | None = None,
        cache_content: bool = False,
    ) -> bytes:
        if not self._http.waits.is_set():
            self._http.waits.set()
            return WEIGHTS[:1000]
        self._http.interrupted.wait(WAIT_S)
        return b"garbage"

    def shutdown(self) -> None:
        self._http.interrupted.set()


# -- the disk --------------------------------------------------------------------------------------


@pytest.fixture(name="small_disk")
def _small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


def test_a_disk_that_fills_up_in_mid_transfer(origin: Origin, small_disk: Path) -> None:
    hold = threading.Event()
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS, etag=V1, hold=hold))
    store = ModelStore(small_disk / "models", manner=manner(range_bytes=SIZE))
    caught: list[BaseException] = []

    def fetch() -> None:
        try:
            store.fetch(source)
        except ModelFileError as error:
            caught.append(error)

    thread = threading.Thread(target=fetch)
    thread.start()
    until(lambda: [status for status in store.downloads() if status.done_bytes])
    fill(small_disk / "filler")
    hold.set()
    thread.join(WAIT_S)
    assert [type(error) for error in caught] == [DiskFullError]
    assert [path for path in (small_disk / "models").rglob("*") if path.is_file()] == []
    (small_disk / "filler").unlink()
    assert store.fetch(source).read_bytes() == WEIGHTS


def test_a_file_system_that_takes_no_larger_files(origin: Origin, models: Path) -> None:
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS))  # no ranges: it grows
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
    child = start_child(models, source, limit + CHILD)
    output, _ = child.communicate(timeout=WAIT_S)
    assert child.returncode == 1
    assert output.splitlines()[-1].endswith("File too large")
    assert "ModelFileError" in output.splitlines()[-1]
    assert [path for path in models.rglob("*") if path.is_file()] == []


def test_what_a_partial_holds_counts_as_free(origin: Origin, small_disk: Path) -> None:
    """Room for half of the file beyond the reserve: not enough to begin, enough to go on."""
    models = small_disk / "models"
    models.mkdir()
    source = begin(origin, models, Reply(body=WEIGHTS, etag=V1))
    other = origin.serve("/b.safetensors", Reply(body=WEIGHTS, etag=V1))
    free_bytes = shutil.disk_usage(small_disk).free
    with (small_disk / "filler").open("wb") as filler:
        filler.write(bytes(free_bytes - (256 << 20) - SIZE * 3 // 4))
    store = ModelStore(models, manner=manner())
    with pytest.raises(DiskFullError, match="GB free"):
        store.fetch(other)
    assert store.fetch(source).read_bytes() == WEIGHTS


@pytest.mark.parametrize("link", ["host", "bucket", "partial"])
def test_no_link_leads_a_transfer_out_of_the_folder(
    origin: Origin, store: ModelStore, models: Path, tmp_path: Path, link: str
) -> None:
    source = origin.serve("/bucket/a.safetensors", Reply(body=WEIGHTS, etag=V1))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    host = models / f"127.0.0.1_{origin.port}"
    place = {
        "host": host,
        "bucket": host / "bucket",
        "partial": host / "bucket" / ".partial-a.safetensors",
    }[link]
    place.parent.mkdir(parents=True)
    place.symlink_to(elsewhere)
    with pytest.raises(ModelFileError, match="symbolic link"):
        store.fetch(source)
    assert list(elsewhere.iterdir()) == []
    assert origin.asked == []


def test_no_link_is_written_through(
    origin: Origin, store: ModelStore, models: Path, tmp_path: Path
) -> None:
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS, etag=V1))
    secret = tmp_path / "secret"
    secret.write_text("kept")
    partial = models / f"127.0.0.1_{origin.port}" / ".partial-a.safetensors"
    partial.mkdir(parents=True)
    (partial / "a.safetensors").symlink_to(secret)
    with pytest.raises(ModelFileError, match="symbolic links"):
        store.fetch(source)
    assert secret.read_text() == "kept"


# -- buckets ---------------------------------------------------------------------------------------


def test_an_object_of_a_bucket(origin: Origin, models: Path) -> None:
    store = ModelStore(models, manner=manner(), gcs_endpoint=origin.url)
    etag = f'"{hashlib.md5(WEIGHTS).hexdigest()}"'
    origin.serve("/experimance_models/v1/moss%20%23.safetensors", Reply(body=WEIGHTS, etag=etag))
    source = Source("gs://experimance_models/v1/moss #.safetensors")
    path = store.fetch(source)
    assert path.read_bytes() == WEIGHTS
    place = "storage.googleapis.com/experimance_models/v1/moss%20%23.safetensors"
    assert path.relative_to(models).as_posix() == place
    assert store.path(Source(f"https://{place}")) == path, "one object, one file"


@pytest.mark.parametrize(
    "uri",
    [
        "gs://",
        "gs://bucket",
        "gs://bucket/",
        "gs://Bucket/a",
        "gs://bucket/../a",
        "gs://bucket//a",
        "gs://bucket/a/",
        "gs://../a/b",
        "gs://bucket/a.ckpt",
    ],
)
def test_what_is_no_object_of_a_bucket(uri: str) -> None:
    with pytest.raises(CatalogError):
        locate(Source(uri))


# -- progress --------------------------------------------------------------------------------------


def test_progress_can_be_seen_from_another_thread(origin: Origin, models: Path) -> None:
    hold = threading.Event()
    store = ModelStore(models, manner=manner(range_bytes=SIZE), progress=Progress(0.02))
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS, etag=V1, hold=hold))
    assert store.downloads() == []
    with capture_logs() as events:
        thread = threading.Thread(target=store.fetch, args=(source,))
        thread.start()
        until(lambda: [status for status in store.downloads() if status.done_bytes])
        (status,) = store.downloads()
        assert status.name == f"127.0.0.1_{origin.port}/a.safetensors"
        assert 0 < status.done_bytes <= SIZE // 2 + 1
        assert status.total_bytes == SIZE
        assert status.bytes_per_s > 0
        until(lambda: "download_progress" in [event["event"] for event in events])
        hold.set()
        thread.join(WAIT_S)
    assert store.downloads() == []


def test_a_rate_is_that_of_the_last_seconds() -> None:
    now = 100.0
    transfer = Transfer("a", clock=lambda: now)
    transfer.begin_file(1000, 400)
    assert transfer.status().bytes_per_s == 0
    for _ in range(20):
        now += 1
        transfer.add(10)
    assert transfer.status().bytes_per_s == pytest.approx(10, rel=0.3)
    assert transfer.status().done_bytes == 600
    now += 5
    assert transfer.status().bytes_per_s == 0, "nothing came for as long as the rate looks back"
    transfer.begin_file(1000, 0)
    assert transfer.status().done_bytes == 0


def test_the_progress_of_several_files_is_one() -> None:
    transfer = Transfer("a")
    transfer.plan(300)
    transfer.begin_file(100, 0)
    transfer.add(100)
    transfer.end_file()
    transfer.begin_file(200, 50)
    assert (transfer.status().done_bytes, transfer.status().total_bytes) == (150, 300)


def test_nothing_stays_open(origin: Origin, models: Path) -> None:
    good, cut = Reply(body=WEIGHTS, etag=V1), Reply(body=WEIGHTS, etag=V1, cut_after=STEP // 3)
    process = psutil.Process()

    def fetch(name: str) -> None:
        store = ModelStore(models, manner=manner())
        store.fetch(origin.serve(f"/{name}.safetensors", good, *[cut] * 8, good))
        with pytest.raises(NotFoundUpstreamError):
            store.fetch(origin.serve(f"/no-{name}.safetensors", Reply(404)))

    fetch("first")  # what is made once for the process: authorities, the Hub's client
    until(lambda: origin.open_connections == 0)
    time.sleep(0.2)  # and the threads of those have ended
    files, threads = process.num_fds(), threading.active_count()
    fetch("second")
    # at least in the end: the origin is in this process too
    until(lambda: process.num_fds() <= files and threading.active_count() <= threads)
