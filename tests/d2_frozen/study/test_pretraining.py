"""The small backbones: what is hidden, which labels, and that a file loads as MODEL.TIMM.PRETRAINED."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from d2_frozen.backbone.pretraining.scenes import IGNORE
from d2_frozen.backbone.pretraining.shapes import NUM_SHAPES
from d2_frozen.backbone.swin_v2 import PICO_NAME
from d2_frozen.backbone.timm_backbone import create_timm_backbone
from d2_frozen.backbone.weights import SHIPPED_DIR, save_weights
from d2_frozen.study import pretraining
from d2_frozen.study.pretraining import KINDS, SIZES, Machine, Pretraining, pretrain, shipped


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise instead of drawn scenes, of 64 px: the texture maps alone take seconds."""

    def draw(seed: int, count: int, workers: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)
        return images, torch.randint(0, 2, (count, 80), generator=generator).float()

    monkeypatch.setattr(pretraining, "draw_scenes", draw)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_loads_into_the_backbone_it_was_made_for(kind: str, scenes: None, tmp_path: Path) -> None:
    path = pretrain(Pretraining(kind, images=4, iterations=1), tmp_path, batch=2)
    assert path.name == f"{kind}_pico_4.safetensors" and Pretraining.of_name(path.stem).images == 4
    create_timm_backbone(PICO_NAME, str(path))
    create_timm_backbone(PICO_NAME, str(path), final_norm=True)  # as video uses it
    assert [file.name for file in tmp_path.glob("[!.]*")] == [path.name]


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_backbone_learns_the_same(
    kind: str, scenes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = Pretraining(kind, images=4, iterations=2)
    expected = load_file(pretrain(what, tmp_path / "plain", batch=2))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = load_file(pretrain(what, tmp_path / "compiled", Machine(compiled=True), batch=2))
    assert compiled.keys() == expected.keys()
    assert all(torch.allclose(compiled[name], expected[name], atol=1e-6) for name in expected)


def test_mixed_precision_keeps_weights_in_float32(scenes: None, tmp_path: Path) -> None:
    what = Pretraining("supervised", images=4, iterations=2)
    exact = load_file(pretrain(what, tmp_path / "fp32", batch=2))
    mixed = load_file(
        pretrain(what, tmp_path / "amp", Machine("cpu:0", amp=True), batch=2)
    )  # with a number too
    name = "layers.0.blocks.0.attn.qkv.weight"
    assert mixed[name].dtype == torch.float32
    assert 0 < (mixed[name] - exact[name]).abs().max() < 1e-2


def test_the_larger_size_is_table_5s_config(scenes: None, tmp_path: Path) -> None:
    path = pretrain(Pretraining("supervised", "nano", images=2, iterations=1), tmp_path, batch=2)
    create_timm_backbone(PICO_NAME, str(path), arguments=SIZES["nano"])
    with pytest.raises(ValueError, match="fit"):
        create_timm_backbone(PICO_NAME, str(path))


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    scenes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "_SAVE_EVERY", 1)
    what = Pretraining("masked", images=4, iterations=3)
    whole = pretrain(what, tmp_path / "whole", batch=2)
    rate = pretraining.learning_rate

    def interrupted(step: int, iterations: int) -> float:
        if step == 2:
            raise KeyboardInterrupt
        return rate(step, iterations)

    monkeypatch.setattr(pretraining, "learning_rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(what, tmp_path / "broken", batch=2)
    monkeypatch.setattr(pretraining, "learning_rate", rate)
    resumed, once = (load_file(path) for path in (pretrain(what, tmp_path / "broken", batch=2), whole))
    assert resumed.keys() == once.keys() and all(torch.equal(resumed[key], once[key]) for key in once)


@pytest.mark.parametrize("fact, other", [("seed", {"seed": 5}), ("iterations", {"iterations": 2})])
def test_a_file_of_another_pretraining_is_not_taken(
    fact: str, other: dict[str, int], scenes: None, tmp_path: Path
) -> None:
    usual = {"images": 4, "iterations": 1}
    path = pretrain(Pretraining("supervised", **usual), tmp_path, batch=2)
    assert pretrain(Pretraining("supervised", **usual), tmp_path, batch=2) == path
    with pytest.raises(ValueError, match=rf"{path.name} .*: {fact} .*Remove the file .*--output"):
        pretrain(Pretraining("supervised", **{**usual, **other}), tmp_path, batch=2)
    with pytest.raises(ValueError, match="batch 2, not 64"):
        pretrain(Pretraining("supervised", **usual), tmp_path)


def test_what_another_pretraining_left_is_not_gone_on_with(
    scenes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "_SAVE_EVERY", 1)
    what = Pretraining("supervised", images=4, iterations=1)
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(pretraining, "whole_state", interrupted)
        pretrain(what, tmp_path, batch=2)
    unfinished = tmp_path / "supervised_pico_4.partial.pth"
    for other in (replace(what, seed=5), replace(what, iterations=3)):
        with pytest.raises(ValueError, match=rf"{unfinished.name} .*another pretraining"):
            pretrain(other, tmp_path, batch=2)
    assert pretrain(what, tmp_path, batch=2).exists() and not unfinished.exists()


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_older_files_are_of_seed_0_and_the_usual_length(scenes: None, tmp_path: Path) -> None:
    older = {"kind": "supervised", "images": "4", "iterations": "2000"}
    save_weights({"a": torch.zeros(1)}, tmp_path / "supervised_pico_4.safetensors", metadata=older)
    assert pretrain(Pretraining("supervised", images=4), tmp_path).exists()
    with pytest.raises(ValueError, match="seed 0, not 1"):
        pretrain(Pretraining("supervised", images=4, seed=1), tmp_path)
    torch.save({"step": 200}, tmp_path / "masked_pico_4.partial.pth")
    with pytest.raises(ValueError, match="iterations 2000, not 500; batch 64, not 2"):
        pretrain(Pretraining("masked", images=4, iterations=500), tmp_path, batch=2)


def test_only_hidden_pixels_count_and_the_backbone_does_not_see_them() -> None:
    torch.manual_seed(0)
    task = pretraining._task("masked", create_timm_backbone(PICO_NAME))
    seen: list[torch.Tensor] = []
    task.backbone.network.patch_embed.register_forward_hook(lambda module, inputs, out: seen.append(out))
    task(torch.full((2, 3, 64, 64), 200, dtype=torch.uint8), torch.zeros(2, 80), torch.Generator())
    token = (seen[0] == task.token).all(dim=-1)  # (B, 16, 16) cells of 4 px
    squares = token.view(2, 2, 8, 2, 8).float().mean(dim=(2, 4))
    assert set(squares.unique().tolist()) == {0.0, 1.0}
    assert squares.sum().item() == 2 * 3  # the first 60 % of 4 squares, rounded up


def test_classes_that_cover_a_hundredth_of_the_pixels_are_shown() -> None:
    labels = np.full((4, 100, 100), IGNORE, np.uint8)
    labels[0], labels[1] = 0, 5
    labels[0, 0, :] = 1 + 7  # exactly 1 %
    labels[0, 1, :99] = 1 + 8  # a little less
    labels[1, 50:] = 9
    shown = np.flatnonzero(pretraining.shown_classes(labels))
    assert shown.tolist() == [7, NUM_SHAPES + 5, NUM_SHAPES + 9]


def test_views_of_a_whole_image_keep_a_constant_one_up_to_its_colour() -> None:
    scenes = torch.full((3, 3, 32, 32), 100, dtype=torch.uint8)
    views = pretraining.random_views(scenes, torch.Generator().manual_seed(1), smallest=0.2)
    assert views.shape == (3, 3, 32, 32)
    assert torch.allclose(views, views[:, :, :1, :1].expand_as(views), atol=1e-3)
    assert not torch.allclose(views[0], views[1])


def test_what_comes_with_the_package_is_what_the_tables_compare() -> None:
    """Every file there loads, and says the pretraining that its name does."""
    files = sorted((SHIPPED_DIR / "study").glob("*.safetensors"))
    assert files
    for path in files:
        what = Pretraining.of_name(path.stem)
        assert shipped(what) == path
        backbone = create_timm_backbone(
            PICO_NAME, pretrained=str(path), arguments=SIZES[what.size], final_norm=True
        )
        assert all(bool(value.isfinite().all()) for value in backbone.state_dict().values())


@pytest.mark.parametrize("name", ["supervised_pico", "guessed_pico_10", "masked_huge_10", "masked_pico_x"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match=r"KIND_SIZE_IMAGES|is no pretraining"):
        Pretraining.of_name(name)
