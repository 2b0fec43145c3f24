"""timm networks as pyramids, and the windows of Swin networks at sizes they were not built for."""

import pytest
import timm
import torch
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

from d2_frozen.backbone import FrozenBackbone, build_timm_backbone, create_timm_backbone, freeze_backbone
from d2_frozen.backbone.swin_v2 import PICO_NAME, windows_of_positions
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY


@pytest.mark.parametrize("name", [PICO_NAME, "resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_any_pyramid_gives_res2_to_res5_channels_first(name):
    backbone = create_timm_backbone(name).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    shapes = backbone.output_shape()
    assert list(maps) == list(shapes) == ["res2", "res3", "res4", "res5"]
    for (feature, value), stride in zip(maps.items(), (4, 8, 16, 32)):
        assert shapes[feature].stride == stride
        assert value.shape == (1, shapes[feature].channels, 64 // stride, 96 // stride)
    assert backbone.size_divisibility == 32


def test_subset_of_features_keeps_their_order_and_drops_what_lies_behind():
    whole, part = (
        create_timm_backbone(PICO_NAME),
        create_timm_backbone(PICO_NAME, out_features=["res4", "res2"]),
    )
    assert list(part.output_shape()) == ["res2", "res4"]
    kept = {n for n, _ in part.named_parameters()}
    assert {n for n, _ in whole.named_parameters()} - kept == {
        n for n, _ in whole.named_parameters() if "layers.3." in n
    }
    part.load_state_dict({k: v for k, v in whole.state_dict().items() if k in kept})
    images = torch.randn(1, 3, 64, 64)
    expected = whole.eval()(images)
    assert all(torch.equal(v, expected[k]) for k, v in part.eval()(images).items())


def test_parameter_names_are_timms():
    names = {n for n, _ in create_timm_backbone("resnet18").named_parameters()}
    of_timm = {f"network.{n}" for n, _ in timm.create_model("resnet18", num_classes=0).named_parameters()}
    assert names == of_timm


def test_stages_in_the_order_of_the_forward_pass():
    for name, stem in (("resnet18", "network.conv1."), (PICO_NAME, "network.patch_embed.")):
        backbone = create_timm_backbone(name)
        parts = backbone.parameters_by_stage()
        assert len(parts) == 5 and any(n.startswith(stem) for n in parts[0])
        assert sorted(n for part in parts for n in part) == sorted(n for n, _ in backbone.named_parameters())


def test_unknown_name_lists_the_nearest():
    with pytest.raises(ValueError, match=r"swinv2_pico.*Nearest: swinv2_pico_window8_256"):
        create_timm_backbone("swinv2_pico")


def test_a_network_without_pyramid_says_which_strides_it_lacks():
    plain = "strides \\[16\\].*or a plain ViT of timm's vision_transformer, deit or eva"
    with pytest.raises(ValueError, match=plain), torch.device("meta"):
        create_timm_backbone("beit_base_patch16_224")  # its position tables fix the image size


@pytest.mark.parametrize("features", [[], ["res1"], ["res2", "res2"], ["p3"]])
def test_wrong_features(features):
    with pytest.raises(ValueError, match="MODEL.TIMM.OUT_FEATURES"):
        create_timm_backbone("resnet18", out_features=features)


def test_registered_builder_reads_the_config():
    from d2_frozen import add_frozen_config
    from detectron2.config import get_cfg

    cfg = add_frozen_config(get_cfg())
    cfg.MODEL.TIMM.NAME = "resnet18"
    cfg.MODEL.TIMM.OUT_FEATURES = ["res3", "res5"]
    assert BACKBONE_REGISTRY.get("build_timm_backbone") is build_timm_backbone
    backbone = build_timm_backbone(cfg, ShapeSpec(channels=3))
    assert backbone.output_shape() == {
        "res3": ShapeSpec(channels=128, stride=8),
        "res5": ShapeSpec(channels=512, stride=32),
    }
    assert backbone.name == "resnet18"


def test_drop_path_acts_in_training_only():
    backbone = create_timm_backbone(PICO_NAME, drop_path_rate=0.5)
    for block in backbone.network.layers[3].blocks:
        torch.nn.init.ones_(block.norm1.weight)
    images = torch.randn(1, 3, 32, 32)
    backbone.eval()
    assert torch.equal(backbone(images)["res5"], backbone(images)["res5"])
    backbone.train()
    assert len({backbone(images)["res5"].sum().item() for _ in range(8)}) > 1
    with pytest.raises(ValueError, match="drop_path_rate"):
        create_timm_backbone("vgg11", drop_path_rate=0.1)


# ---- windows ----
def _blocks(network):
    return [[(b.window_size, b.shift_size) for b in stage.blocks] for stage in network.layers]


@pytest.mark.parametrize(
    ("name", "window", "native"), [(PICO_NAME, 8, 256), ("swin_tiny_patch4_window7_224", 7, 224)]
)
def test_every_stage_keeps_the_window_and_shifts_odd_blocks(name, window, native):
    """timm alone: the last stage, one window large at the native size, is never shifted."""
    with torch.device("meta"):
        plain = timm.create_model(name, num_classes=0)
    assert {s for _, s in _blocks(plain)[3]} == {(0, 0)}
    for blocks in _blocks(create_timm_backbone(name).network):
        for i, (size, shift) in enumerate(blocks):
            assert size == (window, window)
            assert shift == ((window // 2,) * 2 if i % 2 else (0, 0))


def test_released_window_changes_keep_their_pretraining_window_in_the_position_table():
    """swinv2 12to24: coordinates are divided by 12 - 1, in the last stage by 6 - 1."""
    with torch.device("meta"):
        network = create_timm_backbone("swinv2_base_window12to24_192to384").network
    assert [stage.blocks[0].attn.pretrained_window_size for stage in network.layers] == [(12, 12)] * 3 + [
        (6, 6)
    ]
    assert {size for blocks in _blocks(network) for size, _ in blocks} == {(24, 24)}
    assert [blocks[1][1] for blocks in _blocks(network)] == [(12, 12)] * 4


@pytest.mark.parametrize(
    ("name", "native"), [("swinv2_base_window12_192", 6), ("swinv2_base_window16_256", 8)]
)
def test_one_cell_in_the_last_stage_is_as_far_as_in_pretraining(name, native):
    """Its map has 6 x 6 cells at 192 pixels, 8 x 8 at 256, and timm's window there is no larger."""
    shape = {"embed_dim": 16, "depths": (1, 1, 1, 2), "num_heads": (1, 1, 1, 1)}
    pretraining = timm.create_model(name, num_classes=0, **shape).layers[3].blocks[0].attn
    assert pretraining.window_size == (native, native)
    network = create_timm_backbone(name, arguments=shape).network
    ours = network.layers[3].blocks[0].attn
    middle, reach = ours.window_size[0] - 1, native - 1
    around = slice(middle - reach, middle + reach + 1)
    assert torch.equal(ours.relative_coords_table[:, around, around], pretraining.relative_coords_table)
    assert windows_of_positions(network) == [native]
    assert windows_of_positions(create_timm_backbone(PICO_NAME)) == []


def test_at_native_size_the_unshifted_stages_equal_timm():
    torch.manual_seed(0)
    plain = timm.create_model(PICO_NAME, num_classes=0).eval()
    for stage in plain.layers:
        for block in stage.blocks:
            torch.nn.init.ones_(block.norm1.weight)
            torch.nn.init.ones_(block.norm2.weight)
    ours = create_timm_backbone(PICO_NAME).eval()
    missing, unexpected = ours.network.load_state_dict(plain.state_dict(), strict=False)
    assert not missing and set(unexpected) == {"norm.weight", "norm.bias"}
    images = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        expected = plain.forward_intermediates(images, intermediates_only=True)
        maps = list(ours(images).values())
    for value, reference in zip(maps[:3], expected[:3]):
        assert torch.allclose(value, reference, atol=1e-5)
    assert not torch.allclose(maps[3], expected[3], atol=1e-3), "stage 4 is shifted here, not in timm"


@pytest.mark.parametrize(("height", "width"), [(36, 100), (4, 4), (260, 68)])
def test_any_multiple_of_the_patch_runs(height, width):
    backbone = create_timm_backbone(PICO_NAME).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, height, width))
    for value, stride in zip(maps.values(), (4, 8, 16, 32)):
        assert value.shape[-2:] == (-(-height // stride), -(-width // stride))


def test_windows_see_no_further_than_themselves_at_a_large_size():
    """The second row of windows cannot reach res2 in the first one through one plain block."""
    backbone = create_timm_backbone(PICO_NAME, out_features=["res2"]).eval()
    stage = backbone.network.layers[0]
    stage.blocks = stage.blocks[:1]
    torch.nn.init.ones_(stage.blocks[0].norm1.weight)
    images = torch.randn(1, 3, 512, 512)
    changed = images.clone()
    changed[..., 32:, :] += 1  # the second row of windows begins at 8 cells x 4 pixels
    with torch.no_grad():
        a, b = backbone(images)["res2"], backbone(changed)["res2"]
    assert torch.equal(a[..., :8, :], b[..., :8, :]) and not torch.equal(a[..., 8:16, :], b[..., 8:16, :])


PAPER_NAMES = {
    "swinv2_tiny_window8_256.ms_in1k": (96, 8),
    "swinv2_small_window8_256.ms_in1k": (96, 8),
    "swinv2_base_window8_256.ms_in1k": (128, 8),
    "swinv2_base_window12_192.ms_in22k": (128, 12),
    "swinv2_large_window12_192.ms_in22k": (192, 12),
    "swin_small_patch4_window7_224.ms_in22k": (96, 7),
    "swin_base_patch4_window7_224.ms_in22k": (128, 7),
    "swin_large_patch4_window12_384.ms_in22k": (192, 12),
}


@pytest.mark.parametrize("name", PAPER_NAMES)
def test_released_names(name):
    """Channels double from stage to stage; window and shift are those of pretraining, also in the last stage."""
    channels, window = PAPER_NAMES[name]
    with torch.device("meta"):
        backbone = create_timm_backbone(name)
    assert [(n, s.channels, s.stride) for n, s in backbone.output_shape().items()] == [
        (f"res{i + 2}", channels * 2**i, 4 << i) for i in range(4)
    ]
    for blocks in _blocks(backbone.network):
        assert blocks[:2] == [((window, window), (0, 0)), ((window, window), (window // 2,) * 2)]
    assert timm.is_model_pretrained(name)


def test_windows_stay_at_1024_pixels():
    with torch.device("meta"):
        backbone = create_timm_backbone("swinv2_tiny_window8_256", arguments={"depths": (2, 2, 2, 2)})
        before = _blocks(backbone.network)
        maps = backbone(torch.empty(1, 3, 1024, 1024))
    assert [tuple(m.shape) for m in maps.values()] == [(1, 96 << i, 256 >> i, 256 >> i) for i in range(4)]
    assert _blocks(backbone.network) == before


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_opposite_borders_of_a_padded_map_do_not_see_each_other(name):
    """timm alone shifts before it pads: at 22 rows of windows of 8 or 7, the first rows would attend to the last."""
    torch.manual_seed(0)
    backbone = create_timm_backbone(name, arguments={"depths": (2, 1, 1, 1)})
    block = backbone.eval().network.layers[0].blocks[1]
    window, rows = block.window_size[0], 22
    one = torch.randn(1, rows, 24, 96)
    other = one.clone()
    other[:, -2:] += 1
    with torch.no_grad():
        moved = (block._attn(one) - block._attn(other)).abs().amax((0, 2, 3)) > 1e-6
    first = window // 2 + (rows - 2 - window // 2) // window * window  # of the shifted window that holds them
    assert moved.nonzero().flatten().tolist() == list(range(first, rows))


@pytest.mark.parametrize(
    "name, window", [("swinv2_tiny_window8_256", 8), ("swin_tiny_patch4_window7_224", 7)]
)
def test_maps_equal_torchvisions_where_windows_pad_them(name: str, window: int) -> None:
    """An independent implementation, which shifts and pads like the papers' detectors as long as a map is larger than
    a window. At 288 x 352 pixels res2 to res5 have 72 x 88 to 9 x 11 cells: most are no multiples of 8, or of 7."""
    shape = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
    v2 = name.startswith("swinv2")
    kinds: dict = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if v2 else {}
    other = SwinTransformer(patch_size=[4, 4], window_size=[window, window], **shape, **kinds).eval()
    with torch.no_grad():
        for key, tensor in other.named_parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
            if v2 and key.endswith("qkv.bias"):
                tensor[len(tensor) // 3 : 2 * len(tensor) // 3] = 0  # SwinV2 has none for keys
    ours = create_timm_backbone(name, arguments=shape).eval()
    found = ours.network.load_state_dict(_as_timm_names_them(other.state_dict(), v2), strict=False)
    assert not found.unexpected_keys and not any(
        key.endswith(("weight", "bias")) for key in found.missing_keys
    )
    images = torch.randn(2, 3, 288, 352)
    expected, x = [], images
    with torch.no_grad():
        for index, part in enumerate(other.features):
            x = part(x)
            expected += [x.permute(0, 3, 1, 2)] if index % 2 else []
        for maps in (ours(images), FrozenBackbone(ours)(images)):
            for one, truth in zip(maps.values(), expected, strict=True):
                assert (one - truth).abs().max() < 1e-5 * truth.abs().max()


def _as_timm_names_them(state: dict, v2: bool) -> dict:
    """torchvision's Swin: features 0 is the stem, odd ones are stages, even ones the merging in front of a stage."""
    named = {}
    for key, tensor in state.items():
        kind, number, *rest = key.split(".")
        index, leaf = int(number) if kind == "features" else -1, ".".join(rest[1:])
        if index < 0 or "relative_" in key and "bias_table" not in key:
            continue
        if index == 0:
            named[f"patch_embed.{'norm' if rest[0] == '2' else 'proj'}.{rest[1]}"] = tensor
        elif index % 2 == 0:
            named[f"layers.{index // 2}.downsample.{'.'.join(rest)}"] = tensor
        else:
            block = f"layers.{index // 2}.blocks.{rest[0]}"
            if leaf.startswith("mlp."):
                leaf = leaf.replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2")
            if v2 and leaf == "attn.qkv.bias":
                named[f"{block}.attn.q_bias"], _, named[f"{block}.attn.v_bias"] = tensor.chunk(3)
            else:
                named[f"{block}.{leaf}"] = tensor
    return named


def test_drop_path_acts_in_the_trained_part_only():
    backbone = create_timm_backbone(PICO_NAME, drop_path_rate=0.9)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images = torch.randn(1, 3, 32, 32)
    frozen = freeze_backbone(backbone, "all").train()
    assert torch.equal(frozen(images)["res5"], frozen(images)["res5"])
    partly = freeze_backbone(create_timm_backbone(PICO_NAME, drop_path_rate=0.9), "res3").train()
    for parameter in partly.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    runs = [partly(images) for _ in range(8)]
    assert all(torch.equal(run["res3"], runs[0]["res3"]) for run in runs)
    assert len({run["res5"].sum().item() for run in runs}) > 1


@pytest.mark.parametrize(
    "error", [OSError("no connection\nmore"), RuntimeError("No pretrained weights exist")]
)
def test_weights_that_cannot_be_downloaded(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the key and what works without internet; errors of other causes stay what they are."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(
        FileNotFoundError, match=r"PRETRAINED is 'hub'.*swinv2_tiny_window8_256: .*own_data.md"
    ):
        create_timm_backbone("swinv2_tiny_window8_256", "hub")
    with pytest.raises(type(error), match=str(error).splitlines()[0]):
        create_timm_backbone("swinv2_tiny_window8_256", "")


def test_a_user_without_home_is_told_where_weights_may_go(monkeypatch):
    """Containers: it is not the internet that is missing."""

    def fail(*_, **__):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(FileNotFoundError, match="home directory. Set HF_HOME to a folder"):
        create_timm_backbone("swinv2_tiny_window8_256", pretrained="hub")


# ---- stages ----
@pytest.mark.parametrize("name", [PICO_NAME, "efficientnet_lite0", "mobilenetv3_small_050", "dla46_c"])
def test_up_to_a_stage_there_is_what_its_map_depends_on(name):
    """By autograd through the real network; of the first one, timm's own groups are the stages."""
    backbone = create_timm_backbone(name).eval()
    parameters = dict(backbone.named_parameters())
    maps = backbone(torch.randn(1, 3, 64, 64))
    parts = backbone.parameters_by_stage()
    assert len(parts) == 5 and sorted(sum(parts, [])) == sorted(parameters)
    assert parts[0] and parts[0][0] == next(iter(parameters))
    up_to = set(parts[0])
    for part, feature in zip(parts[1:], maps.values()):
        slopes = torch.autograd.grad(
            feature.sum(), [*parameters.values()], allow_unused=True, retain_graph=True
        )
        up_to |= set(part)
        assert up_to == {key for key, slope in zip(parameters, slopes) if slope is not None}


def test_stages_of_maps_that_are_not_asked_for():
    whole, some = (
        create_timm_backbone("mobilenetv3_small_050", out_features=f)
        for f in (["res2", "res3", "res4", "res5"], ["res2", "res4"])
    )
    assert some.parameters_by_stage() == whole.parameters_by_stage()[:4]
    with pytest.raises(ValueError, match="MODEL.BACKBONE.FREEZE is 5, but mobilenetv3_small_050 has 4 parts"):
        freeze_backbone(some, "res5")


def test_frozen_stages_of_blocks_that_timm_counts_otherwise():
    """Five groups of timm's for the blocks of an EfficientNet, four maps: res2 ends with the second of them."""
    partly = freeze_backbone(create_timm_backbone("efficientnet_lite0"), "res2").train()
    before = {key: value.clone() for key, value in partly.state_dict().items()}
    maps = partly(torch.randn(2, 3, 64, 64))
    assert not maps["res2"].requires_grad and maps["res3"].requires_grad
    moved = {key for key, value in partly.state_dict().items() if not torch.equal(value, before[key])}
    assert moved and all(key.startswith("network.blocks.") and int(key.split(".")[2]) > 1 for key in moved)
    behind = {name for part in partly.inner.parameters_by_stage()[2:] for name in part}
    assert {name for name, p in partly.named_parameters() if p.requires_grad} == behind


def test_stages_of_fused_branches_are_refused():
    """Each map of HRNet depends on all branches, but on some of the last fusions only."""
    with torch.device("meta"):
        backbone = create_timm_backbone("hrnet_w18_small")
    for stage in ("res2", "res5"):
        with pytest.raises(
            ValueError, match=f"FREEZE cannot be '{stage}' for MODEL.TIMM.NAME hrnet_w18_small"
        ):
            freeze_backbone(backbone, stage)
    frozen = freeze_backbone(backbone, "stem")
    assert {n.split(".")[1] for n, p in frozen.named_parameters() if not p.requires_grad} == {
        "conv1", "bn1", "conv2", "bn2",
    }  # fmt: skip


# ---- networks of one image size ----
@pytest.mark.parametrize("freeze", ["all", "stem", "none"])
@pytest.mark.parametrize("name", ["coatnet_pico_rw_224", "swinv2_cr_tiny_224"])
def test_a_network_of_one_image_size_is_named_where_images_have_another(name, freeze):
    arguments = {"depths": (1, 1, 1, 1)} if name.startswith("swinv2") else None
    backbone = freeze_backbone(create_timm_backbone(name, arguments=arguments), freeze)
    message = f"64x96 pixels do not fit MODEL.TIMM.NAME {name}, which is built for .*, 224x224 pixels .timm: "
    with pytest.raises(ValueError, match=message):
        backbone(torch.randn(2, 3, 64, 96))
    assert backbone(torch.randn(2, 3, 224, 224))["res5"].shape[-2:] == (7, 7)


def test_other_errors_stay_what_they_are():
    """Images with a channel too many fit at no size; a network for any size may break for any reason."""
    with pytest.raises(RuntimeError, match="channels"):
        create_timm_backbone("coatnet_pico_rw_224")(torch.randn(1, 4, 64, 64))
    backbone = create_timm_backbone("resnet18")
    backbone.network.layer4.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backbone(torch.randn(1, 3, 64, 64))


def test_a_network_without_coarse_groups_is_frozen_as_a_whole() -> None:
    """timm asserts that nobody asks RDNet for them, so that it could not even be built."""
    backbone = create_timm_backbone("rdnet_tiny")
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 64, 64))
    assert {name: x.shape[-1] for name, x in maps.items()} == {"res2": 16, "res3": 8, "res4": 4, "res5": 2}
    assert all(not p.requires_grad for p in freeze_backbone(backbone, "all").parameters())
    with pytest.raises(ValueError, match="timm gives no stages for rdnet_tiny"):
        freeze_backbone(create_timm_backbone("rdnet_tiny"), "res2")
