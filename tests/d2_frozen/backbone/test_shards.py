"""Shards: a network like SwinV2-G is built without memory and filled file by file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2_frozen.backbone import WeightFiles, create_timm_backbone
from d2_frozen.backbone.swin_v2_giant import GIANT_NAME

LIKE_GIANT = {
    "embed_dim": 16, "depths": (1, 1, 7, 1), "num_heads": (1, 2, 4, 8), "window_size": 4, "img_size": 64,
}  # fmt: skip


def giant(pretrained: str = ""):
    return create_timm_backbone(GIANT_NAME, pretrained, arguments=LIKE_GIANT).eval()


@pytest.fixture
def original():
    torch.manual_seed(0)
    backbone = giant()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return backbone


def shards_of(backbone, folder: Path, suffix: str, parts: int = 3) -> list[Path]:
    state = list(backbone.network.state_dict().items())
    paths = []
    for part in range(parts):
        path = folder / f"model-{part + 1:05d}-of-{parts:05d}.{suffix}"
        content = dict(state[part::parts])
        save_file(content, path) if suffix == "safetensors" else torch.save({"model": content}, path)
        paths.append(path)
    return paths


def write_index(paths: list[Path], name: str) -> Path:
    weight_map = {tensor: path.name for path in paths for tensor in WeightFiles(str(path)).shapes}
    index = paths[0].parent / name
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("way", ["index", "folder", "pattern", "list"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_shards_give_the_network_back_bit_for_bit(way, suffix, original, tmp_path):
    paths = shards_of(original, tmp_path, suffix)
    index = write_index(paths, "model.safetensors.index.json")
    source = {
        "index": str(index),
        "folder": str(tmp_path),
        "pattern": str(tmp_path / f"*.{suffix}"),
        "list": ", ".join(map(str, paths)),
    }[way]
    loaded = giant(source)
    assert {p.device.type for p in [*loaded.parameters(), *loaded.buffers()]} == {"cpu"}
    state = original.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    images = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        expected, maps = original(images), loaded(images)
    assert all(torch.equal(maps[name], expected[name]) for name in expected)


def test_window_and_shift_are_those_of_the_network_in_memory(original, tmp_path):
    shards_of(original, tmp_path, "safetensors")
    loaded = giant(str(tmp_path / "*.safetensors"))
    for ours, theirs in zip(loaded.network.layers, original.network.layers):
        assert [(b.window_size, b.shift_size) for b in ours.blocks] == [
            (b.window_size, b.shift_size) for b in theirs.blocks
        ]


def test_half_precision_shards_arrive_as_float32_parameters(original, tmp_path):
    original.half()
    shards_of(original, tmp_path, "safetensors")
    loaded = giant(str(tmp_path / "*.safetensors"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(p.requires_grad and isinstance(p, torch.nn.Parameter) for p in loaded.parameters())


def test_at_most_one_tensor_of_the_files_is_in_memory(original, tmp_path):
    """Each tensor is read when it is asked for, and may go before the next one."""
    import weakref

    shards_of(original, tmp_path, "safetensors")
    before = None
    for _, value in WeightFiles(str(tmp_path / "*.safetensors")):
        assert before is None or before() is None
        before = weakref.ref(value)
        del value


def test_missing_double_and_promised_tensors_are_named(original, tmp_path):
    paths = shards_of(original, tmp_path, "safetensors")
    index = write_index(paths, "model.safetensors.index.json")
    with pytest.raises(ValueError, match=r"\d+ missing: "):
        giant(f"{paths[0]},{paths[1]}")
    with pytest.raises(ValueError, match="which a shard before it holds too"):
        WeightFiles([str(paths[0]), str(paths[0])])
    content = json.loads(index.read_text())
    content["weight_map"]["layers.9.weight"] = paths[1].name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"lists layers\.9\.weight"):
        giant(str(index))
    paths[2].unlink()
    with pytest.raises(FileNotFoundError, match=paths[2].name):
        giant(str(index))


def test_paths_that_name_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="pattern"):
        WeightFiles(str(tmp_path / "*.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"index\.json"):
        WeightFiles(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no index"):
        WeightFiles(str(tmp_path / "no.index.json"))
    (tmp_path / "bad.index.json").write_text("[]")
    with pytest.raises(ValueError, match="weight_map"):
        WeightFiles(str(tmp_path / "bad.index.json"))
    (tmp_path / "bad.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(ValueError, match="beside their index"):
        WeightFiles(str(tmp_path / "bad.index.json"))
