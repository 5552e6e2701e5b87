"""Weights in prompts; depth maps to the ControlNet's input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experimance_controlnet.engine.conditioning import Fragment, depth_to_control, parse_weights


@pytest.mark.parametrize(
    ("prompt", "fragments"),
    [
        ("a red barn", [("a red barn", 1.0)]),
        ("a (red:1.3) barn", [("a ", 1.0), ("red", 1.3), (" barn", 1.0)]),
        ("(sky: 0.5)", [("sky", 0.5)]),
        ("(two words:2)(x:1)", [("two words", 2.0), ("x", 1.0)]),
        ("plain (parentheses) stay", [("plain (parentheses) stay", 1.0)]),
        (r"literal \(red:1.3\)", [("literal (red:1.3)", 1.0)]),
        ("ratio 16:9 (wide)", [("ratio 16:9 (wide)", 1.0)]),
        ("((deep:1.5))", [("(", 1.0), ("deep", 1.5), (")", 1.0)]),
        ("( :1.2)", [("( :1.2)", 1.0)]),
        ("", [("", 1.0)]),
    ],
)
def test_parse_weights(prompt: str, fragments: list[tuple[str, float]]) -> None:
    assert parse_weights(prompt) == [Fragment(*fragment) for fragment in fragments]


def control(depth: list[list[float]], size: int) -> torch.Tensor:
    array = np.array(depth, dtype=np.float32)
    return depth_to_control(array, size, size, torch.device("cpu"), torch.float32)


def test_depth_becomes_three_equal_channels() -> None:
    image = control([[0.0, 1.0], [0.25, 0.5]], 2)
    assert image.shape == (1, 3, 2, 2)
    assert image[0, 0].tolist() == image[0, 2].tolist() == [[0.0, 1.0], [0.25, 0.5]]


def test_resizing_keeps_the_range() -> None:
    image = control([[0.0, 1.0], [0.0, 1.0]], 64)
    assert image.min() >= 0 and image.max() <= 1
    assert image[0, 0, :, 0].max() < 0.1
    assert image[0, 0, :, -1].min() > 0.9


def test_sixteen_bits_survive() -> None:
    step = 1 / 65535
    image = control([[0.5, 0.5 + step]], 1 * 1)
    assert image.dtype == torch.float32
    wide = depth_to_control(
        np.array([[0.5, 0.5 + step]], dtype=np.float32), 1, 2, torch.device("cpu"), torch.float32
    )
    assert wide[0, 0, 0, 1] - wide[0, 0, 0, 0] == pytest.approx(step, rel=1e-2)
