"""The result file: what was measured, part by part, and the figures that are drawn from it.

Shape::

    {"benchmark": "gpu", "family", "versions", "request",
     "measured": {"peers": {PART: {...}}, "fp16": {PART: {...}}, "fp8": {PART: {...}}},
     "fp16": {figures}, "fp8": {figures}}

Every part says in ``run`` when and by which commit and command it was measured, so a file can be
filled by several runs on the same machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Result = dict[str, Any]

PRECISIONS = ("fp16", "fp8")
PEERS = "peers"

_RATIOS = {
    "ratio_vs_peft_adapters": "peft_adapters",
    "ratio_vs_eager": "eager",
    "ratio_vs_compile": "compile",
}

FIGURES = {
    "l6_latency_ms": "L6, one request, ms",
    "l6_throughput_ips": "L6 at saturation, images/s",
    "ratio_vs_peft_adapters": "times as fast as diffusers + live PEFT adapters",
    "ratio_vs_eager": "times as fast as diffusers without adapters",
    "ratio_vs_compile": "times as fast as diffusers + torch.compile",
    "vae_ms": "VAE decode, ms",
    "adapter_switch_ms": "switch to the other era's adapters, ms",
    "cold_start_s": "process start to first picture, s",
    "peak_vram_gb": "memory of the device in use, GB",
    "l6_8gb_latency_ms": "L6 within 8 GB, one request, ms",
    "unet_relative_error": "UNet output against fp32, relative error",
    "psnr_db": "picture against the eager pipeline, PSNR, dB",
}
"""What each figure is called in the table."""


class VersionsDifferError(Exception):
    """Old and new figures cannot stand in one file; the message says why."""


def new_results(family: str, versions: Mapping[str, str], request: Mapping[str, Any]) -> Result:
    """Without a measurement."""
    return {
        "benchmark": "gpu",
        "family": family,
        "versions": dict(versions),
        "request": dict(request),
        "measured": {},
    }


def keep_earlier(results: Result, path: Path) -> None:
    """Take over the parts that a run before this one left in the file ``path``, if there is one.

    Raises:
        VersionsDifferError: they were measured with something else.
    """
    if not path.exists():
        return
    earlier = json.loads(path.read_text("utf-8"))
    for key in ("family", "versions", "request"):
        if earlier[key] != results[key]:
            raise VersionsDifferError(f"{path}: {key} was {earlier[key]}, is {results[key]}")
    results["measured"] = earlier["measured"]


def add_part(
    results: Result, owner: str, part: str, rows: Mapping[str, Result], run: Result
) -> None:
    """``owner`` is ``peers`` or a precision. ``rows`` are what the part measured, by name; they
    replace what an earlier run has of them, or left there when the part failed.
    """
    measured = results["measured"].setdefault(owner, {})
    measured.pop(part, None)
    for name, row in rows.items():
        measured[name] = row | {"run": run}


def with_figures(results: Result) -> Result:
    """The whole file: the figures of each precision are computed anew from what was measured."""
    figures = {
        precision: _figures(results["measured"], precision)
        for precision in PRECISIONS
        if precision in results["measured"]
    }
    return {key: value for key, value in results.items() if key not in PRECISIONS} | figures


def save(results: Result, path: Path) -> None:
    """As indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


def table_rows(results: Result) -> Iterator[tuple[str, ...]]:
    """A heading, then one line a figure: its name, and its value in each precision."""
    precisions = [precision for precision in PRECISIONS if precision in results]
    yield ("", *precisions)
    for key, label in FIGURES.items():
        yield (label, *(_shown(results[precision][key]) for precision in precisions))


def peer_rows(results: Result) -> Iterator[tuple[str, ...]]:
    """The same for the peers: one line each."""
    columns = ("latency_ms", "latents_ms", "vae_ms")
    yield ("peer, L6", *columns)
    for name, peer in results["measured"].get(PEERS, {}).items():
        if "error" not in peer:
            yield (name, *(_shown(peer[column]) for column in columns))


def _figures(measured: Mapping[str, Any], precision: str) -> Result:
    """None where the part was not measured, or failed."""

    def get(*path: str) -> Any:
        value: Any = measured[precision]
        for key in path:
            if value is None:
                return None
            value = value.get(key)
        return value

    latency_ms = get("latency", "latency_ms")
    cold_starts = get("cold", "seconds")
    figures: Result = {
        "l6_latency_ms": latency_ms,
        "l6_throughput_ips": get("throughput", "best_ips"),
        "vae_ms": get("vae", "vae_ms"),
        "adapter_switch_ms": get("switch", "adapter_switch_ms"),
        "cold_start_s": cold_starts and cold_starts[0],
        "peak_vram_gb": get("latency", "memory_gb", "device_used"),
        "l6_8gb_latency_ms": get("memory", "8_gb", "latency_ms"),
        "unet_relative_error": _worst(get("verify", "unet_relative_error", "adapters")),
        "psnr_db": get("quality", "adapters", "psnr_ours_to_eager_db", "median"),
        "verified": get("verify", "right"),
    }
    runs = set()
    for ratio, name in _RATIOS.items():
        peer = measured.get(PEERS, {}).get(name, {})
        peer_ms = peer.get("latency_ms")
        known = latency_ms is not None and peer_ms is not None
        figures[ratio] = round(peer_ms / latency_ms, 2) if known else None
        if known:
            runs |= {peer["run"]["id"], get("latency", "run", "id")}
    figures["ratios_of_one_run"] = len(runs) == 1 if runs else None
    return figures


def _worst(errors: list[float] | None) -> float | None:
    """The largest; not a number where one is none."""
    return None if errors is None else max(errors, key=lambda error: (error != error, error))


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
