"""The fast forward gives the maps of the network that it was made of."""

import contextlib
import copy
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from d2_frozen.backbone import FrozenBackbone, create_timm_backbone, frozen
from d2_frozen.backbone.fast import fast_network, graphs
from d2_frozen.backbone.fast.folding import folded_copy
from d2_frozen.backbone.fast.kernels import attention_kernel_works, row_kernels_work
from d2_frozen.backbone.fast.layouts import Bounded, window_layout, window_masks
from d2_frozen.backbone.fast.swin import FastSwin, fast_swin

CPU = torch.device("cpu")
SMALL = dict(embed_dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))


def network(name, final_norm=False, out_features=("res2", "res3", "res4", "res5"), **arguments):
    """A network whose every tensor matters: none left at 0 or 1, as some start."""
    torch.manual_seed(0)
    backbone = create_timm_backbone(
        name, out_features=out_features, arguments=arguments, final_norm=final_norm
    )
    backbone.eval().requires_grad_(False)
    for tensor in [*backbone.parameters(), *(b for n, b in backbone.named_buffers() if "running" in n)]:
        if tensor.dim() == 1:
            tensor.copy_(
                torch.rand_like(tensor) * 0.4 + 0.8 if tensor.mean() > 0.5 else torch.randn_like(tensor) * 0.1
            )
    for name, tensor in backbone.named_parameters():
        if "logit_scale" in name:
            tensor.copy_(torch.linspace(0, 6, tensor.numel()).view_as(tensor))  # above log 100: clamped
        elif "norm1.weight" in name or "norm2.weight" in name or name.endswith("gamma"):
            tensor.copy_(torch.rand_like(tensor) * 0.5)  # timm: 0 in SwinV2
        elif "relative_position_bias_table" in name:
            tensor.normal_()
    return backbone


def images(height, width, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height + width))


def assert_same_maps(got, truth, relative=1e-5):
    assert list(got) == list(truth)
    for name, feature in truth.items():
        assert got[name].shape == feature.shape
        assert (got[name] - feature).norm() <= relative * feature.norm(), name


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("swinv2_tiny_window8_256", SMALL),
        ("swinv2_base_window12_192", SMALL),
        ("swinv2_pico_window8_256", {}),  # shifts before it pads
        ("swinv2_giant_window12_192", {**SMALL, "window_size": 4, "main_norm_period": 2}),
        ("swin_tiny_patch4_window7_224", SMALL),
        ("swin_tiny_patch4_window7_224", {**SMALL, "window_size": 8}),
    ],
)
@pytest.mark.parametrize(
    "size", [(256, 256), (96, 160), (32, 64)]
)  # whole windows; padded; smaller than a window
def test_swin_is_exact_whatever_the_windows_do(name, arguments, size):
    backbone = network(name, **arguments)
    fast = fast_network(backbone, "fp32", CPU)
    assert isinstance(fast, FastSwin)
    batch = images(*size)
    assert_same_maps(fast(batch), backbone(batch))


def test_swin_shares_the_weights_of_the_network():
    backbone = network("swinv2_pico_window8_256")
    own = sum(t.numel() for t in backbone.parameters())
    shared = {t.data_ptr() for t in backbone.parameters()}
    fast = fast_network(backbone, "fp32", CPU)
    assert sum(t.numel() for t in fast.parameters() if t.data_ptr() not in shared) < 0.01 * own


def test_some_features_and_the_final_norm():
    backbone = network("swinv2_tiny_window8_256", final_norm=True, **SMALL)
    assert backbone.final_norm is not None
    batch = images(64, 96)
    assert_same_maps(fast_network(backbone, "fp32", CPU)(batch), backbone(batch))
    torch.manual_seed(0)
    part = create_timm_backbone("swinv2_pico_window8_256", out_features=["res3", "res4"]).eval()
    with torch.no_grad():
        assert_same_maps(fast_network(part, "fp32", CPU)(batch), part(batch))


def test_another_block_class_is_not_taken_for_swin():
    backbone = network("swinv2_pico_window8_256")
    block = backbone.network.layers[0].blocks[0]
    block.__class__ = type("Other", (type(block),), {"forward": lambda self, x: 2 * x})
    assert fast_swin(backbone) is None
    batch = images(64, 64)
    assert_same_maps(fast_network(backbone, "fp32", CPU)(batch), backbone(batch))


@pytest.mark.parametrize(
    "name, folded",
    [
        ("resnet18", True),
        ("resnet50d", True),  # deep stem, average pooling in the shortcut
        ("seresnet50", True),
        ("regnety_002", True),  # norms with their activation inside
        ("convnext_atto", True),  # layer scale
        ("efficientnet_b0", True),
        ("vit_tiny_patch16_224", False),
        ("vit_small_patch14_dinov2", True),  # layer scale
    ],
)
def test_norms_and_scales_go_into_the_weights(name, folded):
    backbone = network(name)
    before = copy.deepcopy(backbone.state_dict())
    fast = fast_network(backbone, "fp32", CPU)
    assert (fast is not backbone) == folded
    left = [m for m in fast.modules() if "BatchNorm" in type(m).__name__ or type(m).__name__ == "LayerScale"]
    assert not folded or not left
    batch = images(64, 96)
    assert_same_maps(fast(batch), backbone(batch))
    assert all(torch.equal(t, before[n]) for n, t in backbone.state_dict().items())


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_detectron2_resnet_folds_its_norms(norm):
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import build_resnet_backbone

    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = 50
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    torch.manual_seed(0)
    resnet = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval().requires_grad_(False)
    for name, tensor in resnet.named_buffers():
        if name.endswith("running_mean"):
            tensor.normal_(std=0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    fast = fast_network(resnet, "fp32", CPU)
    assert not [m for m in fast.modules() if "BatchNorm" in type(m).__name__]
    batch = images(64, 64)
    assert_same_maps(fast(batch), resnet(batch))


class UsesTheConvolutionTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.bn.running_mean.fill_(1.0)

    def forward(self, x):
        y = self.conv(x)
        return {"res2": self.bn(y) + y}


class TwoConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 4, 4), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x):
        y = self.first(x).relu()
        return {"res2": self.second(y) + y}


def test_a_convolution_that_others_use_keeps_its_norm(caplog):
    backbone = UsesTheConvolutionTwice().eval()
    with torch.no_grad():
        assert folded_copy(backbone) is None
    assert "left as they are" in caplog.text
    assert fast_network(backbone, "fp32", CPU) is backbone


def test_a_window_layout_is_the_roll_and_partition_that_it_stands_for():
    """4 x 6 map, window 2, shift 1: the first window of a rolled map begins at row 1, column 1."""
    layout = window_layout(1, (4, 6), (2, 2), (1, 1), True, CPU)
    tokens = torch.arange(24).view(4, 6)
    assert layout.into[:4].tolist() == tokens[1:3, 1:3].flatten().tolist()
    assert layout.kinds == ((0, 2), (1, 1), (2, 2), (3, 1)) and layout.padding is None
    assert layout.into[-4:].tolist() == [tokens[r, c].item() for r in (3, 0) for c in (5, 0)]  # the corner
    assert torch.equal(layout.into[layout.out_of], torch.arange(24))


def test_padding_has_no_token():
    layout = window_layout(3, (3, 3), (2, 2), (0, 0), True, CPU)
    assert layout.padding.sum() == 3 * (16 - 9) and layout.kinds == ((0, 12),)
    assert torch.equal(layout.into[layout.out_of], torch.arange(27))
    assert not layout.padding[layout.out_of].any()


def test_masks_part_the_two_ends_of_a_map():
    """Window 2, shift 1: rows 0 and 1 of a window at the last row come from opposite ends."""
    inside, right, below, corner = window_masks((2, 2), (1, 1))
    assert not inside.any()
    assert below[0].tolist() == [0, 0, -100, -100] and right[0].tolist() == [0, -100, 0, -100]
    assert (corner == 0).sum() == 4, "each sees itself only"


def test_layouts_of_many_sizes_do_not_pile_up():
    fast = fast_network(network("swinv2_pico_window8_256"), "fp32", CPU)
    for width in range(32, 32 * 25, 32):
        fast(images(32, width, batch=1))
    assert len(fast._layouts) == fast._layouts.limit == 16
    kept = Bounded(2)
    made = [kept.get(key, lambda: object()) for key in (1, 2, 1, 3, 1)]
    assert made[0] is made[2] is made[4] and len(kept) == 2


def test_threads_do_not_take_layouts_away_from_each_other():
    kept = Bounded(2)

    def look_up(seed):
        keys = torch.randint(4, (2000,), generator=torch.Generator().manual_seed(seed)).tolist()
        return all(kept.get(key, functools.partial(int, key)) == key for key in keys)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(look_up, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert len(copy.deepcopy(kept)) == 0


def test_it_is_made_again_after_the_weights_change():
    wrapped, other = (FrozenBackbone(network("swinv2_pico_window8_256")) for _ in range(2))
    batch = images(64, 64)
    first = wrapped(batch)
    with torch.no_grad():
        other.inner.network.layers[0].blocks[0].attn.cpb_mlp[2].weight.mul_(3)
    assert not torch.equal(other(batch)["res2"], first["res2"])
    wrapped.load_state_dict(other.state_dict())
    assert torch.equal(wrapped(batch)["res2"], other(batch)["res2"])
    assert torch.equal(copy.deepcopy(wrapped)(batch)["res2"], other(batch)["res2"])


@pytest.mark.parametrize(("precision", "relative"), [("bf16", 0.05), ("fp16", 0.01)])
@pytest.mark.parametrize("name", ["swinv2_pico_window8_256", "resnet18", "vit_tiny_patch16_224"])
def test_low_precision_is_close(name, precision, relative):
    backbone = network(name)
    before = copy.deepcopy(backbone.state_dict())
    batch = images(64, 96)
    low = FrozenBackbone(backbone, precision)(batch)
    assert all(torch.equal(t, before[n]) for n, t in backbone.state_dict().items())
    assert_same_maps(low, backbone(batch), relative)
    assert all(m.dtype == torch.float32 and m.is_contiguous() and not m.is_inference() for m in low.values())


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler on CPU"
)
@pytest.mark.parametrize(("precision", "relative"), [("fp32", 1e-5), ("bf16", 0.05)])
@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "swin_tiny_patch4_window7_224"])
def test_compiled_swin_compiles_nothing_at_a_new_size(name, precision, relative, caplog):
    """Whole windows first, then padded ones, then only sizes of those kinds."""
    backbone = network(name, out_features=["res2"], **SMALL, window_size=5)
    wrapped = FrozenBackbone(backbone, precision, compile=True)
    sizes = [(160, 160), (64, 96), (160, 320), (96, 96), (320, 160), (64, 256)]
    for number, size in enumerate(sizes):
        batch = images(*size)
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            assert_same_maps(wrapped(batch), backbone(batch), relative)
    assert "uncompiled" not in caplog.text  # as an error from recompiling would have it


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler on CPU"
)
@pytest.mark.parametrize(("precision", "relative"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_another_compiled_network_compiles_for_two_sizes(precision, relative, caplog):
    """For the first, and at the second for any."""
    torch.manual_seed(0)
    backbone = TwoConvolutions().eval().requires_grad_(False)
    with torch.no_grad():
        fast = fast_network(backbone, precision, CPU, compile=True)
        for number, size in enumerate([(64, 64), (64, 96), (160, 96), (128, 192), (64, 64), (96, 256)]):
            batch = images(*size)
            with torch._dynamo.config.patch(error_on_recompile=number > 1):
                assert_same_maps(fast(batch), backbone(batch), relative)
    assert "uncompiled" not in caplog.text  # as an error from recompiling would have it


def test_where_torch_cannot_compile_the_network_runs_as_it_is(monkeypatch, caplog):
    def fails(network):
        def call(images):
            raise AssertionError("expected stride 1\nand more")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    backbone = network("resnet18")
    wrapped = FrozenBackbone(backbone, compile=True)
    for size in [(64, 64), (64, 96)]:
        assert_same_maps(wrapped(images(*size)), backbone(images(*size)))
    assert caplog.text.count("runs uncompiled") == 1 and "(AssertionError: expected stride 1)" in caplog.text


def test_loops_that_cannot_be_compiled_run_as_they_are(monkeypatch, caplog):
    """A temporary folder that is full, or that allows no code."""

    def fails(function):
        def call(*arguments):
            raise RuntimeError(
                "C++ compile error\n...\na.h:7:2: fatal error: cannot write: No space left on device"
            )

        return call

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    backbone = network("swinv2_pico_window8_256")
    wrapped = FrozenBackbone(backbone, compile=True)
    for size in [(64, 64), (64, 96)]:
        assert_same_maps(wrapped(images(*size)), backbone(images(*size)))
    assert caplog.text.count("runs uncompiled") == 1 and "No space left on device)" in caplog.text


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_low_precision_computes_with_channels_last(name):
    """Not the originals, whose memory stays as it is."""
    backbone = network(name)
    low = fast_network(backbone, "bf16", CPU)
    last = torch.channels_last
    kernels = [m.weight for m in low.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert kernels and all(weight.is_contiguous(memory_format=last) for weight in kernels)
    assert all(tensor.is_contiguous() for tensor in backbone.parameters())
    maps = FrozenBackbone(backbone, "bf16")(images(64, 96))
    assert all(m.is_contiguous() for m in maps.values())


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_int8_is_close(caplog):
    backbone = network("swinv2_pico_window8_256")
    batch = images(64, 96)
    low = FrozenBackbone(backbone, "int8")(batch)
    assert_same_maps(low, backbone(batch), 0.1)
    assert {t.dtype for t in backbone.parameters()} == {torch.float32} and "slower than bf16" in caplog.text


@pytest.mark.parametrize("torchao", [None, types.SimpleNamespace(__version__="0.0", quantization=None)])
def test_int8_without_a_fitting_torchao_says_what_to_install(monkeypatch, torchao):
    """It is not there; or it is too old."""
    monkeypatch.setitem(sys.modules, "torchao", torchao)
    with pytest.raises(RuntimeError, match="pip install (--upgrade )?torchao"):
        FrozenBackbone(network("swinv2_pico_window8_256"), "int8")(images(32, 32))


def test_fp8_without_a_gpu_that_has_it_says_so():
    with pytest.raises(RuntimeError, match="fp8 needs a GPU of compute capability 8.9 .* but runs on cpu"):
        FrozenBackbone(network("swinv2_pico_window8_256"), "fp8")(images(32, 32))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_a_network_without_linear_layers_has_nothing_for_8_bits(caplog):
    backbone = network("resnet18")
    batch = images(64, 64)
    assert_same_maps(FrozenBackbone(backbone, "int8")(batch), FrozenBackbone(backbone, "bf16")(batch), 0)
    assert "resnet18 has none; it runs in bf16" in caplog.text


def test_without_a_compiler_the_error_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="MODEL.FROZEN.COMPILE needs a C\\+\\+ compiler"):
        FrozenBackbone(network("resnet18"), compile=True)(images(32, 32))


def test_low_precision_keeps_its_originals_out_of_the_accelerator():
    """torch's "meta" stands for an accelerator: to(device) moves float32, and leaves the originals of bf16."""
    exact, low = (FrozenBackbone(network("swinv2_pico_window8_256"), p).to("meta") for p in ("fp32", "bf16"))
    assert {t.device.type for t in exact.parameters()} == {"meta"}
    assert {t.device.type for t in low.parameters()} == {"cpu"}


@pytest.mark.parametrize("name", ["swinv2_pico_window8_256", "swin_tiny_patch4_window7_224"])
def test_all_that_a_fast_network_computes_with_is_where_the_backbone_is(name):
    """The "meta" device stands for a GPU: kernels can read nothing that stayed in the computer's memory."""
    fast = fast_network(network(name).to("meta"), "fp32", torch.device("meta"))
    assert isinstance(fast, FastSwin)
    assert {t.device.type for t in (*fast.parameters(), *fast.buffers())} == {"meta"}


def test_graphs_are_recorded_on_a_stream_of_the_gpu_of_the_images(monkeypatch):
    """torch's own stream is on the GPU that is current when the first graph of a process is made."""
    made, used = [], []

    class Recording(contextlib.nullcontext):
        def __init__(self, graph, pool, stream=None, capture_error_mode="global"):
            super().__init__()
            used.append((pool, stream))

    def stream(device):
        made.append(device)
        return f"stream of {device}"

    for name, stand_in in {
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: None),
        "Stream": stream,
        "device": contextlib.nullcontext,
        "graph": Recording,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    inner = nn.Module()
    inner.forward = inner.run = lambda images, *prepared: {"res2": images}
    inner.prepare = lambda images: None
    fast = graphs.GraphPerSize(inner)
    for width in (2, 2, 4, 4):
        fast(torch.empty(1, 3, 2, width, device="meta"))
    assert made == [torch.device("meta")] and used == [("pool", "stream of meta")] * 2


def test_sizes_beyond_those_that_are_recorded_run_as_they_are(monkeypatch):
    """Ten sizes in turns: to record one at each of its turns, in the place of another, takes longer than to run it."""
    network = nn.Module()
    network.forward = lambda images: {"res2": 2 * images}
    recorded = []

    def record(self, images):
        recorded.append(images.shape[-1])
        own, maps = images.clone(), {"res2": torch.zeros_like(images)}
        replay = types.SimpleNamespace(replay=lambda: maps["res2"].copy_(2 * own))
        return graphs.Recorded(replay, own, maps, None)

    monkeypatch.setattr(graphs.GraphPerSize, "_record", record)
    fast = graphs.GraphPerSize(network)
    for turn in range(4):
        for width in range(1, 11):
            batch = torch.full((1, 3, 2, width), float(turn + width))
            assert torch.equal(fast(batch)["res2"], 2 * batch)
    assert recorded == list(range(1, 9)), "each at its second batch, and never again"


def test_threads_do_not_get_the_maps_of_others(monkeypatch):
    """A graph has one place for images and one for maps: whoever comes between would read the other's."""
    network = nn.Module()
    network.forward = lambda images: {"res2": 2 * images}

    def record(self, images):
        own, maps = images.clone(), {"res2": torch.zeros_like(images)}

        def replay():
            time.sleep(0.001)  # lets the others in
            maps["res2"].copy_(2 * own)

        return graphs.Recorded(types.SimpleNamespace(replay=replay), own, maps, None)

    monkeypatch.setattr(graphs.GraphPerSize, "_record", record)
    fast = graphs.GraphPerSize(network)
    batches = [torch.full((1, 3, 2, 2), float(number)) for number in range(24)]
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(fast, batches))
    assert all(torch.equal(maps["res2"], 2 * batch) for maps, batch in zip(results, batches))


def test_threads_that_begin_at_once_make_one_network(monkeypatch):
    made = []

    def slowly(inner, *settings):
        made.append(inner)
        time.sleep(0.02)  # lets the others in
        return fast_network(inner, *settings)

    monkeypatch.setattr(frozen, "fast_network", slowly)
    wrapped = FrozenBackbone(network("swinv2_pico_window8_256"))
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(wrapped, [images(32, 32)] * 4))
    assert len(made) == 1
    assert all(torch.equal(maps["res5"], results[0]["res5"]) for maps in results)


def test_a_size_that_cannot_be_recorded_runs_as_it_is(monkeypatch, caplog):
    """It ended the run; the recording may lack memory that the forward does not need."""
    network = nn.Module()
    network.forward = lambda images: {"res2": 2 * images}
    tried = []

    def record(self, images):
        tried.append(images.shape[-1])
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(graphs.GraphPerSize, "_record", record)
    fast = graphs.GraphPerSize(network)
    for width in (2, 2, 2, 3, 3):
        batch = torch.full((1, 3, 2, width), float(width))
        assert torch.equal(fast(batch)["res2"], 2 * batch)
    assert tried == [2]
    (warning,) = [line.getMessage() for line in caplog.records]
    assert "(1, 3, 2, 2) run unrecorded" in warning and "Tried to allocate" in warning


GPU_TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.01, "int8": 0.1, "fp8": 0.2}


def check_on_gpu(name, precision, compile, arguments, sizes):
    """Each size three times: as it is, recorded, replayed; then with other weights."""
    backbone = network(name, **arguments)
    wrapped = FrozenBackbone(copy.deepcopy(backbone), precision, compile=compile).to("cuda")
    for _ in range(2):
        for size in sizes:
            batch = images(*size)
            truth = backbone(batch)
            for _turn in range(3):
                maps = {key: value.cpu() for key, value in wrapped(batch.cuda()).items()}
                assert_same_maps(maps, truth, GPU_TOLERANCE[precision])
        for tensor in (next(backbone.parameters()), next(wrapped.parameters())):
            tensor.mul_(2)
    assert {p.device.type for p in wrapped.parameters()} == {"cuda" if precision == "fp32" else "cpu"}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "compile"),
    [("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True), ("fp16", False), ("fp16", True)],
)
@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "swin_tiny_patch4_window7_224"])
def test_on_a_gpu(name, precision, compile):
    """Padded windows, whole windows (of 8), the first size again."""
    check_on_gpu(name, precision, compile, SMALL, [(64, 96), (128, 128), (64, 96)])


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "compile"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_another_network_on_a_gpu(precision, compile):
    check_on_gpu("resnet18", precision, compile, {}, [(64, 96), (64, 64), (64, 96)])


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_eight_bits_on_a_gpu(precision, compile):
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no 8-bit floats")
    check_on_gpu("swinv2_tiny_window8_256", precision, compile, SMALL, [(64, 96), (128, 128), (64, 96)])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("length", "dtype"), [(64, torch.float32), (49, torch.float16), (144, torch.bfloat16)]
)
def test_triton_kernels_run_on_a_gpu(length, dtype, caplog):
    device = torch.device("cuda", 0)
    assert attention_kernel_works(device, dtype, length, 32) and row_kernels_work(device, dtype), caplog.text


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (CPU build of torch)"
)
def test_triton_kernels_in_their_interpreter():
    """On CPU; TRITON_INTERPRET must be set before Triton is imported. 72 tokens: more than one block of keys."""
    code = """
import torch
from d2_frozen.backbone.fast.kernels import attention_difference, row_difference
cpu = torch.device("cpu")
for dtype, length, width, tolerance in ((torch.float32, 72, 16, 1e-5), (torch.float16, 25, 32, 1e-2)):
    error = attention_difference(cpu, dtype, length, width)
    assert error < tolerance, (dtype, length, width, error)
    error = row_difference(cpu, dtype)
    assert error < tolerance, (dtype, error)
print("agrees")
"""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "agrees", done.stderr
