"""``study cka`` on Mask2Former's head: examples are images, whose queries are taken together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from d2_frozen.study.__main__ import main


def panels(preset: str, config: Path, output: Path, *options: str) -> list[dict]:
    flags = [
        "--config-file",
        str(config),
        "--split",
        "train",
        "--batch",
        "4",
        "--output",
        str(output),
        "--name",
        preset,
    ]
    assert main(["cka", preset, *flags, "--options", *options]) == 0
    return json.loads((output / f"{preset}.json").read_text())["panels"]


def test_pixel_decoder(tiny_config: Path, tmp_path: Path) -> None:
    two_layers = ("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "2")
    layers, maps = panels("pixel_decoder", tiny_config, tmp_path, *two_layers)
    assert (layers["rows"], layers["columns"]) == (["input", "layer 1", "layer 2"], ["layer 1", "layer 2"])
    values = np.array(layers["cka"])
    np.testing.assert_allclose([values[1, 0], values[2, 1]], 1, atol=1e-9)
    assert values[1, 1] == values[2, 0] < 1
    assert layers["mean"] < 1  # without what compares a layer with itself
    assert maps["rows"] == ["input 1 (coarsest)", "input 2", "input 3"]
    assert maps["columns"] == ["output 1 (coarsest)", "output 2", "output 3"]


def test_transformer_decoder(tiny_config: Path, tmp_path: Path) -> None:
    (panel,) = panels("transformer_decoder", tiny_config, tmp_path, "MODEL.MASK_FORMER.DEC_LAYERS", "3")
    maps = ["map 1 (coarsest)", "map 2", "map 3", "mask features"]
    assert (panel["rows"], panel["columns"]) == ([*maps, "layer 1", "layer 2"], ["layer 1", "layer 2"])
    assert np.isfinite(np.array(panel["cka"], dtype=float)).all()
    assert np.array(panel["batches"]).tolist() == [[2, 2]] * 6
