"""Which weights are read ahead of their use."""

from __future__ import annotations

from pathlib import Path

import pytest

from experimance_controlnet.catalog.page_cache import read_ahead

PLENTY = 10**9


def write(path: Path, size_bytes: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size_bytes))
    return path


def test_whole_files_are_read_once(tmp_path: Path) -> None:
    one = write(tmp_path / "any-name.safetensors", 1000)
    large = write(tmp_path / "large.safetensors", 70 << 20)  # several chunks
    assert read_ahead([one, large, one], PLENTY) == 1000 + (70 << 20)


def test_of_a_folder_what_is_loaded(tmp_path: Path) -> None:
    write(tmp_path / "unet/diffusion_pytorch_model-00001-of-00002.safetensors", 1)
    write(tmp_path / "unet/diffusion_pytorch_model-00002-of-00002.safetensors", 10)
    write(tmp_path / "vae/diffusion_pytorch_model.safetensors", 100)
    write(tmp_path / "text_encoder/model.fp16.safetensors", 1000)  # there is no other
    assert read_ahead([tmp_path], PLENTY) == 1111
    write(tmp_path / "vae/diffusion_pytorch_model.fp16.safetensors", 1)
    write(tmp_path / "sd_xl_base_1.0.safetensors", 1)
    write(tmp_path / "unet/config.json", 1)
    assert read_ahead([tmp_path], PLENTY) == 1111


@pytest.mark.parametrize(("limit_bytes", "expected"), [(99, 0), (100, 100), (199, 100), (200, 200)])
def test_not_more_than_memory_holds(tmp_path: Path, limit_bytes: int, expected: int) -> None:
    files = [write(tmp_path / f"{name}.safetensors", 100) for name in "ab"]
    files.append(write(tmp_path / "small.safetensors", 1))
    assert read_ahead(files, limit_bytes) == expected


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    assert read_ahead([tmp_path / "gone"], PLENTY) == 0
