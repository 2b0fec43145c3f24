"""Where does a forward spend its time? torch's profiler, summed by kind of work; and how much work of a kind there is.

On a GPU the kernels are counted, on a CPU the operators of torch, each without those that it calls. The kind is read
from the name, as kernels tell nothing else: what no pattern knows is "other".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from d2_frozen.backbone import FrozenBackbone
from d2_frozen.backbone.fast import PRECISIONS

MATRIX, ATTENTION, NORM, LAYOUT = "matrix products", "attention", "norm + residual", "layout + casts"
COMPILED, ELEMENTWISE, OTHER = "compiled loops", "activations, sums", "other"
KINDS = (MATRIX, ATTENTION, NORM, LAYOUT, COMPILED, ELEMENTWISE, OTHER)

# The first that fits: a fused attention may be called after its GEMMs, a GEMM after the copies inside it.
_PATTERNS = (
    (COMPILED, r"^triton_|compiledfxgraph|cpp_fused"),
    (ATTENTION, r"_attend\b|fmha|flash|attention|softmax"),
    (MATRIX, r"embed_patches"),
    (NORM, r"normalised|layer_?norm|batch_?norm|group_?norm"),
    (LAYOUT, r"nchwtonhwc|nhwctonchw|merge_patches|channels_first"),
    (MATRIX, r"gemm|nvjet|cutlass|xmma|cublas|splitk|convolution|conv2d|fprop|cudnn"),
    (MATRIX, r"::(b?mm|addmm|baddbmm|_addmm_activation|_int_mm|_scaled_mm|linear|_linear_pointwise)\b"),
    (LAYOUT, r"copy|::cat\b|catarray|index|gather|transpose|memcpy|memset|masked_fill|reorder"),
    (ELEMENTWISE, r"elementwise|gelu|relu|silu|sigmoid|::(add|sub|mul|div|clamp|exp|where)_?\b"),
)


class Share(NamedTuple):
    """Of one kind of work, in one forward.

    seconds: of its kernels; with the profiler's own work where that is an operator of torch.
    calls: how many. largest: the kernel (operator) that takes most of the seconds.
    """

    seconds: float
    calls: float
    largest: str


def kind_of(name: str) -> str:
    """One of KINDS, for the name of a kernel or of one of torch's operators."""
    for kind, pattern in _PATTERNS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return OTHER


def time_by_kind(run: Callable[[], Any], device: torch.device, runs: int = 3) -> dict[str, Share]:
    """Profile ``run``, which has been warmed up; only kinds that occur, in the order of KINDS."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(runs):
            run()
        if on_gpu:
            torch.cuda.synchronize(device)
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    calls: dict[str, int] = defaultdict(int)
    for event in profiler.key_averages():
        took = event.self_device_time_total if on_gpu else event.self_cpu_time_total  # microseconds
        # Of a compiled region a GPU has an event of its own, beside those of its kernels.
        if took > 0 and not (on_gpu and getattr(event, "is_user_annotation", False)):
            kind = kind_of(event.key)
            seconds[kind][event.key] += took / 1e6 / runs
            calls[kind] += event.count
    return {
        kind: Share(
            sum(seconds[kind].values()), calls[kind] / runs, max(seconds[kind], key=seconds[kind].__getitem__)
        )
        for kind in KINDS
        if kind in seconds
    }


@torch.no_grad()
def flops_by_kind(backbone: nn.Module, images: Tensor) -> dict[str, int]:
    """Of the network as it is: {"matrix products", "attention"}; an addition and a multiplication are two."""
    on_cpu: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own = {on_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}  # torch counts the others
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        backbone(images)
    found = {MATRIX: 0, ATTENTION: 0}
    for operator, flops in counter.get_flop_counts()["Global"].items():
        found[ATTENTION if re.search("bmm|attention", str(operator)) else MATRIX] += flops
    return found


def least_traffic(backbone: FrozenBackbone, images: Tensor) -> dict[str, float]:
    """Bytes a Swin network moves if each GEMM, attention and norm reads its inputs and writes its outputs once.

    26 tokens x channels per block: qkv 1 + 3, attention 3 + 1, proj 1 + 1, norm with residual 3, MLP 1 + 4 and 4 + 1,
    norm with residual 3.
    """
    size = PRECISIONS[backbone.precision].itemsize
    found = {MATRIX: 0.0, ATTENTION: 0.0, NORM: 0.0}
    height, width = images.shape[2] // 4, images.shape[3] // 4
    network: Any = backbone.inner.network
    for stage in network.layers:
        if not isinstance(stage.downsample, nn.Identity):
            height, width = -(-height // 2), -(-width // 2)
        tokens, channels = images.shape[0] * height * width, stage.blocks[0].mlp.fc1.in_features
        per_block = size * len(stage.blocks)
        found[MATRIX] += per_block * (16 * tokens * channels + 12 * channels**2)
        found[ATTENTION] += per_block * 4 * tokens * channels
        found[NORM] += per_block * 6 * tokens * channels
    return found
