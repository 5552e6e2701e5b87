"""What is on the disk, whether it is whole, and removing it; the files are real."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experimance_controlnet.catalog import inventory
from experimance_controlnet.catalog.backoff import Backoff
from experimance_controlnet.catalog.disk import remove_whole
from experimance_controlnet.catalog.entries import entries_of
from experimance_controlnet.catalog.hashes import ContentHashes, hash_beside, side_file
from experimance_controlnet.catalog.inventory import FileCheck, Found
from experimance_controlnet.catalog.job import Manner
from experimance_controlnet.catalog.registry import load_catalog
from experimance_controlnet.catalog.specs import Source
from experimance_controlnet.catalog.store import ModelStore
from experimance_controlnet.errors import DownloadError, FileInUseError, ModelFileError
from tests.hub import serve_repository
from tests.origin import Origin, Reply
from tests.weights import safetensors, sha256

WEIGHTS = safetensors()
IMPATIENT = Manner(backoff=Backoff(tries=2, first_s=0.0))


@pytest.fixture
def store(origin: Origin, tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models", manner=IMPATIENT, hub_endpoint=origin.url)


def local(tmp_path: Path, content: bytes = WEIGHTS, name: str = "a.safetensors") -> Source:
    path = tmp_path / name
    path.write_bytes(content)
    return Source(str(path))


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# -- entries ----------------------------------------------------------------------------------


def test_every_entry_with_what_it_needs() -> None:
    catalog = load_catalog("experimance")
    entries = {entry.full_name: entry for entry in entries_of(catalog)}
    assert len(entries) == 3 + 1 + 5 + 10
    lightning, loras = catalog.models["lightning"], catalog.loras
    assert entries["models.lightning"].sources == (lightning.source, lightning.base_source)
    assert entries["models.base"].sources == (catalog.models["base"].source,)
    assert entries["loras.drone"].sources == (loras["drone"].source,)
    assert entries["eras.wilderness"].sources == (loras["experimance_wilderness"].source,)
    both = (loras["drone"].source, loras["experimance"].source)
    assert entries["eras.wilderness"].alternative == entries["eras.modern"].sources == both
    assert entries["eras.modern"].alternative is None


# -- a glance ---------------------------------------------------------------------------------


def test_a_glance_at_a_download(origin: Origin, store: ModelStore) -> None:
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS))
    assert store.glance(source) is None
    path = store.fetch(source)
    found = Found(path, len(WEIGHTS), sha256(WEIGHTS))
    assert store.glance(source) == found
    assert inventory.glance(source, store.models_dir, ContentHashes()) == found
    assert store.glance(Source(source.uri, size_bytes=3)) is None
    assert store.glance(Source(source.uri, sha256="0" * 64)) is None


def test_a_glance_at_a_folder(origin: Origin, store: ModelStore) -> None:
    files = {"unet/w.safetensors": WEIGHTS, "config.json": b"{}"}
    serve_repository(origin, files, {"unet/w.safetensors": sha256(WEIGHTS)})
    source = Source("hf://acme/tiny")
    path = store.fetch(source)
    found = store.glance(source)
    assert found == Found(path, len(WEIGHTS) + 2, store.content_hash(source))
    side_file(path / "unet/w.safetensors").unlink()
    unknown = inventory.glance(source, store.models_dir, ContentHashes())
    assert unknown == Found(path, len(WEIGHTS) + 2, None)


def test_a_glance_reads_no_weights(store: ModelStore, tmp_path: Path) -> None:
    """A file with a hole of a terabyte: hashing it would take an hour."""
    source = local(tmp_path)
    os.truncate(source.uri, 1 << 40)
    stated = Source(source.uri, sha256="0" * 64)
    for one in (source, stated):
        assert store.glance(one) == Found(Path(source.uri), 1 << 40, None)


def test_a_glance_knows_what_was_hashed_before(store: ModelStore, tmp_path: Path) -> None:
    source = local(tmp_path)
    assert store.glance(source) == Found(Path(source.uri), len(WEIGHTS), None)
    store.content_hash(source)
    assert store.glance(source) == Found(Path(source.uri), len(WEIGHTS), sha256(WEIGHTS))
    local(tmp_path, safetensors(fill=b"\7"))
    os.utime(source.uri, (1, 1))
    assert store.glance(source) == Found(Path(source.uri), len(WEIGHTS), None)


# -- verification -----------------------------------------------------------------------------


def check(source: Source, path: Path) -> FileCheck:
    """Of a single file; every byte is reported as read."""
    read: list[int] = []
    [found] = inventory.verify(source, path, read.append)
    assert sum(read) == found.size_bytes == path.stat().st_size
    return found


def test_a_whole_download(origin: Origin, store: ModelStore) -> None:
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS))
    path = store.fetch(source)
    digest = sha256(WEIGHTS)
    assert check(source, path) == FileCheck(path, len(WEIGHTS), None, digest, "transfer")
    stated = Source(source.uri, sha256=digest, size_bytes=len(WEIGHTS))
    assert check(stated, path) == FileCheck(path, len(WEIGHTS), None, digest, "catalogue")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def keep_time(path: Path, change: Callable[[Path], None]) -> None:
    """As a bad disk does: nothing says that the file has changed."""
    stat = path.stat()
    change(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("disk_lies", [True, False])
def test_a_flipped_bit(origin: Origin, store: ModelStore, disk_lies: bool) -> None:
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS))
    path = store.fetch(source)
    if disk_lies:
        keep_time(path, flip)
    else:
        flip(path)
        os.utime(path, (1, 1))
    fault = "its sha256 is not the one of the transfer: the content has changed"
    assert check(source, path).fault == fault
    assert check(source, path).fault == fault, "the wrong hash must not be remembered"
    stated = Source(source.uri, sha256=sha256(WEIGHTS))
    assert "not the one of the catalogue" in str(check(stated, path).fault)


def test_a_file_that_was_only_touched(origin: Origin, store: ModelStore) -> None:
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS))
    path = store.fetch(source)
    os.utime(path, (1, 1))
    assert hash_beside(path) is None
    assert check(source, path).fault is None
    assert hash_beside(path) == sha256(WEIGHTS), "nobody has to hash it again"


@pytest.mark.parametrize("beside", [None, b"", b"\xff\xfe\0", b"abc 1-2\n"])
def test_a_download_without_a_remembered_hash(
    origin: Origin, store: ModelStore, beside: bytes | None
) -> None:
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS))
    path = store.fetch(source)
    side_file(path).unlink()
    if beside is not None:
        side_file(path).write_bytes(beside)
    assert check(source, path) == FileCheck(path, len(WEIGHTS), None, sha256(WEIGHTS), None)
    assert check(source, path).stated_by == "transfer"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (WEIGHTS[:-1], "not a whole safetensors file"),
        (pickle.dumps({"w": 1}), "not a whole safetensors file"),
        (b"", "not a whole safetensors file"),
    ],
)
def test_what_is_no_safetensors(tmp_path: Path, content: bytes, fault: str) -> None:
    source = local(tmp_path, content)
    assert fault in str(check(source, Path(source.uri)).fault)


def test_another_length_than_stated(tmp_path: Path) -> None:
    source = local(tmp_path)
    stated = Source(source.uri, size_bytes=7)
    assert check(stated, Path(source.uri)).fault == "the catalogue says 7 bytes"


def test_a_local_file_is_hashed_and_nothing_written_beside_it(tmp_path: Path) -> None:
    source = local(tmp_path)
    found = check(source, Path(source.uri))
    assert found == FileCheck(Path(source.uri), len(WEIGHTS), None, sha256(WEIGHTS), None)
    assert files_below(tmp_path) == ["a.safetensors"]


def test_every_file_of_a_folder(origin: Origin, store: ModelStore) -> None:
    files = {"w.safetensors": WEIGHTS, "config.json": b"{}", "merges.txt": "ä".encode()}
    serve_repository(origin, files, {"w.safetensors": sha256(WEIGHTS)})
    source = Source("hf://acme/tiny")
    path = store.fetch(source)

    def faults() -> dict[str, str | None]:
        read: list[int] = []
        checks = inventory.verify(source, path, read.append)
        assert sum(read) == sum(one.size_bytes for one in checks)
        return {one.path.name: one.fault for one in checks}

    assert faults() == dict.fromkeys(("config.json", "merges.txt", "w.safetensors"))
    (path / "config.json").write_bytes(b"{")
    (path / "merges.txt").write_bytes(b"\xff")
    flip(path / "w.safetensors")
    found = faults()
    assert "cannot be read as text: Expecting" in str(found["config.json"])
    assert "cannot be read as text: 'utf-8'" in str(found["merges.txt"])
    assert "sha256" in str(found["w.safetensors"])


# -- removal ----------------------------------------------------------------------------------


def test_a_file_is_removed_with_its_hash(origin: Origin, store: ModelStore) -> None:
    source = origin.serve("/a.safetensors", Reply(body=WEIGHTS))
    other = origin.serve("/b.safetensors", Reply(body=WEIGHTS))
    store.fetch(source)
    kept = store.fetch(other)
    assert store.remove(source) >= len(WEIGHTS)
    assert store.path(source) is None
    assert store.remove(source) == 0
    assert files_below(kept.parent) == ["b.safetensors", "b.safetensors.sha256"]
    assert store.fetch(source).read_bytes() == WEIGHTS, "it can be had again"


def test_a_folder_is_removed(origin: Origin, store: ModelStore) -> None:
    files = {"unet/w.safetensors": WEIGHTS, "config.json": b"{}"}
    serve_repository(origin, files, {"unet/w.safetensors": sha256(WEIGHTS)})
    store.fetch(Source("hf://acme/tiny"))
    assert store.remove(Source("hf://acme/tiny")) >= len(WEIGHTS)
    assert files_below(store.models_dir) == []


def test_what_a_cut_transfer_left_is_removed(origin: Origin, store: ModelStore) -> None:
    body = safetensors(1 << 20)
    cut = Reply(body=body, etag='"1"', cut_after=1 << 19)
    source = origin.serve("/a.safetensors", cut, Reply(503))
    with pytest.raises(DownloadError):
        store.fetch(source)
    assert files_below(store.models_dir) != []
    assert store.remove(source) >= 1 << 19
    assert files_below(store.models_dir) == []


def test_nothing_is_removed_under_a_transfer(origin: Origin, store: ModelStore) -> None:
    hold = threading.Event()
    body = safetensors(1 << 20)
    source = origin.serve("/a.safetensors", Reply(body=body, etag='"1"', hold=hold))
    with ThreadPoolExecutor(1) as pool:
        transfer = pool.submit(store.fetch, source)
        while not store.downloads():
            assert not transfer.done()
        other = ModelStore(store.models_dir)  # another process's has the same lock
        with pytest.raises(FileInUseError, match="on its way just now"):
            other.remove(source)
        hold.set()
        assert transfer.result().read_bytes() == body
    assert other.remove(source) >= len(body)


def test_only_downloads_are_removed(store: ModelStore, tmp_path: Path) -> None:
    for source in (local(tmp_path), Source("package:base")):
        with pytest.raises(ModelFileError, match="was not downloaded: remove it by hand"):
            store.remove(source)
    assert (tmp_path / "a.safetensors").exists()


def test_a_link_is_removed_and_what_it_leads_to_stays(
    origin: Origin, store: ModelStore, tmp_path: Path
) -> None:
    files = {"w.safetensors": WEIGHTS}
    serve_repository(origin, files, {"w.safetensors": sha256(WEIGHTS)})
    sources = [origin.serve("/a.safetensors", Reply(body=WEIGHTS)), Source("hf://acme/tiny")]
    for source in sources:
        place = store.fetch(source)
        elsewhere = tmp_path / f"elsewhere-{place.name}"
        place.rename(elsewhere)
        place.symlink_to(elsewhere)
        store.remove(source)
        assert not place.is_symlink()
        assert elsewhere.exists()


def test_a_folder_that_leads_elsewhere_is_left_alone(store: ModelStore, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    local(elsewhere, name="a.safetensors")
    store.models_dir.mkdir()
    (store.models_dir / "example.org").symlink_to(elsewhere)
    with pytest.raises(ModelFileError, match="symbolic link"):
        store.remove(Source("https://example.org/a.safetensors"))
    assert files_below(elsewhere) == ["a.safetensors"]


def test_a_removal_that_was_killed_is_finished_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".removed-a"
    (left / "unet").mkdir(parents=True)
    (left / "unet" / "w").write_bytes(WEIGHTS)
    (tmp_path / "a").mkdir()
    remove_whole(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
