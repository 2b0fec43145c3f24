"""What order, place and size mean to each head; positions; the maps that heads see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import d2_frozen  # noqa: F401  (makes detectron2 importable)
from detectron2.layers import ShapeSpec
from video_app.models import (
    AttentiveProbe,
    GlobalVideoHead,
    LinearVideoHead,
    SpatialTemporalVideoHead,
    TemporalVideoHead,
)
from video_app.models.blocks import QueryBlock, VideoBlock
from video_app.models.maps import MapsOfFrames, maps_seen
from video_app.models.positions import ClipPositions

WITH_BLOCKS = [TemporalVideoHead, GlobalVideoHead, SpatialTemporalVideoHead, AttentiveProbe]
SHAPES = {"res5": ShapeSpec(channels=8, stride=32)}


def head_of(kind: type, blocks: int = 2, **options) -> nn.Module:
    torch.manual_seed(0)
    if kind is LinearVideoHead:
        return LinearVideoHead(SHAPES, num_classes=5).eval()
    head = kind(SHAPES, grid=(4, 2, 3), num_classes=5, num_blocks=blocks, num_heads=2, **options).eval()
    with torch.no_grad():  # weights that start small would hide what they do
        for parameter in head.blocks.parameters():
            parameter.normal_(std=0.3)
        if kind is AttentiveProbe:
            for parameter in head.pooling.parameters():
                parameter.normal_(std=0.3)
        head.classifier[1].weight.normal_()
    return head


def clips(batch: int = 2, frames: int = 4, rows: int = 2, columns: int = 3) -> Tensor:
    return torch.randn(batch, frames, 8, rows, columns, generator=torch.Generator().manual_seed(1))


def test_the_linear_head_ignores_the_order_of_frames_exactly() -> None:
    head, x = head_of(LinearVideoHead), clips(frames=16)
    for seed in range(20):
        order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(head({"res5": x}), head({"res5": x[:, order]}))


@pytest.mark.parametrize("kind", WITH_BLOCKS)
def test_heads_with_blocks_do_not(kind: type) -> None:
    head, x = head_of(kind), clips()
    assert (head({"res5": x}) - head({"res5": x.flip(1)})).abs().max() > 1e-3


@pytest.mark.parametrize("kind", WITH_BLOCKS)
def test_without_positions_in_time_they_would(kind: type) -> None:
    """So it is the positions that tell order, and nothing else."""
    head, x = head_of(kind), clips()
    with torch.no_grad():
        head.positions.time.weight.zero_()
    assert torch.allclose(head({"res5": x}), head({"res5": x.flip(1)}), atol=1e-4)


def block_along(axis: str) -> VideoBlock:
    torch.manual_seed(0)
    block = VideoBlock([axis], 8, 2).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
    return block


def cells_changed_by(block: VideoBlock, frame: int, position: int) -> Tensor:
    """(frames, positions) bool: what of the output is other when one cell of the input is."""
    x = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(2))
    changed = x.clone()
    changed[:, frame, position] = x[:, frame, position].flip(-1)
    return (block(x) != block(changed)).any(dim=-1)[0]


def test_a_temporal_block_leaves_other_positions_untouched() -> None:
    differs = cells_changed_by(block_along("time"), frame=1, position=3)
    assert differs[:, 3].all() and not differs[:, [0, 1, 2, 4, 5]].any()


def test_a_spatial_block_leaves_other_frames_untouched_and_a_global_one_nothing() -> None:
    differs = cells_changed_by(block_along("space"), frame=1, position=3)
    assert differs[1].all() and not differs[[0, 2, 3]].any()
    assert cells_changed_by(block_along("all"), frame=1, position=3).all()


def test_clips_do_not_see_each_other() -> None:
    x = clips(batch=3)
    for kind in WITH_BLOCKS:
        head = head_of(kind)
        assert torch.allclose(head({"res5": x})[1:2], head({"res5": x[1:2]}), atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("kind", [LinearVideoHead, *WITH_BLOCKS])
def test_any_size_runs_and_one_frame_too(kind: type, blocks: int) -> None:
    head = head_of(kind, blocks)
    for size in ((4, 2, 3), (1, 2, 3), (7, 1, 5)):
        scores = head({"res5": clips(2, *size)})
        assert scores.shape == (2, 5) and torch.isfinite(scores).all()
        scores.sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_a_query_gives_the_mean_where_all_cells_are_equal() -> None:
    """Attention's weights sum to one: with equal cells, how many there are does not matter."""
    block, cell = QueryBlock(8, 2).eval(), torch.randn(1, 1, 1, 8)
    assert torch.allclose(block(cell), block(cell.expand(1, 5, 7, 8)), atol=1e-6)


def test_positions_at_native_size_are_the_tables() -> None:
    positions = ClipPositions(4, 2, 3, 8)
    table = positions(4, 2, 3)
    assert table.shape == (4, 2, 3, 8)
    for t, row, column in ((0, 0, 0), (3, 1, 2), (2, 0, 1)):
        expected = positions.time.weight[t] + positions.place.weight[row * 3 + column]
        assert torch.equal(table[t, row, column], expected)


def test_positions_interpolate() -> None:
    """From 4 moments to 8, moment 1 lies a quarter of the way from the first to the second: (1 + 0.5) / 2 - 0.5."""
    positions = ClipPositions(4, 2, 3, 8)
    with torch.no_grad():
        positions.place.weight.zero_()
        positions.time.weight.copy_(torch.arange(4.0)[:, None].expand(4, 8))
    assert torch.allclose(positions(8, 2, 3)[1:-1, 0, 0, 0], torch.arange(1, 7) / 2 - 0.25)
    with torch.no_grad():
        positions.time.weight.zero_()
        positions.place.weight.fill_(2.5)
    assert torch.allclose(positions(4, 5, 7), torch.tensor(2.5))


def test_maps_go_to_the_coarsest_ones_cells() -> None:
    shapes = {"res4": ShapeSpec(channels=4, stride=16), "res5": ShapeSpec(channels=8, stride=32)}
    fine, coarse = torch.randn(2, 3, 4, 4, 6), torch.randn(2, 3, 8, 2, 3)
    cells = MapsOfFrames(shapes)({"res4": fine, "res5": coarse})
    assert cells.shape == (2, 3, 2, 3, 12)
    pooled = fine[1, 2, :, 2:4, 4:6].mean(dim=(1, 2))  # under the last cell of the second row
    assert torch.allclose(cells[1, 2, 1, 2, :4], nn.functional.layer_norm(pooled, (4,)), atol=1e-5)
    assert MapsOfFrames(shapes, width=16)({"res4": fine, "res5": coarse}).shape == (2, 3, 2, 3, 16)
    one = MapsOfFrames({"res5": shapes["res5"]})({"res5": coarse})
    assert torch.equal(one, coarse.permute(0, 1, 3, 4, 2))


def test_which_maps() -> None:
    shapes = {"res4": ShapeSpec(channels=4, stride=16), "res5": ShapeSpec(channels=8, stride=32)}
    assert list(maps_seen(shapes, [])) == ["res5"]
    assert list(maps_seen(shapes, ["res5", "res4"])) == ["res5", "res4"]
    with pytest.raises(ValueError, match="IN_FEATURES .*gives res4, res5"):
        maps_seen(shapes, ["res6"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_blocks": 0}, "NUM_BLOCKS is 0"),
        ({"num_heads": 3}, "3 heads"),
        ({"num_heads": 0}, "every 64 channels"),
        ({"drop_path": 1.0}, "DROP_PATH"),
        ({"num_classes": -1}, "NUM_CLASSES is -1"),
    ],
)
def test_wrong_settings_are_named(options: dict, message: str) -> None:
    settings = {"grid": (4, 2, 3), "num_classes": 5, "num_blocks": 1, "num_heads": 2, **options}
    with pytest.raises(ValueError, match=message):
        TemporalVideoHead(SHAPES, **settings)


def test_drop_path_skips_whole_clips() -> None:
    """With a chance of nearly 1 a training clip passes through its blocks unchanged."""
    block = VideoBlock(["time"], 8, 2, drop_path=0.9999).train()
    x = torch.randn(3, 4, 6, 8)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)
