"""Heads-only checkpoints: what is in them, what they refuse, and that they are never half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from d2_frozen.backbone import FrozenBackbone
from d2_frozen.engine import CheckpointMismatchError, FrozenCheckpointer, frozen_parts, saved_seed
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone


class Trunk(Backbone):
    """One convolution; ``scale`` makes two trunks differ."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        nn.init.constant_(self.conv.weight, scale)
        nn.init.zeros_(self.conv.bias)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"res2": self.conv(images)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res2": ShapeSpec(channels=4, stride=1)}


class Model(nn.Module):
    def __init__(self, trunk_scale: float = 1.0, frozen: bool = True, classes: int = 5) -> None:
        super().__init__()
        trunk = Trunk(trunk_scale)
        self.trunk = FrozenBackbone(trunk) if frozen else trunk
        self.head = nn.Linear(4, classes)


def save(model: nn.Module, folder: Path, **kwargs) -> str:
    FrozenCheckpointer(model, str(folder), **kwargs).save("model_final")
    return str(folder / "model_final.pth")


def test_file_holds_the_head_and_the_fingerprint(tmp_path: Path) -> None:
    model = Model()
    content = torch.load(save(model, tmp_path), weights_only=True)
    assert set(content["model"]) == {"head.weight", "head.bias"}
    (fact,) = content["frozen"]
    assert fact["prefix"] == "trunk" and fact["sha256"] == model.trunk.fingerprint()["sha256"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_a_last_checkpoint_that_is_gone_is_named_with_what_is_left(tmp_path: Path) -> None:
    save(Model(), tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000099.pth")
    message = "names model_0000099.pth, which is not there.* one of model_final.pth into .*/last_checkpoint"
    with pytest.raises(FileNotFoundError, match=message):
        FrozenCheckpointer(Model(), str(tmp_path)).resume_or_load("", resume=True)


@pytest.mark.parametrize(
    "content, seen",
    [(b"", "last_checkpoint is empty"), (b"\x00\xff", "last_checkpoint is damaged, it holds b")],
)
def test_a_damaged_last_checkpoint(tmp_path: Path, content: bytes, seen: str) -> None:
    save(Model(), tmp_path)
    (tmp_path / "last_checkpoint").write_bytes(content)
    for read in (
        lambda: FrozenCheckpointer(Model(), str(tmp_path)).resume_or_load("", resume=True),
        lambda: saved_seed(str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=f"{seen}.* To resume: write one of model_final.pth into"):
            read()


def test_a_damaged_checkpoint_names_the_others(tmp_path: Path) -> None:
    """As a disk leaves it that was pulled out; the seed is read from it too."""
    save(Model(), tmp_path)
    path = tmp_path / "model_final.pth"
    (tmp_path / "model_0000001.pth").write_bytes(path.read_bytes())
    path.write_bytes(path.read_bytes()[:400])
    for read in (
        lambda: FrozenCheckpointer(Model(), str(tmp_path)).resume_or_load("", resume=True),
        lambda: saved_seed(str(tmp_path)),
    ):
        with pytest.raises(
            ValueError, match="model_final.pth.* To resume: write one of model_0000001.pth into"
        ):
            read()


def test_a_tensor_of_another_shape_is_told_once(tmp_path: Path) -> None:
    path = save(Model(), tmp_path)
    with pytest.raises(CheckpointMismatchError) as refused:
        FrozenCheckpointer(Model(classes=3), strict=True).load(path)
    assert "head.weight: shape (5, 4) in the file, (3, 4) in the model" in str(refused.value)
    assert "not in the file" not in str(refused.value)


def test_a_file_of_other_values_is_named(tmp_path: Path) -> None:
    torch.save({"epochs": 3}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth is no file of weights"):
        FrozenCheckpointer(Model()).load(str(tmp_path / "other.pth"))


def test_loading_gives_the_head_back(tmp_path: Path) -> None:
    model, other = Model(), Model()
    FrozenCheckpointer(other, strict=True).load(save(model, tmp_path))
    assert torch.equal(other.head.weight, model.head.weight)


def test_another_backbone_is_refused_naming_both(tmp_path: Path) -> None:
    path = save(Model(1.0), tmp_path)
    other = Model(2.0)
    untouched = other.head.weight.clone()
    with pytest.raises(CheckpointMismatchError) as refused:
        FrozenCheckpointer(other).load(path)
    assert Model(1.0).trunk.fingerprint()["sha256"][:16] in str(refused.value)
    assert other.trunk.fingerprint()["sha256"][:16] in str(refused.value)
    assert torch.equal(other.head.weight, untouched)


def test_heads_only_file_needs_a_frozen_part(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match="no frozen part"):
        FrozenCheckpointer(Model(frozen=False)).load(save(Model(), tmp_path))


def test_full_model_on_request_loads_into_an_unfrozen_one(tmp_path: Path) -> None:
    path = save(Model(3.0), tmp_path, save_full_model=True)
    assert set(torch.load(path, weights_only=True)["model"]) == set(Model(frozen=False).state_dict())
    model = Model(1.0, frozen=False)
    FrozenCheckpointer(model, strict=True).load(path)
    assert (model.trunk.conv.weight == 3).all()


def test_a_full_model_brings_its_backbone(tmp_path: Path) -> None:
    """One file is enough: which weights the model was built on does not matter."""
    trained = Model(3.0)
    path = save(trained, tmp_path, save_full_model=True)
    model = Model(1.0)
    FrozenCheckpointer(model, strict=True).load(path)
    assert model.trunk.fingerprint() == trained.trunk.fingerprint()
    assert torch.equal(model.head.weight, trained.head.weight)


def test_frozen_weights_that_came_from_a_file_are_fetched_from_there_again(tmp_path: Path) -> None:
    donor = Model(4.0, frozen=False)
    zoo = tmp_path / "zoo.pth"
    torch.save({"model": donor.state_dict()}, zoo)
    model = Model(1.0)
    checkpointer = FrozenCheckpointer(model, str(tmp_path))
    checkpointer.load(str(zoo))
    checkpointer.save("heads")
    fresh = Model(1.0)
    FrozenCheckpointer(fresh, strict=True).load(str(tmp_path / "heads.pth"))
    assert torch.equal(fresh.trunk.state_dict()["conv.weight"], donor.trunk.conv.weight)
    zoo.unlink()
    with pytest.raises(CheckpointMismatchError, match="zoo.pth"):
        FrozenCheckpointer(Model(1.0)).load(str(tmp_path / "heads.pth"))


def test_misfit_is_an_error_when_strict_and_a_warning_when_fine_tuning(tmp_path: Path) -> None:
    path = save(Model(classes=5), tmp_path)
    with pytest.raises(CheckpointMismatchError, match=r"head.weight.*\(5, 4\).*\(7, 4\)"):
        FrozenCheckpointer(Model(classes=7), strict=True).load(path)
    other = Model(classes=7)
    FrozenCheckpointer(other).load(path)
    assert other.head.weight.shape == (7, 4)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        FrozenCheckpointer(Model()).load(str(tmp_path / "nowhere.pth"))
    path = Path(save(Model(), tmp_path))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="model_final.pth.*damaged"):
        FrozenCheckpointer(Model()).load(str(path))


def test_frozen_parts_are_found_by_prefix() -> None:
    assert list(frozen_parts(Model())) == ["trunk"] and not frozen_parts(Model(frozen=False))
