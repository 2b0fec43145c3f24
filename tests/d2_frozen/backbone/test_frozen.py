"""A frozen backbone: no training loop may change it, and nobody else may notice that it is wrapped."""

import copy

import pytest
import torch
from torch import nn

from d2_frozen.backbone import (
    FrozenBackbone,
    create_timm_backbone,
    exclude_frozen_from_ddp,
    freeze_backbone,
    freeze_stages,
    frozen,
)
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone


class TinyBackbone(Backbone):
    """A stem and two stages with batch norm and dropout, so that train() would show."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4))
        self.res2 = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.res3 = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        c2 = self.res2(self.stem(x)).relu()
        return {"res2": c2, "res3": self.res3(c2) * self.scale}

    def output_shape(self):
        return {"res2": ShapeSpec(channels=8, stride=4), "res3": ShapeSpec(channels=8, stride=8)}

    @property
    def size_divisibility(self):
        return 8

    @property
    def padding_constraints(self):
        return {"square_size": 64}


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(2, 3, 32, 32)


def _model(precision="fp32"):
    torch.manual_seed(1)
    model = nn.Module()
    model.backbone = FrozenBackbone(TinyBackbone(), precision)
    model.head = nn.Conv2d(8, 2, 1)
    return model


def test_training_moves_the_head_and_not_one_bit_of_the_backbone(images):
    model = _model()
    before = copy.deepcopy(model.state_dict())
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.head(model.backbone(images)["res3"]).square().sum().backward()
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("backbone."))
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith("head."))


def test_forward_has_no_graph_yet_heads_can_save_its_outputs(images):
    model = _model()
    maps = model.backbone(images.requires_grad_())
    assert not any(m.requires_grad or m.is_inference() for m in maps.values())
    model.head(maps["res3"]).sum().backward()
    assert model.head.weight.grad is not None and images.grad is None


def test_train_does_not_reach_it(images):
    model = _model().train()
    first, second = model.backbone(images), model.backbone(images)
    assert all(torch.equal(first[k], second[k]) for k in first), "dropout is active"
    assert not any(m.training for m in model.backbone.modules()) and not model.backbone.inner.training
    assert model.backbone.inner.stem[1].num_batches_tracked == 0
    assert model.head.training


def test_names_are_those_of_the_unwrapped_backbone():
    inner = TinyBackbone()
    plain = (
        list(inner.state_dict()),
        [n for n, _ in inner.named_parameters()],
        [n for n, _ in inner.named_buffers()],
    )
    wrapped = FrozenBackbone(inner)
    names = (
        list(wrapped.state_dict()),
        [n for n, _ in wrapped.named_parameters()],
        [n for n, _ in wrapped.named_buffers()],
    )
    assert names == plain
    assert wrapped.scale is inner.scale and wrapped.stem is inner.stem


def test_it_forwards_the_shape_of_the_backbone():
    inner = TinyBackbone()
    wrapped = FrozenBackbone(inner)
    assert isinstance(wrapped, Backbone)
    assert wrapped.output_shape() == inner.output_shape()
    assert (wrapped.size_divisibility, wrapped.padding_constraints) == (8, {"square_size": 64})


def test_loading_copying_and_moving_reach_the_inner_tensors(images):
    source, target = FrozenBackbone(TinyBackbone()), FrozenBackbone(TinyBackbone())
    assert not target.load_state_dict(source.state_dict()).missing_keys
    assert torch.equal(target(images)["res3"], source(images)["res3"])
    twin = copy.deepcopy(source)
    with torch.no_grad():
        twin.scale.add_(1)
    assert twin.inner.scale is twin.scale and not torch.equal(twin.scale, source.scale)
    twin.to(torch.float64)
    assert twin.inner.scale.dtype == twin.inner.stem[0].weight.dtype == torch.float64


@pytest.mark.parametrize(("precision", "relative"), [("bf16", 0.04), ("fp16", 0.005)])
def test_low_precision_is_close_and_leaves_the_weights_alone(images, precision, relative):
    inner = TinyBackbone()
    exact = FrozenBackbone(inner)(images)["res3"]
    low = FrozenBackbone(inner, precision)
    out = low(images)["res3"]
    error = (out - exact).norm() / exact.norm()
    assert out.dtype == torch.float32 and 0 < error < relative
    assert {t.dtype for t in low.state_dict().values()} == {torch.float32, torch.int64}
    assert len(list(low.parameters())) == len(list(inner.parameters()))


def test_low_precision_follows_loaded_and_edited_weights(images):
    low = FrozenBackbone(TinyBackbone(), "bf16")
    low(images)
    other = FrozenBackbone(TinyBackbone(), "bf16")
    low.load_state_dict(other.state_dict())
    assert torch.equal(low(images)["res3"], other(images)["res3"])
    with torch.no_grad():
        low.scale.mul_(2)
    assert torch.equal(low(images)["res3"], 2 * other(images)["res3"])


def test_autocast_outside_changes_the_dtype_of_outputs_not_the_arithmetic(images):
    wrapped = FrozenBackbone(TinyBackbone())
    exact = wrapped(images)["res3"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = wrapped(images)["res3"]
    assert out.dtype == torch.bfloat16 and torch.equal(out, exact.bfloat16())


def test_fingerprint_tells_weights_apart_and_nothing_else(images):
    wrapped = FrozenBackbone(TinyBackbone(), name="tiny")
    first = wrapped.fingerprint()
    assert first["name"] == "tiny" and len(first["sha256"]) == 64
    low = FrozenBackbone(copy.deepcopy(wrapped.inner), "bf16", name="tiny")
    low(images)
    assert low.fingerprint() == copy.deepcopy(wrapped).fingerprint() == first
    with torch.no_grad():
        low.res3[0].bias[3] += 1e-6
    assert low.fingerprint()["sha256"] != first["sha256"]
    low.load_state_dict(wrapped.state_dict())
    assert low.fingerprint() == first


def test_fingerprint_ignores_what_timm_computes_for_itself():
    """Position tables of Swin are no weights: they change with the window, the fingerprint does not."""
    network = create_timm_backbone("swinv2_pico_window8_256")
    wrapped = FrozenBackbone(network)
    before = wrapped.fingerprint()["sha256"]
    block = network.network.layers[0].blocks[0]
    block.attn.set_window_size((4, 4))
    assert wrapped.fingerprint()["sha256"] == before


def test_export_and_trace_record_the_backbone_itself(images):
    """What runs is made of the weights at the first forward, which no recorder follows."""
    wrapped = FrozenBackbone(create_timm_backbone("resnet18"), "bf16")
    truth = wrapped.inner(images)
    for recorded in (
        torch.export.export(wrapped, (images,), strict=False).module(),
        torch.jit.trace(wrapped, images, strict=False),
    ):
        maps = recorded(images)
        assert all(torch.allclose(maps[name], truth[name], atol=1e-5) for name in truth)
        assert not any(one.requires_grad for one in maps.values())


def test_originals_that_stayed_elsewhere_cannot_be_recorded(images, monkeypatch):
    monkeypatch.setattr(frozen, "_is_recorded", lambda: True)
    low = FrozenBackbone(TinyBackbone(), "bf16").to("meta")
    with pytest.raises(
        RuntimeError, match="float32 weights of TinyBackbone, which are on cpu.*PRECISION fp32"
    ):
        low._compute(images.to("meta"))


class OneSize(nn.Module):
    """Somebody's own network, as vision transformers can be."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 4, 16, stride=16), nn.BatchNorm2d(4)

    def forward(self, x):
        if x.shape[-2:] != (32, 32):
            raise ValueError(f"images are 32x32, not {tuple(x.shape[-2:])}")
        return {"last": self.norm(self.patches(x))}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_of_one_image_size_is_not_tried_on_another(images, precision):
    inner = OneSize().eval()
    exact = inner(images)["last"]
    found = FrozenBackbone(inner, precision)(images)["last"]
    assert (found - exact).norm() <= (0.02 if precision == "bf16" else 0) * exact.norm()


def test_what_is_no_backbone_and_what_are_no_images_are_named(images):
    for inner, seen in [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "Sequential gives a Tensor"),
        (nn.Identity(), "Identity gives a Tensor"),
    ]:
        with pytest.raises(TypeError, match=f"{seen}; a backbone gives maps by name"):
            FrozenBackbone(inner)(images)
    inner = TinyBackbone()
    inner.forward = lambda x: {"res2": (x, x)}
    with pytest.raises(TypeError, match=r"TinyBackbone gives a dict of \{'res2': tuple\}"):
        FrozenBackbone(inner)(images)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), not \(3, 32, 32\)"):
        FrozenBackbone(TinyBackbone())(images[0])


@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
def test_weights_that_somebody_rounded_are_refused(images, change):
    wrapped = FrozenBackbone(TinyBackbone())
    getattr(wrapped, change)()
    with pytest.raises(TypeError, match=r"weights of TinyBackbone are torch\.\w+.*MODEL.FROZEN.PRECISION"):
        wrapped(images)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_stages_count_from_the_stem(images, count):
    parts = ["stem", "res2", "res3"]
    partly = freeze_stages(TinyBackbone(), count).train()
    for i, part in enumerate(parts):
        module = getattr(partly, part)
        assert all(p.requires_grad == (i >= count) for p in module.parameters())
        assert all(m.training == (i >= count) for m in module.modules())
    assert partly.scale.requires_grad, "what belongs to no stage trains"
    before = copy.deepcopy(partly.state_dict())
    partly(images)["res3"].sum().backward()
    after = partly.state_dict()
    moved = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert moved == set(parts[count:]), "norm statistics of trained stages only"
    assert [n for n, _ in partly.named_parameters()] == [n for n, _ in TinyBackbone().named_parameters()]


def test_frozen_stages_of_a_timm_network():
    partly = freeze_stages(create_timm_backbone("swinv2_pico_window8_256", drop_path_rate=0.2), 2).train()
    trained = {n for n, p in partly.named_parameters() if p.requires_grad}
    frozen = {n for n, p in partly.named_parameters() if not p.requires_grad}
    assert {n.split(".")[2] for n in trained if ".layers." in n} == {"1", "2", "3"}
    assert {n.split(".")[1] for n in frozen} == {"patch_embed", "layers"}
    layers = partly.network.layers
    assert not layers[0].blocks[1].drop_path1.training and layers[1].blocks[1].drop_path1.training


def test_detectron2_resnet_freezes_by_stages():
    from detectron2.modeling.backbone.resnet import BasicStem, ResNet

    stages = [
        ResNet.make_stage(
            b, n, stride_per_block=[s], in_channels=i, out_channels=o, bottleneck_channels=4, norm="BN"
        )
        for b, n, s, i, o in _resnet_stages()
    ]
    resnet = ResNet(BasicStem(3, 8, norm="BN"), stages, out_features=["res2", "res3"])
    partly = freeze_stages(resnet, 2).train()
    assert not any(p.requires_grad for part in (partly.stem, partly.res2) for p in part.parameters())
    assert all(p.requires_grad for p in partly.res3.parameters())
    assert not partly.stem.training and not partly.res2.training and partly.res3.training
    whole = FrozenBackbone(resnet).train()
    assert not any(p.requires_grad for p in whole.parameters()) and not whole.res3.training


def _resnet_stages():
    from detectron2.modeling.backbone.resnet import BottleneckBlock

    return [(BottleneckBlock, 1, 1, 8, 16), (BottleneckBlock, 1, 2, 16, 32)]


def test_freeze_key():
    assert isinstance(freeze_backbone(TinyBackbone(), "all", "bf16"), FrozenBackbone)
    plain = TinyBackbone()
    assert freeze_backbone(plain, "none") is plain and freeze_backbone(plain, 0) is plain
    assert not freeze_backbone(TinyBackbone(), "stem").stem[0].weight.requires_grad
    for wrong in ("some", "-1", 1.5, True, ""):
        with pytest.raises(ValueError, match="MODEL.BACKBONE.FREEZE"):
            freeze_backbone(TinyBackbone(), wrong)
    with pytest.raises(ValueError, match="3 parts"):
        freeze_backbone(TinyBackbone(), 4)
    with pytest.raises(ValueError, match="MODEL.FROZEN.PRECISION"):
        freeze_backbone(TinyBackbone(), "all", "int4")
    with pytest.raises(ValueError, match="MODEL.FROZEN.PRECISION"):
        freeze_backbone(TinyBackbone(), "none", "bf16")
    with pytest.raises(ValueError, match="MODEL.FROZEN.COMPILE"):
        freeze_backbone(TinyBackbone(), "res2", compile=True)


def test_ddp_leaves_frozen_tensors_alone(tmp_path):
    model = exclude_frozen_from_ddp(_model())
    inner = model.backbone.inner
    frozen = {f"backbone.{n}" for n in [*dict(inner.named_parameters()), *dict(inner.named_buffers())]}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        assert set(parallel.parameters_to_ignore) == frozen
        assert list(parallel.named_buffers()) and not parallel.modules_buffers
    finally:
        torch.distributed.destroy_process_group()
