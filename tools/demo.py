"""Make a few pictures with the model that is shipped in the package, the way a client would.

Starts a server as its own process, waits until it is ready, asks it for one picture of every era
over the same depth map, and stops it again. Leaves in ``--out``: the depth map, the pictures, one
contact sheet of them all, the server's logs. Ends with 1 and the reason when anything fails.
"""

from __future__ import annotations

import argparse
import base64
import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

HOST = "127.0.0.1"
READY_DEADLINE_S = 90.0
REQUEST_DEADLINE_S = 120.0
STOP_DEADLINE_S = 30.0
LOG_TAIL_LINES = 30
CAPTION_PX = 28

console = Console()


class DemoError(Exception):
    """What went wrong, in words for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Wish:
    """One picture to ask for."""

    era: str
    prompt: str
    seed: int


WISHES = (
    Wish("wilderness", "aerial photo of green hills and forest with a river", 1),
    Wish("pre_industrial", "aerial photo of fields and a small village by a river", 2),
    Wish("future", "aerial photo of a city of glass towers by a river", 3),
    Wish("wilderness", "aerial photo of hills covered in snow, frozen river, winter", 1),
)


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture that came back."""

    wish: Wish
    file: Path
    wall_s: float
    server_s: float


@dataclass(frozen=True, slots=True)
class Server:
    """A server process, where it listens and where it writes."""

    process: subprocess.Popen[bytes]
    url: str
    console_log: Path
    model_log: Path

    def log_tail(self) -> str:
        """The last lines of what the server wrote, to its terminal and to its log."""
        texts = [log.read_text(errors="replace") for log in (self.console_log, self.model_log)]
        tails = ["\n".join(text.splitlines()[-LOG_TAIL_LINES:]) for text in texts if text.strip()]
        return "\n...\n".join(tails) or "(it wrote nothing)"


def main() -> int:
    """Run the demo; the process's exit status."""
    arguments = parse_arguments()
    try:
        run(arguments.out, arguments.size)
    except DemoError as error:
        console.print(f"demo failed: {error}", style="bold red", markup=False, soft_wrap=True)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    parser.add_argument("--size", type=int, default=512, help="side of the pictures, pixels")
    return parser.parse_args()


def run(out: Path, size: int) -> None:
    """The demo from start to end; raises DemoError."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    depth_png = out / "depth.png"
    save_depth_map(draw_depth_map(size), depth_png)
    with running_server(out / "logs") as server:
        console.print(f"server starts at {server.url}")
        wait_until_ready(server)
        console.print(f"ready after {time.monotonic() - started:.1f} s")
        pictures = [
            ask_for_picture(server, wish, depth_png, size, out / f"{number}_{wish.era}.png")
            for number, wish in enumerate(WISHES, start=1)
        ]
        stop(server)
    sheet = out / "contact_sheet.png"
    make_contact_sheet(depth_png, pictures).save(sheet)
    console.print(results_table(pictures))
    places = f"all of them: {sheet}\ndepth map:   {depth_png}\nlogs:        {out / 'logs'}"
    console.print(places, soft_wrap=True)  # a path in two lines cannot be pasted
    console.print(f"{time.monotonic() - started:.1f} s in all")


# --- the depth map --------------------------------------------------------------------------


def draw_depth_map(size: int) -> NDArray[np.float64]:
    """Hills and a river from above: (size, size), 0 far (the valley) to 1 near (the tops)."""
    y, x = np.mgrid[0:size, 0:size] / size
    land = np.zeros((size, size))
    generator = np.random.default_rng(7)
    for octave in range(1, 6):
        for turn, phase in generator.uniform(0, 2 * np.pi, (6, 2)):
            along = x * np.cos(turn) + y * np.sin(turn)
            land += np.sin(2 * 2**octave * along + phase) / 2**octave
    land = (land - land.min()) / np.ptp(land)
    river_x = 0.5 + 0.18 * np.sin(4.5 * y) + 0.05 * np.sin(13 * y)
    valley = 1 - np.exp(-(((x - river_x) / 0.10) ** 2))
    return np.asarray(land * valley)


def save_depth_map(depth: NDArray[np.float64], path: Path) -> None:
    """Write 0..1 as a 16-bit grey PNG."""
    Image.fromarray(np.round(depth * 65535).astype(np.uint16)).save(path)


# --- the server -----------------------------------------------------------------------------


@contextmanager
def running_server(logs: Path) -> Iterator[Server]:
    """A server on a free port with the embedded catalogue; killed on the way out if still alive."""
    logs.mkdir(parents=True, exist_ok=True)
    model_log, console_log = logs / "model_server.log", logs / "console.log"
    model_log.write_bytes(b"")  # the server appends
    port = free_port()
    with TemporaryDirectory(prefix="controlnet_demo_") as models_dir, console_log.open("wb") as log:
        command = [sys.executable, "-m", "experimance_controlnet.model_server"]
        command += ["--model-catalog", "embedded", "--models-dir", models_dir]
        command += ["--model-server-host", HOST, "--model-server-port", str(port)]
        command += ["--model-log", str(model_log)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield Server(process, f"http://{HOST}:{port}", console_log, model_log)
        finally:
            process.kill()
            process.wait()


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def wait_until_ready(server: Server) -> None:
    """Until ``/ping`` answers and then ``/checkhealth`` says ready."""
    deadline = time.monotonic() + READY_DEADLINE_S
    state = "silent"
    while state != "ready":
        if server.process.poll() is not None:
            raise DemoError(
                f"the server ended with status {server.process.returncode}:\n{server.log_tail()}"
            )
        if time.monotonic() > deadline:
            raise DemoError(
                f"the server is still {state} after {READY_DEADLINE_S:.0f} s:\n{server.log_tail()}"
            )
        time.sleep(0.5)
        state = server_state(server.url)


def server_state(url: str) -> str:
    """``silent`` until the process serves, then the status it gives itself."""
    try:
        httpx.get(f"{url}/ping", timeout=5).raise_for_status()
        health = httpx.get(f"{url}/checkhealth", timeout=5)
    except httpx.TransportError:
        return "silent"
    return str(health.json().get("status"))  # 503 while it is not healthy, with the same body


def stop(server: Server) -> None:
    """Ask the server to end, wait for it, and require that it ends well."""
    server.process.terminate()
    try:
        status = server.process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        raise DemoError(
            f"the server did not end within {STOP_DEADLINE_S:.0f} s of SIGTERM:\n"
            + server.log_tail()
        ) from None
    console.print(f"server ended with status {status}")
    if status != 0:
        raise DemoError(f"the server ended with status {status}:\n{server.log_tail()}")


# --- the pictures ---------------------------------------------------------------------------


def ask_for_picture(server: Server, wish: Wish, depth_png: Path, size: int, file: Path) -> Picture:
    """One ``POST /generate``; writes the picture to ``file``."""
    body = {
        "prompt": wish.prompt,
        "era": wish.era,
        "seed": wish.seed,
        "width": size,
        "height": size,
        "depth_map_b64": base64.b64encode(depth_png.read_bytes()).decode(),
    }
    started = time.monotonic()
    try:
        response = httpx.post(f"{server.url}/generate", json=body, timeout=REQUEST_DEADLINE_S)
    except httpx.TransportError as error:
        raise DemoError(f"{wish.era}: {error!r}\n{server.log_tail()}") from error
    wall_s = time.monotonic() - started
    if response.status_code != httpx.codes.OK:
        raise DemoError(f"{wish.era}: {response.status_code} {response.text[:500]}")
    answer = response.json()
    file.write_bytes(base64.b64decode(answer["image_b64"]))
    check_picture(file, size)
    if answer["seed_used"] != wish.seed:
        raise DemoError(f"{wish.era}: seed {wish.seed} asked for, {answer['seed_used']} used")
    console.print(f"{file}: {wall_s:.1f} s", soft_wrap=True)
    return Picture(wish, file, wall_s, answer["generation_time"])


def check_picture(file: Path, size: int) -> None:
    """It opens, has the size asked for, and is not one flat colour."""
    with Image.open(io.BytesIO(file.read_bytes())) as image:
        if image.size != (size, size):
            raise DemoError(f"{file} is {image.size}, not {size} x {size}")
        if np.asarray(image.convert("L")).std() < 1:
            raise DemoError(f"{file} is blank")


# --- the results ----------------------------------------------------------------------------


def make_contact_sheet(depth_png: Path, pictures: Sequence[Picture]) -> Image.Image:
    """The depth map and the pictures side by side, each with a line that says what it is."""
    with Image.open(depth_png) as image:
        depth = np.asarray(image)
    tiles = [("depth map", Image.fromarray((depth // 257).astype(np.uint8)))]
    tiles += [(caption(picture), Image.open(picture.file)) for picture in pictures]
    side = tiles[0][1].width
    sheet = Image.new("RGB", (side * len(tiles), side + CAPTION_PX), "white")
    font = ImageFont.load_default(size=14)
    for column, (text, tile) in enumerate(tiles):
        sheet.paste(tile.convert("RGB"), (column * side, CAPTION_PX))
        ImageDraw.Draw(sheet).text((column * side + 6, 5), text, fill="black", font=font)
    return sheet


def caption(picture: Picture) -> str:
    """The era and the prompt, which tell the pictures apart."""
    return f"{picture.wish.era}: {picture.wish.prompt}"


def results_table(pictures: Sequence[Picture]) -> Table:
    """One row a picture."""
    table = Table(title="Pictures")
    table.add_column("file", overflow="fold")
    table.add_column("era")
    table.add_column("seed", justify="right")
    table.add_column("wall clock, s", justify="right")
    table.add_column("server, s", justify="right")
    for picture in pictures:
        wish = picture.wish
        times = (f"{picture.wall_s:.2f}", f"{picture.server_s:.2f}")
        table.add_row(str(picture.file), wish.era, str(wish.seed), *times)
    return table


if __name__ == "__main__":
    sys.exit(main())
