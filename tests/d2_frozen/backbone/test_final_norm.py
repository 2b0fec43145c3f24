"""MODEL.TIMM.FINAL_NORM: the network's own norm behind the last stage, as timm applies it before its classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from d2_frozen.backbone import FrozenBackbone, create_timm_backbone, save_weights
from d2_frozen.backbone.timm_backbone import final_norm_of

SMALL_SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 4]}


def test_res5_is_what_timm_gives_its_classifier() -> None:
    """Swin: timm's forward_features ends with the norm. All other maps are as without it."""
    torch.manual_seed(0)
    network = timm.create_model("swinv2_tiny_window8_256", num_classes=0, img_size=64, **SMALL_SWIN).eval()
    with torch.no_grad():
        network.norm.weight.uniform_(0.5, 2.0)
        network.norm.bias.uniform_(-1.0, 1.0)
        images = torch.randn(2, 3, 64, 64)
        expected = network.forward_features(images).permute(0, 3, 1, 2)
        backbone = create_timm_backbone(
            "swinv2_tiny_window8_256", arguments={**SMALL_SWIN, "img_size": 64}, final_norm=True
        ).eval()
        without = create_timm_backbone(
            "swinv2_tiny_window8_256", arguments={**SMALL_SWIN, "img_size": 64}
        ).eval()
        state = network.state_dict()
        renamed = {
            key.replace("norm.", "final_norm.") if key.startswith("norm.") else f"network.{key}": value
            for key, value in state.items()
        }
        assert not backbone.load_state_dict(renamed, strict=False).missing_keys
        without.load_state_dict(renamed, strict=False)
        maps, plain = backbone(images), without(images)
    assert torch.allclose(maps["res5"], expected, atol=1e-5)
    assert not torch.allclose(maps["res5"], plain["res5"], atol=1e-2)
    assert all(torch.equal(maps[name], plain[name]) for name in ("res2", "res3", "res4"))


@pytest.mark.parametrize(
    "name, norm",
    [
        ("swin_tiny_patch4_window7_224", "norm"),
        ("convnext_atto", "head.norm"),
        ("resnet18", ""),
        ("regnety_002", ""),
    ],
)
def test_where_networks_have_it(name: str, norm: str) -> None:
    network = timm.create_model(name, num_classes=0)
    assert final_norm_of(network, network.feature_info[-1]["num_chs"])[0] == norm


def test_convnext_normalises_every_cell_and_resnet_has_nothing() -> None:
    images = torch.randn(1, 3, 64, 64)
    convnext = create_timm_backbone("convnext_atto", final_norm=True).eval()
    cells = convnext(images)["res5"]
    assert torch.allclose(cells.mean(dim=1), torch.zeros(1), atol=1e-4)
    assert create_timm_backbone("resnet18", final_norm=True).final_norm is None


def test_it_is_frozen_and_in_the_fingerprint() -> None:
    name, arguments = "swinv2_tiny_window8_256", {**SMALL_SWIN, "img_size": 64}
    frozen = FrozenBackbone(create_timm_backbone(name, arguments=arguments, final_norm=True))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert {"final_norm.weight", "final_norm.bias"} <= set(frozen.state_dict())
    before = frozen.fingerprint()
    with torch.no_grad():
        frozen.get_parameter("final_norm.weight").add_(1)
    assert frozen.fingerprint() != before


def test_a_file_must_bring_it(tmp_path: Path) -> None:
    """A file without the norm serves maps without it, and is refused where the norm is wanted."""
    name, arguments = "swinv2_tiny_window8_256", {**SMALL_SWIN, "img_size": 64}
    network = timm.create_model(name, num_classes=0, img_size=64, **SMALL_SWIN)
    whole = {key: torch.randn_like(value) for key, value in network.named_parameters()}
    save_weights(whole, tmp_path / "whole.safetensors")
    norm = create_timm_backbone(
        name, str(tmp_path / "whole.safetensors"), arguments=arguments, final_norm=True
    ).final_norm
    assert norm is not None and torch.equal(norm.weight, whole["norm.weight"])
    part = {key: value for key, value in whole.items() if not key.startswith("norm.")}
    save_weights(part, tmp_path / "part.safetensors")
    create_timm_backbone(name, str(tmp_path / "part.safetensors"), arguments=arguments)
    with pytest.raises(ValueError, match="missing: norm.bias, norm.weight"):
        create_timm_backbone(name, str(tmp_path / "part.safetensors"), arguments=arguments, final_norm=True)


def test_without_res5_there_is_nothing_to_normalise() -> None:
    with pytest.raises(ValueError, match="FINAL_NORM is for res5"):
        create_timm_backbone("convnext_atto", out_features=["res3"], final_norm=True)
