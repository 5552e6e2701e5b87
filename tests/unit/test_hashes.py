"""sha256 of weights: what is remembered where, and when it is believed. Real files and folders."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from pathlib import Path
from typing import NoReturn

import pytest
from structlog.testing import capture_logs

from experimance_controlnet.catalog.hashes import HashNotes, hash_file
from experimance_controlnet.catalog.specs import Source
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.server.files import ModelFiles

WEIGHTS = b"\x08\0\0\0\0\0\0\0{}      "
"""A safetensors file without tensors."""
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "operator" / "a.safetensors"
    path.parent.mkdir()
    path.write_bytes(WEIGHTS)
    return path


def not_again() -> NoReturn:
    raise AssertionError("this was noted")


def later(path: Path) -> None:
    """As if somebody had written the file a second from now."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def content_hash(models_dir: Path, source: Source) -> str | None:
    """What a process that has just started says."""

    async def ask() -> str | None:
        files = ModelFiles(ModelStore(models_dir), HashNotes(models_dir / "notes"))
        return await files.content_hash(source)

    return asyncio.run(ask())


def test_a_file_of_several_chunks(tmp_path: Path) -> None:
    path = tmp_path / "large"
    content = os.urandom(1 << 20) * 70
    path.write_bytes(content)
    assert hash_file(path) == hashlib.sha256(content).hexdigest()


def test_a_note_outlives_its_process(weights: Path, tmp_path: Path) -> None:
    assert HashNotes(tmp_path / "notes").of(weights, lambda: DIGEST) == DIGEST
    assert HashNotes(tmp_path / "notes").of(weights, not_again) == DIGEST
    assert list(weights.parent.iterdir()) == [weights]


def test_each_path_has_its_own_note(weights: Path, tmp_path: Path) -> None:
    notes, other = HashNotes(tmp_path / "notes"), weights.with_name("b.safetensors")
    other.write_bytes(WEIGHTS)
    assert notes.of(weights, lambda: "one") == "one"
    assert notes.of(other, lambda: "two") == "two"
    assert notes.of(weights, not_again) == "one"


def test_a_file_that_changed_is_hashed_again(weights: Path, tmp_path: Path) -> None:
    notes = HashNotes(tmp_path / "notes")
    notes.of(weights, lambda: "old")
    later(weights)
    assert notes.of(weights, lambda: "new") == "new"
    assert notes.of(weights, not_again) == "new"
    weights.write_bytes(WEIGHTS + b" ")
    assert notes.of(weights, lambda: "newer") == "newer"


def test_a_folder_is_hashed_again_when_its_weights_change(weights: Path, tmp_path: Path) -> None:
    notes, folder = HashNotes(tmp_path / "notes"), weights.parent
    notes.of(folder, lambda: "one file")
    (folder / "config.json").touch()
    assert notes.of(folder, not_again) == "one file"
    (folder / "unet").mkdir()
    (folder / "unet" / "b.safetensors").write_bytes(WEIGHTS)
    assert notes.of(folder, lambda: "two files") == "two files"
    later(folder / "unet" / "b.safetensors")
    assert notes.of(folder, lambda: "another one") == "another one"
    assert notes.of(folder, not_again) == "another one"


def test_a_file_that_changes_meanwhile_is_not_noted(weights: Path, tmp_path: Path) -> None:
    def hash_while_it_changes() -> str:
        later(weights)
        return "of neither"

    notes = HashNotes(tmp_path / "notes")
    assert notes.of(weights, hash_while_it_changes) == "of neither"
    assert notes.of(weights, lambda: "of the new one") == "of the new one"


def test_nothing_is_noted_where_there_are_no_weights(tmp_path: Path) -> None:
    assert HashNotes(tmp_path / "notes").of(tmp_path, lambda: None) is None
    assert not (tmp_path / "notes").exists()


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"hash"', b"\xff\xfe", b'{"hash": 7}'])
def test_a_damaged_note_is_written_anew(weights: Path, tmp_path: Path, damage: bytes) -> None:
    notes = HashNotes(tmp_path / "notes")
    notes.of(weights, lambda: "first")
    [note] = (tmp_path / "notes").iterdir()
    note.write_bytes(damage)
    assert notes.of(weights, lambda: "second") == "second"
    assert notes.of(weights, not_again) == "second"


def test_a_hash_that_cannot_be_noted_is_one_all_the_same(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("no folder")
    with capture_logs() as events:
        assert HashNotes(tmp_path / "notes").of(weights, lambda: DIGEST) == DIGEST
    assert [event["event"] for event in events] == ["hash_not_noted"]


@pytest.mark.parametrize("as_folder", [False, True])
def test_the_next_start_reads_no_local_weights(
    weights: Path, tmp_path: Path, as_folder: bool
) -> None:
    source, models_dir = Source(str(weights.parent if as_folder else weights)), tmp_path / "models"
    digest = hashlib.sha256(f"{DIGEST}  a.safetensors\n".encode()).hexdigest()
    assert content_hash(models_dir, source) == (digest if as_folder else DIGEST)
    assert list(weights.parent.iterdir()) == [weights], "an operator's folder is not written to"
    # shown by a note that says something else
    [note] = (models_dir / "notes").iterdir()
    note.write_text(json.dumps(json.loads(note.read_text()) | {"hash": "as noted"}))
    assert content_hash(models_dir, source) == "as noted"
    later(weights)
    assert content_hash(models_dir, source) == (digest if as_folder else DIGEST)


def test_a_download_needs_no_note(tmp_path: Path) -> None:
    source = Source("https://origin.test/a.safetensors")
    path = tmp_path / "origin.test" / "a.safetensors"
    path.parent.mkdir()
    path.write_bytes(WEIGHTS)
    assert content_hash(tmp_path, source) == DIGEST
    assert not (tmp_path / "notes").exists()
    assert path.with_name("a.safetensors.sha256").read_text().startswith(DIGEST)


def test_what_is_not_there_has_no_hash(tmp_path: Path) -> None:
    assert content_hash(tmp_path, Source(str(tmp_path / "a.safetensors"))) is None
