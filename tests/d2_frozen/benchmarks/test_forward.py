"""Modes of the forward, their errors, and kinds of work in a profile; nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from d2_frozen.backbone import FrozenBackbone, create_timm_backbone
from d2_frozen.bench import main
from d2_frozen.benchmarks import forward, profiling

FEW = ["--size", "64", "--rounds", "1", "--warmup", "0"]


def test_every_mode_is_measured_and_profiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fourth mode fails, the others go on."""
    runner = forward._runner

    def failing(mode: str, *rest: Any) -> Any:
        if mode == "fp16":
            return lambda images: (_ for _ in ()).throw(RuntimeError("no such\nmachine"))
        return runner(mode, *rest)

    monkeypatch.setattr(forward, "_runner", failing)
    modes = ["timm-fp32", "fp32", "fp16", "bf16"]
    file = tmp_path / "found.json"
    name = ["--name", "swinv2_pico_window8_256", "--profile", "--json", str(file)]
    found = main(["forward", *name, *FEW, "--modes", *modes])
    assert json.loads(file.read_text()) == found
    assert list(found["modes"]) == modes and found["modes"]["fp16"] == {"failed": "RuntimeError: no such"}
    errors = {mode: max(one["error"].values()) for mode, one in found["modes"].items() if "error" in one}
    assert errors["timm-fp32"] == 0 < errors["fp32"] < 1e-5 < errors["bf16"] < 0.1
    assert list(found["profile"]) == ["timm-fp32", "fp32", "bf16"]
    for mode, kinds in found["profile"].items():
        assert sum(one["share"] for one in kinds.values()) == pytest.approx(1)
        seconds = sum(one["seconds"] for one in kinds.values())
        assert seconds == pytest.approx(found["modes"][mode]["seconds"])
        assert {profiling.MATRIX, profiling.ATTENTION, profiling.NORM} <= set(kinds)
        # timm's attention is matrix products too, so that theirs are not told apart.
        rates = {rate for one in kinds.values() for rate in one if "/s" in rate}
        assert rates == (set() if mode == "timm-fp32" else {"TFLOP/s", "GB/s (least)"})
    work = sum(one["seconds"] * one.get("TFLOP/s", 0) for one in found["profile"]["fp32"].values())
    assert work == pytest.approx(found["TFLOP"])
    printed = capsys.readouterr().out
    assert "profile of bf16" in printed and "RuntimeError: no such" in printed


@pytest.mark.parametrize(
    "mode",
    ["bf17", "timm-bf17", "timm-int8", "autocast-fp32", "autocast-bf16+compile", "bf16+", "other-bf16"],
)
def test_a_mode_that_there_is_not_is_refused_before_anything_is_measured(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "lively_backbone", lambda name: pytest.fail("began to measure"))
    with pytest.raises(ValueError, match=r"there is no mode .*; modes are fp32, bf16, .*timm-fp32"):
        main(["forward", *FEW, "--modes", "fp32", mode])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNT", profiling.MATRIX),
        ("cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x128_32x4_tn_align8>", profiling.MATRIX),
        ("aten::addmm", profiling.MATRIX),
        ("mkldnn::_linear_pointwise", profiling.MATRIX),
        ("aten::mkldnn_convolution", profiling.MATRIX),
        ("_attend", profiling.ATTENTION),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", profiling.ATTENTION),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", profiling.ATTENTION),
        ("_normalised", profiling.NORM),
        ("_embed_patches", profiling.MATRIX),
        ("_merge_patches", profiling.LAYOUT),
        ("_channels_first", profiling.LAYOUT),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>", profiling.NORM),
        ("at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", profiling.LAYOUT),
        ("at::native::CatArrayBatchedCopy<float, unsigned int, 2>", profiling.LAYOUT),
        ("Memcpy DtoD (Device -> Device)", profiling.LAYOUT),
        ("aten::index", profiling.LAYOUT),
        ("triton_per_fused__to_copy_abs_amax_clamp_0", profiling.COMPILED),
        ("## Call CompiledFxGraph ftnsphmz5ens3obbtvnimwqeyonkn32fs2l2 ##", profiling.COMPILED),
        ("at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", profiling.ELEMENTWISE),
        ("aten::gelu", profiling.ELEMENTWISE),
        ("aten::add_", profiling.ELEMENTWISE),
        ("aten::view", profiling.OTHER),
    ],
)  # fmt: skip
def test_kinds_of_kernels_and_operators(name: str, kind: str) -> None:
    assert profiling.kind_of(name) == kind


def test_work_is_counted_by_kind() -> None:
    """5 tokens of 8 channels: three linear layers, and attention of 2 heads, its two products of 5 x 5 x 4 each."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).view(1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v)

    found = profiling.flops_by_kind(Attends(), torch.randn(1, 5, 8))
    assert found == {profiling.MATRIX: 2 * 5 * 8 * 24, profiling.ATTENTION: 2 * (2 * 2 * 5 * 5 * 4)}


def test_least_traffic_of_a_swin_network() -> None:
    """Four stages of one block, 8 to 64 channels, on 32 x 32 pixels: 8 x 8 to 1 x 1 tokens."""
    small = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    backbone = create_timm_backbone("swinv2_tiny_window8_256", arguments=small).eval()
    images = torch.zeros(1, 3, 32, 32)
    exact, low = (profiling.least_traffic(FrozenBackbone(backbone, p), images) for p in ("fp32", "bf16"))
    cells, weights = 64 * 8 + 16 * 16 + 4 * 32 + 1 * 64, 12 * (8**2 + 16**2 + 32**2 + 64**2)
    assert exact[profiling.MATRIX] == 4 * (16 * cells + weights)
    assert exact[profiling.ATTENTION] == 4 * 4 * cells and exact[profiling.NORM] == 4 * 6 * cells
    assert low == {kind: count / 2 for kind, count in exact.items()}
