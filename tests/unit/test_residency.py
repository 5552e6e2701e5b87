"""Which models stay in memory."""

from __future__ import annotations

from experimance_controlnet.engine.residency import ResidentModels


class Memory:
    """10 units, one for each model in it."""

    def __init__(self) -> None:
        self.models: ResidentModels[str] = ResidentModels(self.free, self.release)
        self.releases = 0

    def free(self) -> int:
        return 10 - len(self.models.names)

    def release(self) -> None:
        self.releases += 1


def filled(*names: str) -> Memory:
    memory = Memory()
    for name in names:
        memory.models.add(name, name.upper())
    return memory


def test_nothing_leaves_while_there_is_room() -> None:
    memory = filled("a", "b")
    memory.models.make_room(8, in_use=())
    assert memory.models.names == ("a", "b")


def test_the_least_recently_used_leaves_first() -> None:
    memory = filled("a", "b", "c")
    assert memory.models.use("a") == "A"
    memory.models.make_room(8, in_use=())
    assert memory.models.names == ("c", "a")
    assert memory.releases == 2  # before the first is dropped, and after it


def test_one_in_use_never_leaves() -> None:
    memory = filled("a", "b", "c")
    memory.models.make_room(10, in_use={"a", "c"})
    assert memory.models.names == ("a", "c")
