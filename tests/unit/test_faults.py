"""What an exception means for the request and for the process."""

from __future__ import annotations

import pytest
import torch

from experimance_controlnet.engine.faults import as_worker_error, is_fatal, is_out_of_memory
from experimance_controlnet.errors import BadWeightsError, DeviceMemoryError, GenerationError

OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
FATAL = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    torch.AcceleratorError("CUDA error: unknown error", 999),
]
HARMLESS = [ValueError("CUDA error"), RuntimeError("mat1 and mat2 shapes cannot be multiplied")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_fatal(error)
    assert isinstance(as_worker_error(error), DeviceMemoryError)


@pytest.mark.parametrize("error", FATAL, ids=repr)
def test_fatal(error: Exception) -> None:
    assert is_fatal(error)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", HARMLESS, ids=repr)
def test_of_one_request(error: Exception) -> None:
    assert not is_fatal(error)
    assert not is_out_of_memory(error)
    assert isinstance(as_worker_error(error), GenerationError)


def test_a_typed_error_stays_itself() -> None:
    error = BadWeightsError("cut short")
    assert as_worker_error(error) is error
