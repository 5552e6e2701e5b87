"""``controlnet-worker models`` as a process of its own, against an origin on the loopback."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from experimance_controlnet.catalog.registry import load_catalog
from experimance_controlnet.catalog.specs import AdapterUse, Source
from tests.hub import serve_repository
from tests.origin import Origin, Reply
from tests.weights import safetensors, sha256

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0
SMALL = safetensors()
LARGE = safetensors(1 << 22)
CANARY = "sesame1234"

CATALOG = """\
# mine
[models.tiny]
steps = 4
cfg = 1.5
scheduler = "lcm"
source = { uri = "hf://acme/tiny", files = ["*"] }
base_source = "hf://acme/base"

[models.other]
steps = 5
cfg = 2.0
scheduler = "euler"
source = "URL/other.safetensors?token=sesame1234"
base_source = "hf://acme/base"

[loras.moss]
source = { uri = "URL/moss.safetensors", sha256 = "SHA", size_bytes = SIZE }
weight = 0.8

[loras.gone]
source = "URL/gone.safetensors?token=sesame1234"

[loras.tiny]
source = "URL/tiny.safetensors"

[loras.mine]
source = "mine.safetensors"

[eras.bog]
adapters = { gone = 1.0 }
alternative = { moss = 0.5 }

[eras.marsh]
adapters = { gone = 1.0, moss = 0.2 }
"""


@dataclass
class Bench:
    """An origin, a catalogue that points at it, and a MODELS_DIR."""

    origin: Origin
    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def catalog(self) -> Path:
        return self.folder / "acme.toml"

    @property
    def models(self) -> Path:
        return self.folder / "models"

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        environment = os.environ | {
            "MODELS_DIR": str(self.models),
            "MODEL_CATALOG": str(self.catalog),
            "HF_ENDPOINT": self.origin.url,
        }
        command = [sys.executable, "-m", "experimance_controlnet.cli", "models", *arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
        self.started.append(process)
        return process

    def run(self, *arguments: str) -> tuple[int, str, list[str]]:
        """Exit status, stdout, and the lines of stderr that are no progress."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=WAIT_S)
        assert CANARY not in out + err
        assert "Traceback" not in err
        lines = [line for line in err.splitlines() if not line.startswith("event='download_")]
        return process.returncode, out, lines

    def json(self, *arguments: str, status: int = 0) -> dict[str, Any]:
        code, out, lines = self.run(*arguments, "--json")
        assert code == status, (out, lines)
        document: dict[str, Any] = json.loads(out)
        return document

    def files(self) -> set[str]:
        found = {path.name for path in self.models.rglob("*") if path.is_file()}
        return {name for name in found if not name.endswith(".sha256")}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    origin = Origin()
    serve_repository(
        origin,
        {"w.safetensors": SMALL, "config.json": b"{}"},
        {"w.safetensors": sha256(SMALL)},
    )
    serve_repository(origin, {"base.json": b"{}"}, {}, repo="acme/base")
    for name in ("moss", "other", "tiny"):
        origin.serve(f"/{name}.safetensors", Reply(body=SMALL, etag='"1"'))
    bench = Bench(origin, tmp_path)
    text = CATALOG.replace("URL", origin.url).replace("SHA", sha256(SMALL))
    bench.catalog.write_text(text.replace("SIZE", str(len(SMALL))))
    (tmp_path / "mine.safetensors").write_bytes(SMALL)
    yield bench
    origin.close()
    for process in bench.started:
        process.kill()
        process.communicate()


def entry_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [row for row in document["entries"] if f"{row['kind']}.{row['name']}" == name]
    return dict(found)


# -- list -------------------------------------------------------------------------------------


def test_the_list_for_machines(bench: Bench) -> None:
    before = bench.json("list")
    assert (before["catalog"], before["models_dir"]) == ("acme", str(bench.models))
    names = [f"{row['kind']}.{row['name']}" for row in before["entries"]]
    assert names == [
        *("models.tiny", "models.other", "loras.moss", "loras.gone", "loras.tiny", "loras.mine"),
        *("eras.bog", "eras.marsh"),
    ]
    assert not bench.models.exists(), "looking makes nothing"
    moss = entry_of(before, "loras.moss")
    place = bench.models / f"127.0.0.1_{bench.origin.port}" / "moss.safetensors"
    assert moss == {
        "kind": "loras",
        "name": "moss",
        "weight": 0.8,
        "on_disk": False,
        "size_bytes": len(SMALL),
        "sources": [
            {
                "uri": f"{bench.origin.url}/moss.safetensors",
                "path": str(place),
                "on_disk": False,
                "size_bytes": len(SMALL),
                "sha256": sha256(SMALL),
            }
        ],
    }
    bench.json("fetch", "models.tiny", "loras.tiny")
    after = bench.json("list", "models.tiny", "marsh", "loras.tiny", "mine")
    tiny = entry_of(after, "models.tiny")
    settings = {key: tiny[key] for key in ("steps", "cfg", "scheduler", "scheduler_config")}
    assert settings == {"steps": 4, "cfg": 1.5, "scheduler": "lcm", "scheduler_config": {}}
    assert (tiny["on_disk"], tiny["size_bytes"]) == (True, len(SMALL) + 4)
    assert entry_of(after, "loras.tiny")["sources"][0]["sha256"] == sha256(SMALL)
    assert entry_of(after, "loras.mine")["sources"][0]["sha256"] is None, "nobody has read it"
    assert entry_of(after, "eras.marsh")["adapters"] == {"gone": 1.0, "moss": 0.2}


def test_the_list_for_people(bench: Bench) -> None:
    bench.json("fetch", "moss")
    status, out, errors = bench.run("list")
    assert (status, errors) == (0, [])
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "yes" in rows["loras.moss"]
    assert sha256(SMALL)[:12] in rows["loras.moss"]
    assert "4 steps, cfg 1.5, lcm" in rows["models.tiny"]
    assert "gone 1, else moss 0.5" in rows["eras.bog"]
    assert f"{bench.origin.url}/other.safetensors" in out


def test_the_shipped_catalogues(bench: Bench) -> None:
    for name in ("experimance", "embedded"):
        document = bench.json("list", "--catalog", name)
        assert document["catalog"] == name
        assert len(document["entries"]) == 19
    assert all(row["on_disk"] for row in document["entries"])


def test_who_has_seen_enough(bench: Bench) -> None:
    process = bench.start("list", "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(WAIT_S) == 1
    assert process.stderr.read() == ""


# -- fetch ------------------------------------------------------------------------------------


def test_fetched_once(bench: Bench) -> None:
    status, out, errors = bench.run("fetch", "models.tiny", "moss")
    assert (status, errors) == (0, [])
    assert out == "models.tiny: on disk\nloras.moss: on disk\n"
    assert bench.files() == {"w.safetensors", "config.json", "base.json", "moss.safetensors"}
    bench.origin.asked.clear()
    document = bench.json("fetch", "models.tiny", "moss")
    assert [row["error"] for row in document["entries"]] == [None, None]
    assert bench.origin.requests == []


def test_what_fails_does_not_stop_the_rest(bench: Bench) -> None:
    status, out, errors = bench.run("fetch", "--all")
    assert status == 1
    gone = f"{bench.origin.url}/gone.safetensors: the origin answers 404: there is no such file; "
    assert errors == [
        f"controlnet-worker: not_found_upstream: {name}: {gone}check its address"
        for name in ("loras.gone", "eras.marsh")
    ]
    assert "eras.bog (its alternative): on disk" in out
    assert "loras.mine: on disk" in out
    assert bench.origin.requests.count("/gone.safetensors") == 1
    document = bench.json("fetch", "gone", "bog", status=1)
    assert entry_of(document, "loras.gone")["error"]["code"] == "not_found_upstream"
    bog = {"kind": "eras", "name": "bog", "alternative": True, "error": None}
    assert entry_of(document, "eras.bog") == bog


def test_another_file_than_the_catalogue_means(bench: Bench) -> None:
    bench.origin.serve("/moss.safetensors", Reply(body=safetensors(fill=b"\7")))
    status, out, errors = bench.run("fetch", "moss")
    assert (status, out) == (1, "")
    [error] = errors
    assert error.startswith("controlnet-worker: checksum_mismatch: loras.moss: ")
    assert bench.files() == set()


def test_progress_where_there_is_no_terminal(bench: Bench) -> None:
    process = bench.start("fetch", "moss", "--json")
    out, err = process.communicate(timeout=WAIT_S)
    assert json.loads(out)["entries"][0]["error"] is None
    events = [line.split()[0] for line in err.splitlines()]
    assert events == ["event='download_started'", "event='download_finished'"]


def test_a_bar_on_a_terminal(bench: Bench) -> None:
    slow = Reply(body=LARGE, etag='"1"', drip_s=0.05)
    bench.origin.serve("/tiny.safetensors", slow)
    ours, theirs = pty.openpty()
    process = bench.start("fetch", "loras.tiny", "moss", stderr=theirs)
    os.close(theirs)
    shown = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                shown += os.read(ours, 1 << 16)
            except OSError:  # its other end is closed
                break
    os.close(ours)
    assert process.wait(WAIT_S) == 0
    assert process.stdout is not None
    assert process.stdout.read() == "loras.moss: on disk\nloras.tiny: on disk\n"
    assert b"tiny.safetensors" in shown
    assert b"on disk" not in shown, "results are not for stderr"
    assert b"/4.2 MB" in shown
    assert b"MB/s" in shown
    assert b"download_" not in shown


def until_on_disk(bench: Bench, done_bytes: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        for journal in bench.models.rglob(".partial-*/journal"):
            note = json.loads(journal.read_bytes())
            if sum(end - start for start, end in note["done"]) >= done_bytes:
                return
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_fetch_goes_on(bench: Bench, number: signal.Signals) -> None:
    hold = threading.Event()
    bench.origin.serve("/tiny.safetensors", Reply(body=LARGE, etag='"1"', hold=hold))
    process = bench.start("fetch", "loras.tiny")
    until_on_disk(bench, len(LARGE) // 3)
    process.send_signal(number)
    _, err = process.communicate(timeout=WAIT_S)
    if number == signal.SIGINT:
        assert process.returncode == 130
        last = err.splitlines()[-1]
        assert last == "controlnet-worker: interrupted; a fetch goes on where it stopped"
    hold.set()
    bench.origin.serve("/tiny.safetensors", Reply(body=LARGE, etag='"1"'))
    sent_before = bench.origin.sent_bytes
    bench.json("fetch", "loras.tiny")
    assert bench.origin.sent_bytes - sent_before <= len(LARGE) * 2 // 3
    assert bench.json("verify", "loras.tiny")["files"][0]["fault"] is None


# -- verify -----------------------------------------------------------------------------------


def test_whole_and_damaged_files(bench: Bench) -> None:
    bench.json("fetch", "models.tiny", "moss")
    document = bench.json("verify")
    checked = {Path(row["path"]).name: row for row in document["files"]}
    assert {row["fault"] for row in document["files"]} == {None}
    compared = {name: row["compared_with"] for name, row in checked.items()}
    assert compared == {
        "w.safetensors": "transfer",
        "config.json": None,
        "base.json": None,
        "moss.safetensors": "catalogue",
        "mine.safetensors": None,
    }
    assert checked["moss.safetensors"]["sha256"] == sha256(SMALL)
    assert checked["base.json"]["entries"] == ["models.tiny", "models.other"]
    assert "loras.gone" in document["missing"]
    [weights] = bench.models.rglob("w.safetensors")
    weights.write_bytes(safetensors(fill=b"\7"))
    status, out, errors = bench.run("verify")
    assert status == 1
    assert "damaged" in out
    assert errors == [
        f"controlnet-worker: bad_weights: {weights}: its sha256 is not the one of the transfer: "
        "the content has changed; remove models.tiny, then fetch it again"
    ]
    bench.json("remove", "models.tiny")
    bench.json("fetch", "models.tiny")
    bench.json("verify", "models.tiny")


def test_named_and_not_there(bench: Bench) -> None:
    assert bench.json("verify")["missing"] != []
    status, _, errors = bench.run("verify", "moss")
    assert status == 1
    assert errors == [
        "controlnet-worker: model_file_error: loras.moss: is not on this disk, or not all of it; "
        "fetch it"
    ]


# -- remove -----------------------------------------------------------------------------------


def test_what_others_need_stays(bench: Bench) -> None:
    bench.json("fetch", "models.tiny", "models.other")
    document = bench.json("remove", "models.tiny")
    [row] = document["entries"]
    assert row["freed_bytes"] == document["freed_bytes"] >= len(SMALL)
    assert row["kept"] == [{"uri": "hf://acme/base", "needed_by": ["models.other"]}]
    assert bench.files() == {"base.json", *(name for name in bench.files() if "other" in name)}
    status, out, _ = bench.run("remove", "models.tiny")  # nothing is left but what others need
    assert status == 0
    assert out.splitlines()[1] == "  kept for models.other: hf://acme/base"
    bench.json("remove", "models.tiny", "models.other")
    assert bench.files() == set()


def test_nothing_but_what_others_need(bench: Bench) -> None:
    with bench.catalog.open("a") as file:
        file.write(f'[loras.moss2]\nsource = "{bench.origin.url}/moss.safetensors"\n')
    bench.json("fetch", "moss")
    status, out, errors = bench.run("remove", "moss2")
    assert (status, out) == (1, "")
    assert errors == [
        "controlnet-worker: file_in_use: loras.moss2: its files are also those of loras.moss; "
        "name them too"
    ]
    assert bench.files() == {"moss.safetensors"}
    bench.json("remove", "moss2", "moss")
    assert bench.files() == set()


def test_what_is_on_its_way_is_not_removed(bench: Bench) -> None:
    hold = threading.Event()
    bench.origin.serve("/tiny.safetensors", Reply(body=LARGE, etag='"1"', hold=hold))
    fetch = bench.start("fetch", "loras.tiny")
    until_on_disk(bench, 1)
    status, _, errors = bench.run("remove", "loras.tiny")
    assert status == 1
    assert errors[0].startswith("controlnet-worker: file_in_use: loras.tiny: ")
    hold.set()
    fetch.communicate(timeout=WAIT_S)
    assert fetch.returncode == 0
    assert bench.files() == {"tiny.safetensors"}
    assert bench.json("remove", "loras.tiny")["freed_bytes"] >= len(LARGE)


def test_an_operators_own_file_is_not_removed(bench: Bench) -> None:
    status, _, errors = bench.run("remove", "mine")
    assert status == 1
    assert "was not downloaded: remove it by hand" in errors[0]
    assert (bench.folder / "mine.safetensors").exists()


def test_eras_have_no_files(bench: Bench) -> None:
    status, _, errors = bench.run("remove", "marsh")
    assert status == 2
    assert "its LoRAs: gone, moss" in errors[0]


# -- add --------------------------------------------------------------------------------------

ADDED = [
    (
        ["lora", "fern", "--source", "https://example.org/fern.safetensors", "--weight", "0.7"],
        '[loras.fern]\nweight = 0.7\nsource = { uri = "https://example.org/fern.safetensors" }\n',
    ),
    (
        [
            *("lora", "peat.v1", "--source", "https://example.org/p.safetensors"),
            *("--sha256", "ab" * 32, "--size-bytes", "77"),
        ],
        '[loras."peat.v1"]\nsource = { uri = "https://example.org/p.safetensors", '
        f'sha256 = "{"ab" * 32}", size_bytes = 77 }}\n',
    ),
    (
        [
            *("model", "big", "--source", "gs://bucket/big.safetensors", "--steps", "30"),
            *("--base-source", "hf://acme/base", "--base-file", "*.json", "--base-file", "t/*"),
            *("--cfg", "6", "--scheduler", "dpm_sde"),
            *("--scheduler-config", "use_karras_sigmas=true"),
            *("--scheduler-config", "beta_start=0.01"),
            *("--scheduler-config", "solver_type=midpoint"),
        ],
        '[models.big]\nsteps = 30\ncfg = 6.0\nscheduler = "dpm_sde"\n'
        'source = { uri = "gs://bucket/big.safetensors" }\n'
        'base_source = { uri = "hf://acme/base", files = ["*.json", "t/*"] }\n'
        "scheduler_config = { use_karras_sigmas = true, beta_start = 0.01, "
        'solver_type = "midpoint" }\n',
    ),
    (
        ["controlnet", "sdxl_small", "--source", "hf://acme/depth@v1"],
        '[controlnets.sdxl_small]\nsource = { uri = "hf://acme/depth@v1" }\n',
    ),
    (
        [
            *("era", "fen", "--adapter", "moss=0.25", "--adapter", "gone=-1"),
            *("--alternative", "moss=1"),
        ],
        "[eras.fen]\nadapters = { moss = 0.25, gone = -1.0 }\nalternative = { moss = 1.0 }\n",
    ),
]


@pytest.mark.parametrize(("arguments", "text"), ADDED, ids=lambda value: value[1])
def test_an_entry_is_appended(bench: Bench, arguments: list[str], text: str) -> None:
    before = bench.catalog.read_bytes()
    bench.catalog.chmod(0o640)
    document = bench.json("add", *arguments)
    assert bench.catalog.read_bytes() == before + b"\n" + text.encode()
    assert stat.S_IMODE(bench.catalog.stat().st_mode) == 0o640
    assert document["catalog"] == str(bench.catalog)
    table, _, name = document["added"].partition(".")
    assert name in getattr(load_catalog(str(bench.catalog)), table)
    assert {path.name for path in bench.folder.iterdir()} == {"acme.toml", "mine.safetensors"}


def test_what_was_added_means_what_was_said(bench: Bench) -> None:
    for arguments, _ in ADDED:
        bench.json("add", *arguments)
    catalog = load_catalog(str(bench.catalog))
    big = catalog.models["big"]
    assert (big.steps, big.cfg, big.scheduler) == (30, 6.0, "dpm_sde")
    assert big.base_source == Source("hf://acme/base", files=("*.json", "t/*"))
    assert dict(big.scheduler_config) == {
        "use_karras_sigmas": True,
        "beta_start": 0.01,
        "solver_type": "midpoint",
    }
    assert catalog.loras["peat.v1"].source.size_bytes == 77
    assert catalog.eras["fen"].adapters == (AdapterUse("moss", 0.25), AdapterUse("gone", -1.0))


def test_the_first_entry_of_a_file_that_extends(bench: Bench) -> None:
    bench.catalog.write_text('extends = "embedded"')  # without a line's end
    link = bench.folder / "link.toml"
    link.symlink_to(bench.catalog)
    status, out, _ = bench.run(
        *("add", "lora", "mine", "--source", "mine.safetensors", "--catalog", str(link))
    )
    assert (status, out) == (0, f"loras.mine: added to {bench.catalog}\n")
    assert link.is_symlink()
    assert bench.catalog.read_text() == (
        'extends = "embedded"\n\n[loras.mine]\nsource = { uri = "mine.safetensors" }\n'
    )
    source = load_catalog(str(link)).loras["mine"].source
    assert source == Source(str(bench.folder / "mine.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (
            ["lora", "moss", "--source", "https://example.org/m.safetensors"],
            2,
            "bad_catalog: FILE: has loras.moss already; change it in the file",
        ),
        (
            ["lora", "x", "--source", "https://example.org/m.ckpt"],
            2,
            "bad_catalog: FILE: loras.x.source.uri: weights must be safetensors: such a file can "
            "run code when it is read",
        ),
        (
            ["lora", "../x", "--source", "https://example.org/m.safetensors"],
            2,
            "bad_catalog: FILE: loras.../x: a name begins with a letter or digit and has only "
            "letters, digits, _ . - in it, at most 64 (none beyond ASCII)",
        ),
        (
            ["lora", "x", "--source", "https://example.org/../m.safetensors"],
            2,
            "bad_catalog: FILE: loras.x.source.uri: '..' cannot be a part of its path",
        ),
        (
            ["lora", "x", "--source", 'a"]\nsteps = 3\n[models.evil'],
            2,
            "bad_catalog: FILE: loras.x.source.uri: is empty, or holds characters that cannot be "
            "seen",
        ),
        (
            ["lora", "x", "--source", "\udcff"],
            2,
            "bad_settings: what is to be added is not text",
        ),
        (
            ["lora", "x", "--source", "nowhere.safetensors"],
            1,
            "model_file_error: FOLDER/nowhere.safetensors does not exist; a path is relative to "
            "the catalogue file",
        ),
        (
            ["lora", "x", "--source", "pickle.safetensors"],
            1,
            "bad_weights: pickle.safetensors is not a whole safetensors file: header too large",
        ),
        (
            ["lora", "x", "--source", "https://example.org/m.safetensors", "--weight", "nan"],
            2,
            "bad_catalog: FILE: loras.x.weight: Input should be a finite number",
        ),
        (
            ["era", "x", "--adapter", "ferns=1"],
            2,
            "bad_catalog: FILE: eras.x.adapters.ferns: there is no LoRA of this name; add "
            "[loras.ferns], or change or remove the era",
        ),
        (["era", "x", "--adapter", "moss"], 2, "bad_settings: 'moss': must be NAME=VALUE, and"),
        (
            ["era", "x", "--adapter", "moss=1", "--adapter", "moss=2"],
            2,
            "bad_settings: 'moss=2': must be NAME=VALUE, and each NAME once",
        ),
        (["era", "x", "--adapter", "moss=big"], 2, "bad_settings: 'big': must be a number"),
        (
            ["model", "x", "--source", "hf://a/b", "--steps", "4", "--cfg", "1"],
            2,
            "usage: the following arguments are required: --scheduler; see controlnet-worker "
            "models add model --help",
        ),
        (
            ["lora", "x", "--source", "hf://a/b/c.safetensors", "--catalog", "embedded"],
            2,
            "bad_settings: say with --catalog FILE which catalogue of yours is meant",
        ),
        (
            ["lora", "x", "--source", "hf://a/b/c.safetensors", "--catalog", "FOLDER/new.toml"],
            2,
            "bad_catalog: FOLDER/new.toml does not exist; begin it with the line: "
            'extends = "experimance"',
        ),
    ],
)
def test_what_is_not_added(bench: Bench, arguments: list[str], status: int, line: str) -> None:
    (bench.folder / "pickle.safetensors").write_bytes(b"\x80\x04\x95" + b"x" * 40)
    before = bench.catalog.read_bytes()
    folder = str(bench.folder)
    code, out, errors = bench.run("add", *(one.replace("FOLDER", folder) for one in arguments))
    assert (code, out) == (status, "")
    expected = line.replace("FILE:", f"{bench.catalog}:").replace("FOLDER", folder)
    assert len(errors) == 1
    assert errors[0].startswith(f"controlnet-worker: {expected}")
    assert bench.catalog.read_bytes() == before
    names = {"acme.toml", "mine.safetensors", "pickle.safetensors"}
    assert {path.name for path in bench.folder.iterdir()} == names


def test_two_at_once_are_both_added(bench: Bench) -> None:
    running = [
        bench.start("add", "lora", f"x{n}", "--source", f"https://example.org/{n}.safetensors")
        for n in range(4)
    ]
    for process in running:
        _, err = process.communicate(timeout=WAIT_S)
        assert (process.returncode, err) == (0, "")
    assert {f"x{n}" for n in range(4)} <= set(load_catalog(str(bench.catalog)).loras)


# -- usage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "usage: the following arguments are required: COMMAND; see controlnet-worker models"),
        (["lits"], "usage: argument COMMAND: invalid choice: 'lits'"),
        (["list", "--jsn"], "usage: unrecognized arguments: --jsn"),
        (["list", "nobody"], "unknown_name: the catalogue acme has no entry 'nobody'; `models"),
        (["list", "tiny"], "unknown_name: 'tiny' can be models.tiny or loras.tiny: say which"),
        (["list", "--catalog", "no.toml"], "bad_catalog: no.toml: No such file or directory; a"),
        (["list", "--models-dir", ""], "bad_settings: MODELS_DIR (--models-dir): must not be"),
        (["fetch"], "bad_settings: name the entries to fetch, or say --all"),
        (["fetch", "moss", "--all"], "bad_settings: name the entries to fetch, or say --all"),
        (["fetch", "../moss"], "unknown_name: the catalogue acme has no entry '../moss'; "),
        (["remove"], "usage: the following arguments are required: NAME"),
    ],
)
def test_wrong_usage(bench: Bench, arguments: list[str], line: str) -> None:
    status, out, errors = bench.run(*arguments)
    assert (status, out) == (2, "")
    assert len(errors) == 1
    assert errors[0].startswith(f"controlnet-worker: {line}")
    assert bench.origin.requests == []
    assert not bench.models.exists()


def test_a_disk_that_cannot_be_read(bench: Bench) -> None:
    bench.models.write_bytes(b"")  # a file where the folder should be
    status, _, errors = bench.run("fetch", "moss")
    assert status == 1
    assert errors[0].startswith("controlnet-worker: model_file_error: loras.moss: cannot write ")


def test_the_commands_import_no_torch() -> None:
    code = (
        "import sys; from experimance_controlnet.commands import "
        "adding, checking, fetching, listing, models, removing; "
        "print([name for name in ('torch', 'diffusers', 'fastapi') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "status", "shown"),
    [
        (["--help"], 0, "usage: controlnet-worker COMMAND"),
        (["models", "--help"], 0, "usage: controlnet-worker models"),
        ([], 2, "controlnet-worker: a command is missing; see controlnet-worker --help"),
        (["run"], 2, "controlnet-worker: there is no command 'run'; see"),
    ],
)
def test_the_command_itself(arguments: list[str], status: int, shown: str) -> None:
    command = [sys.executable, "-m", "experimance_controlnet.cli", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == status
    assert (ended.stderr if status else ended.stdout).startswith(shown)
    assert (ended.stdout if status else ended.stderr) == ""
