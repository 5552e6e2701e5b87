"""Speed on one GPU, ours and the peers' in one process, on a random SDXL family of full size.

    python -m benchmarks.gpu --models-dir DIR [--parts peers,latency,...] [--out FILE [--merge]]

Checks first that our pictures are the right ones, then measures; BENCHMARKS.md explains every
figure. Prints a table and one JSON line; what goes on meanwhile is said on stderr. ``--tiny`` does
all of it with a tiny family, on any machine: its speeds mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers.utils.logging as diffusers_logging
import torch
import transformers.utils.logging as transformers_logging
from rich.console import Console
from rich.table import Table

from benchmarks import cold_start, figures, memory, peers, quality, references
from benchmarks.environment import MODEL_PACKAGES, device_facts, run_facts, versions
from benchmarks.full_size import (
    FULL,
    MODEL,
    MODEL_IN_ONE_FILE,
    TINY,
    FamilyFiles,
    ensure_family,
)
from benchmarks.ours import Ours
from benchmarks.standard_request import CFG, CONTROL_STRENGTH, STEPS
from benchmarks.timing import Repeats, free_memory, progress

Result = dict[str, Any]

PARTS = (
    *("peers", "compile"),
    *("verify", "vae", "switch", "latency", "throughput", "quality", "memory"),
    *("cold", "cold_single_file"),
)


@dataclass
class Bench:
    """One run. What several parts need is made once, when the first of them asks for it."""

    options: argparse.Namespace
    files: FamilyFiles
    device: torch.device
    _ours: Ours | None = None

    @property
    def half(self) -> torch.dtype:
        """The peers' precision."""
        return torch.float16 if self.device.type == "cuda" else torch.float32

    @property
    def repeats(self) -> Repeats:
        return Repeats(self.options.warm_up, self.options.repeats)

    @cached_property
    def references(self) -> references.References:
        options = self.options
        seeds = options.quality_seeds if "quality" in options.parts else 0
        return references.gather_references(
            self.files, self.device, self.half, seeds, min(seeds, options.reference_seeds)
        )

    def ours(self, precision: str) -> Ours:
        """The runner of that precision, loaded when it is first asked for; never two of them."""
        if self._ours is None or self._ours.precision != precision:
            self.drop_ours()
            self._ours = Ours(self.files, self.device, precision)
        return self._ours

    def drop_ours(self) -> None:
        """Free its memory."""
        self._ours = None
        free_memory(self.device)

    def peer_parts(self) -> dict[str, Callable[[], Result]]:
        """Part -> what measures it: peers by name."""
        setting = (self.files, self.device, self.half, self.repeats)
        return {
            "peers": lambda: peers.measure_eager(*setting),
            "compile": lambda: peers.measure_compiled(*setting),
        }

    def our_parts(self, precision: str) -> dict[str, Callable[[], Result]]:
        """Part -> what measures it, in the order of their running: what is checked first, what is
        a process of its own last.
        """
        options = self.options
        return {
            # the references first: an fp32 pipeline needs more memory than is left beside ours
            "verify": lambda: quality.verify(self.references, self.ours(precision)),
            "vae": lambda: self.ours(precision).measure_vae(self.repeats),
            "switch": lambda: self.ours(precision).measure_switch(self.repeats),
            "latency": lambda: self.ours(precision).measure_latency(self.repeats),
            "throughput": lambda: self.ours(precision).measure_throughput(
                options.concurrency, options.throughput_s
            ),
            "quality": lambda: quality.compare_pictures(self.references, self.ours(precision)),
            "memory": lambda: self._measure_memory(precision),
            "cold": lambda: self._measure_cold(precision, MODEL),
            "cold_single_file": lambda: self._measure_cold(precision, MODEL_IN_ONE_FILE),
        }

    def _measure_memory(self, precision: str) -> Result:
        self.drop_ours()
        return memory.measure_tiers(self.files, self.device, precision, self.repeats)

    def _measure_cold(self, precision: str, model: str) -> Result:
        self.drop_ours()
        side_px = self.files.family.side_px
        return cold_start.measure_cold_starts(
            self.files.catalog, model, precision, side_px, self.options.starts
        )


def run(bench: Bench, outcome: Result) -> bool:
    """Measure every wanted part into ``outcome``, which is saved after each. False where one
    failed: the others are measured all the same, since a machine may be there only for a while.
    """
    options, right = bench.options, True
    record = {"id": uuid.uuid4().hex[:8], **run_facts("gpu", options.commit)}

    def measure(owner: str, part: str, work: Callable[[], Result]) -> None:
        nonlocal right
        progress(f"part {part} of {owner}")
        try:
            measured = work()
        except Exception as error:  # noqa: BLE001 - the top of a part; the exit status tells it
            traceback.print_exc()
            measured, right = {"error": f"{type(error).__name__}: {error}"}, False
        free_memory(bench.device)
        several = owner == figures.PEERS and "error" not in measured
        figures.add_part(outcome, owner, part, measured if several else {part: measured}, record)
        if options.out is not None:
            figures.save(figures.with_figures(outcome), options.out)

    peer_parts = {part: w for part, w in bench.peer_parts().items() if part in options.parts}
    # last, since it takes minutes and may not end
    compiled = peer_parts.pop("compile", None)
    for part, work in peer_parts.items():
        measure(figures.PEERS, part, work)
    for precision in options.precision:
        for part, work in bench.our_parts(precision).items():
            if part not in options.parts:
                continue
            measure(precision, part, work)
            if part == "verify" and outcome["measured"][precision][part].get("right") is False:
                progress(f"NOT THE RIGHT PICTURE in {precision}: its speeds mean nothing")
                right = False
    if compiled is not None:
        bench.drop_ours()
        measure(figures.PEERS, "compile", compiled)
    return right


def show(outcome: Result) -> None:
    """The tables, then the JSON line."""
    for title, rows in (
        (f"{outcome['versions']['device']}, {outcome['family']} size", figures.table_rows(outcome)),
        ("diffusers, the same request", figures.peer_rows(outcome)),
    ):
        heading, *lines = rows
        table = Table(title=title)
        for column in heading:
            table.add_column(column, justify="right" if column else "left")
        for line in lines:
            table.add_row(*line)
        Console().print(table)
    print(json.dumps(outcome))


def parse_options() -> argparse.Namespace:
    """The command line."""

    def names(allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
        def parse(text: str) -> tuple[str, ...]:
            chosen = tuple(text.split(","))
            if unknown := set(chosen) - set(allowed):
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not of {allowed}")
            return chosen

        return parse

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(",")))

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--models-dir", type=Path, default=Path("out/benchmark"), help="14 GB, written once")
    add("--tiny", action="store_true", help="a tiny family, for any machine")
    add("--parts", type=names(PARTS), default=PARTS, help=",".join(PARTS))
    add("--skip-compile", action="store_true", help="without the torch.compile peer: minutes")
    add("--precision", type=names(figures.PRECISIONS), default=("fp16",), help="fp16,fp8")
    add("--repeats", type=int, default=10, help="measured calls; the median counts")
    add("--warm-up", type=int, default=3, help="calls before those")
    add("--concurrency", type=numbers, default=(1, 2, 4, 8, 16), help="clients of a closed loop")
    add("--throughput-s", type=float, default=20.0, help="seconds for each number of clients")
    add("--quality-seeds", type=int, default=20, help="pictures compared with the eager pipeline")
    add("--reference-seeds", type=int, default=4, help="of those, compared with fp32 too")
    add("--starts", type=int, default=2, help="cold starts of a cold part")
    add("--out", type=Path, help="JSON file of the results")
    add("--merge", action="store_true", help="keep what --out holds of other parts")
    add("--commit", help="what is measured, where git cannot tell")
    options = parser.parse_args()
    if options.skip_compile:
        options.parts = tuple(part for part in options.parts if part != "compile")
    if options.merge and options.out is None:
        parser.error("--merge needs --out")
    return options


def main() -> None:
    """Measure, show, save. Exit status 1: a part failed, or our picture is not the right one."""
    options = parse_options()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family = TINY if options.tiny else FULL
    request = {
        "size_px": family.side_px,
        "steps": STEPS,
        "cfg": CFG,
        "control_strength": CONTROL_STRENGTH,
        "adapters": 2,
        "lora_rank": family.lora_rank,
    }
    measured_with = device_facts(device) | versions(MODEL_PACKAGES)
    outcome = figures.new_results(family.name, measured_with, request)
    if options.merge:
        try:
            figures.keep_earlier(outcome, options.out)
        except figures.VersionsDifferError as error:
            sys.exit(f"--merge: {error}")
    files = ensure_family(family, options.models_dir.absolute(), device)
    right = run(Bench(options, files, device), outcome)
    show(figures.with_figures(outcome))
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
