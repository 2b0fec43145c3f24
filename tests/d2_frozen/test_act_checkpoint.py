"""Activation checkpointing: equal losses, gradients and statistics, fewer maps kept."""

from __future__ import annotations

import copy
import logging
from argparse import Namespace
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from d2_frozen.act_checkpoint import use_act_checkpoint
from d2_frozen.backbone import freeze_backbone
from d2_frozen.backbone.timm_backbone import create_timm_backbone
from d2_frozen.engine import FrozenTrainer
from d2_frozen.neck.bifpn import BiFPN
from d2_frozen.neck.build import PlainFPN
from d2_frozen.neck.residual_fpn import ResidualFPN
from d2_frozen.train_net import setup
from detectron2.modeling.backbone import Backbone
from seg_app.models.pixel_decoder import EncoderLayer
from video_app.models.blocks import VideoBlock

NAMES = ("res2", "res3", "res4", "res5")
SWIN = {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [2, 2, 2, 2]}


class _Model(nn.Module):
    """As build_model makes it: the backbone is called so."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([one.square().mean() for one in self.backbone(images).values()]).sum()


def swin(freeze: str = "all", drop_path_rate: float = 0.0) -> Backbone:
    torch.manual_seed(0)
    backbone = create_timm_backbone("swinv2_tiny_window8_256", drop_path_rate=drop_path_rate, arguments=SWIN)
    return freeze_backbone(backbone, freeze)


def kept_bytes(model: nn.Module, *inputs: object) -> tuple[Tensor, int]:
    """Loss of a forward pass, and how much of it is kept for backward outside of layers that compute again."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()
        if place.data_ptr() not in parameters:
            kept[place.data_ptr()] = place.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*inputs)
    return loss, sum(kept.values())


def assert_equal_but_smaller(model: nn.Module, at_most: float, *inputs: object) -> None:
    """One step with it and one without: equal loss, gradients and buffers, at most such a share of the maps."""
    other = copy.deepcopy(model)
    assert use_act_checkpoint(other)
    results = []
    for one in (model, other):
        torch.manual_seed(1)  # of dropout and drop-path
        loss, size = kept_bytes(one.train(), *inputs)
        loss.sum().backward()
        results.append((loss, size))
    (loss, size), (other_loss, other_size) = results
    assert torch.equal(loss, other_loss)
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers()))
    assert other_size <= at_most * size


@pytest.mark.parametrize("norm", ["GN", "BN"])
@pytest.mark.parametrize("neck", [BiFPN, ResidualFPN])
def test_necks_keep_less_and_learn_the_same(neck: type, norm: str) -> None:
    model = _Model(neck(swin(), NAMES, 32, norm=norm))
    assert_equal_but_smaller(model, 0.5, torch.randn(2, 3, 64, 96))


@pytest.mark.parametrize("freeze", ["none", "res3"])
def test_fine_tuned_swin_keeps_less_and_learns_the_same(freeze: str) -> None:
    assert_equal_but_smaller(_Model(swin(freeze, drop_path_rate=0.3)), 0.5, torch.randn(2, 3, 64, 64))


def test_fine_tuned_vit_keeps_less_and_learns_the_same() -> None:
    backbone = create_timm_backbone("vit_tiny_patch16_224", arguments={"embed_dim": 24, "depth": 3})
    assert_equal_but_smaller(_Model(freeze_backbone(backbone, "none")), 0.5, torch.randn(2, 3, 64, 64))


def test_video_block_draws_the_same_twice() -> None:
    block = nn.Sequential(VideoBlock(["time", "space"], 16, 2, dropout=0.3, drop_path=0.3))
    assert_equal_but_smaller(block, 0.3, torch.randn(2, 3, 4, 16, requires_grad=True))


def test_layer_of_the_pixel_decoder_draws_the_same_twice() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = EncoderLayer(width=16, feedforward=32, dropout=0.3, levels=2, heads=2, points=2)

        def forward(self, cells: Tensor) -> Tensor:
            return self.layer(cells, torch.zeros(20, 16), torch.rand(1, 20, 2, 2), ((4, 4), (2, 2)))

    assert_equal_but_smaller(Stack(), 0.3, torch.randn(2, 20, 16, requires_grad=True))


def test_nothing_is_computed_again_without_a_backward() -> None:
    block = nn.Sequential(VideoBlock(["all"], 16, 2))
    use_act_checkpoint(block)
    calls = []
    block[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        block.train()(torch.randn(1, 2, 4, 16))
    block.eval()(torch.randn(1, 2, 4, 16, requires_grad=True)).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PlainFPN(swin(), NAMES, 16), "changes nothing"),
        (lambda: create_timm_backbone("resnet18"), "trained part of backbone keeps all its maps"),
    ],
)
def test_what_cannot_is_said(
    make: Callable[[], Backbone], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert use_act_checkpoint(_Model(make())) == []
    assert says in caplog.text


def test_the_key_reaches_the_model_and_a_training_ends_with_equal_weights(
    flags: Callable[..., Namespace],
) -> None:
    ends = []
    for on in (False, True):
        trainer = FrozenTrainer(setup(flags("MODEL.USE_ACT_CHECKPOINT", str(on))))
        assert {layer.act_checkpoint for layer in trainer.model.backbone.layers} == {on}
        trainer.resume_or_load(resume=False)
        trainer.train()
        ends.append(trainer.model.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
