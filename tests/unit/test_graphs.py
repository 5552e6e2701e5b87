"""Recorded work and the cache of programs, where there is no CUDA."""

from __future__ import annotations

import pytest
import torch

from experimance_controlnet.engine.graphs import ProgramCache, Recorder, ReplayedWork, Work


class CountingRecorder(Recorder):
    """Hands out work that says what was run."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.records = 0
        self.replays = 0

    def record(self, work: Work) -> Work:
        self.records += 1

        def replay() -> None:
            self.replays += 1
            work()

        return replay


@pytest.fixture
def runs() -> list[str]:
    return []


def test_recorded_work_does_the_same() -> None:
    source, target = torch.arange(3.0), torch.zeros(3)

    def work() -> None:
        target.copy_(2 * source)

    recorded = Recorder(torch.device("cpu")).record(work)
    assert target.sum() == 0  # recording is no run
    for value in (1.0, 5.0):
        source.fill_(value)
        recorded()
        assert torch.equal(target, torch.full((3,), 2 * value))


def test_first_plain_then_recorded(runs: list[str]) -> None:
    recorder = CountingRecorder()
    work = ReplayedWork(lambda: runs.append("work"), recorder)
    seen = []
    for _ in range(4):
        work()
        seen.append((len(runs), recorder.records, recorder.replays))
    assert seen == [(1, 0, 0), (2, 1, 1), (3, 1, 2), (4, 1, 3)]


def test_says_whether_it_is_recorded(runs: list[str]) -> None:
    work = ReplayedWork(lambda: runs.append("work"), CountingRecorder())
    flags = [work.recorded]
    for _ in range(3):
        work()
        flags.append(work.recorded)
    assert flags == [False, False, True, True]


class Maker:
    """Counts what it makes; each program is another number."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> int:
        self.made += 1
        return self.made


def test_a_program_is_made_once() -> None:
    cache: ProgramCache[str, int] = ProgramCache(2)
    make = Maker()
    assert [cache.get("a", make), cache.get("b", make), cache.get("a", make)] == [1, 2, 1]
    assert len(cache) == 2


def test_the_least_recently_used_leaves_and_is_made_again() -> None:
    cache: ProgramCache[str, int] = ProgramCache(2)
    make = Maker()
    for key in ("a", "b", "a", "c"):
        cache.get(key, make)
    assert [key for key in "abc" if key in cache] == ["a", "c"]
    assert [cache.get("a", make), cache.get("b", make)] == [1, 4]
    assert [key for key in "abc" if key in cache] == ["a", "b"]


def test_an_old_program_has_left_before_the_new_one_is_made() -> None:
    cache: ProgramCache[str, int] = ProgramCache(1)
    cache.get("a", Maker())
    lengths: list[int] = []
    cache.get("b", lambda: lengths.append(len(cache)) or 0)  # type: ignore[func-returns-value]
    assert lengths == [0]


def test_clear() -> None:
    cache: ProgramCache[str, int] = ProgramCache(2)
    make = Maker()
    for key in ("a", "b"):
        cache.get(key, make)
    cache.clear()
    assert len(cache) == 0
    assert "a" not in cache
    assert cache.get("a", make) == 3
