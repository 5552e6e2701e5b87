"""``make demo``: what a newcomer sees first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

DEMO = Path(__file__).parents[2] / "tools" / "demo.py"


def test_the_demo_draws_one_picture_an_era(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(DEMO), "--out", str(tmp_path), "--size", "256"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for era in ("wilderness", "pre_industrial", "future"):
        assert list(tmp_path.glob(f"*_{era}.png")), era
        assert era in done.stdout
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width > 4 * 256
    assert "contact_sheet.png" in done.stdout
