"""CUDA graphs: a sequence of kernels recorded once and launched as one.

A step of SDXL is about a thousand kernels; launched one by one from Python they keep the device
waiting. Graphs hold addresses, so what they read and write are buffers that stay where they are.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from types import MethodType
from typing import Generic, TypeVar
from weakref import WeakMethod

import structlog
import torch

log = structlog.get_logger()

Work = Callable[[], None]
"""Reads and writes only buffers that stay where they are; leaves no other tensor behind."""

ResultT = TypeVar("ResultT")
ProgramT = TypeVar("ProgramT")
KeyT = TypeVar("KeyT", bound=Hashable)


class Recorder:
    """Records work for one device. The engine's thread only."""

    def __init__(self, device: torch.device, *, enabled: bool = True) -> None:
        """Not ``enabled``: work stays as it is, and takes no more memory than that."""
        self._device = device
        on_cuda = enabled and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_cuda else None
        self._side_stream = torch.cuda.Stream(device) if on_cuda else None
        # One pool for all graphs: they run one after the other and keep nothing in it between.
        self._pool = torch.cuda.graph_pool_handle() if self._stream is not None else None

    def renew_pool(self) -> None:
        """What is recorded from now on shares no memory with what was. To be called when all of
        that is dropped, since a pool that was given back cannot be used again; and when a recording
        failed, since then the pool may be spoilt.
        """
        if self._stream is not None:
            self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Work:
        """The same work, faster: a graph on CUDA, itself elsewhere and where not enabled, or where
        there is too little memory to record it.

        ``work`` must have run before: what is compiled or tuned at a first run cannot be recorded.
        """
        if self._stream is None:
            return work
        try:
            replay: Work = self._capture(work, self._stream).replay
        except RuntimeError as error:
            # Want of memory, or what CUDA makes of it in the middle of a capture. Anything else is
            # not only of the recording, and comes again when the work itself runs.
            log.warning("not_recorded", error=repr(error))
            self.renew_pool()
            return work
        return replay

    def _capture(self, work: Work, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        # What the first run needed stays cached otherwise, where the graph cannot have it.
        torch.cuda.empty_cache()
        with torch.cuda.stream(stream):
            # thread_local: a model that another thread loads meanwhile may allocate
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                self._abandon(graph)
                raise
            graph.capture_end()
        return graph

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed; that it is empty or invalid would only hide why."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                graph.capture_end()
            except RuntimeError:
                # CUDA has ended it, and torch still believes it to be under way: memory would go to
                # its pool for ever. There is no other way to say so.
                assert self._pool is not None, "there is one where there is a stream"
                torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
                torch._C._cuda_releasePool(self._device.index, self._pool)

    def branch(self, work: Callable[[], ResultT]) -> Branch[ResultT]:
        """Begin work that goes on beside what follows; a branch of the graph where one is recorded.

        There is one at a time. It must not write what the work beside it reads.
        """
        return Branch(work, self._side_stream)


class Branch(Generic[ResultT]):
    """Work on a stream of its own. Without CUDA it is done at once."""

    def __init__(self, work: Callable[[], ResultT], stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        if stream is None:
            self._result = work()
            return
        # This also protects the memory of the last branch, which whoever joined it may still read.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._result = work()

    def join(self) -> ResultT:
        """The result; what follows on the current stream waits for it, the host does not."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        return self._result


class ReplayedWork:
    """Runs as it is the first time, recorded from the second time on."""

    def __init__(self, work: Work, recorder: Recorder) -> None:
        """Where ``work`` is a method, its object must be alive when this is called: most hold this
        themselves, and in a cycle their buffers would wait for the garbage collector.
        """
        self._work = _weakly(work) if isinstance(work, MethodType) else work
        self._recorder = recorder
        self._runs = 0

    @property
    def recorded(self) -> bool:
        """Whether the next run is as fast as it can be."""
        return self._runs >= 2

    def __call__(self) -> None:
        if self._runs == 1:
            self._work = self._recorder.record(self._work)
        self._runs = min(2, self._runs + 1)
        self._work()


def _weakly(method: Work) -> Work:
    """Calls the method, and does not keep its object alive."""
    weak = WeakMethod(method)

    def work() -> None:
        strong = weak()
        assert strong is not None, "whoever calls this holds the object"
        strong()

    return work


class ProgramCache(Generic[KeyT, ProgramT]):
    """Programs by what they are made for; the least recently used leave."""

    def __init__(self, capacity: int) -> None:
        """``capacity`` bounds the memory that graphs and their buffers take."""
        self._capacity = capacity
        self._programs: OrderedDict[KeyT, ProgramT] = OrderedDict()

    def get(self, key: KeyT, make: Callable[[], ProgramT]) -> ProgramT:
        """The program for the key, made where there is none."""
        if key not in self._programs:
            while len(self._programs) >= self._capacity:
                self._programs.popitem(last=False)
            self._programs[key] = make()
        self._programs.move_to_end(key)
        return self._programs[key]

    def __contains__(self, key: KeyT) -> bool:
        return key in self._programs

    def __len__(self) -> int:
        return len(self._programs)

    def clear(self) -> None:
        """Give all memory back; programs are made again when they are needed."""
        self._programs.clear()
