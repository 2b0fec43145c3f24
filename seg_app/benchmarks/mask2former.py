"""Our Mask2Former head against the public one, on CPU: equal weights, equal inputs, equal answers, in turns.

    git clone https://github.com/facebookresearch/Mask2Former
    python -m d2_frozen.bench mask2former --checkout Mask2Former [--size 512] [--batch 1] [--json FILE] [KEY VALUE ...]

Only the head's files of the checkout are imported (on either engine), and nothing of it needs compiling: where its CUDA
operator is missing, it uses plain PyTorch by itself. "training" is the forward pass with the predictions of all layers
and the backward pass to parameters and maps, without losses; "inference" the forward pass to the last prediction.
KEY VALUE are those of a segmentation config, such as MODEL.MASK_FORMER.DEC_LAYERS 4.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2_frozen.benchmarks.measuring import (
    Clock,
    Seconds,
    add_measuring_flags,
    alternate,
    machine_facts,
    phase_table,
    with_ratio,
    write_json,
)
from d2_frozen.engine.allocator import keep_freed_memory
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from seg_app.config import add_segmentation_config
from seg_app.models.mask_former_head import Mask2FormerHead

NAMES = ("ours", "public")
# Norm of the difference over the norm of the tensor. Gradients jump where a sampling point crosses the border of two
# cells, or a ReLU's input crosses 0, and over fifteen layers rounding makes some do so.
TOLERANCE = {"answers": 1e-4, "gradients": 5e-3}
_GRADIENT = "gradient of "
# Channels of Swin-B at strides 4, 8, 16, 32.
_CHANNELS = (128, 256, 512, 1024)
# Packages of the checkout whose __init__ would import much more than the head.
_PACKAGES = (
    "",
    ".modeling",
    ".modeling.meta_arch",
    ".modeling.pixel_decoder",
    ".modeling.transformer_decoder",
)
_COMPILED = "MultiScaleDeformableAttention"


def main(arguments: list[str]) -> dict[str, Any]:
    """Command line; returns what is also written with ``--json``."""
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.bench mask2former",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkout", type=Path, required=True, help="a checkout of facebookresearch/Mask2Former"
    )
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    add_measuring_flags(parser, "runs", rounds=7, warmup=1)
    args = parser.parse_args(arguments)
    cfg = add_segmentation_config(get_cfg())
    cfg.merge_from_list(args.opts)
    heads = build_heads(cfg, args.checkout)
    facts = {"machine": machine_facts(), "size": args.size, "batch": args.batch, "options": args.opts}
    result = {**facts, **compare(heads, args.size, args.batch, args.rounds, args.warmup, args.cpu_time)}
    print(report(result))
    write_json(result, args.json)
    return result


def compare(
    heads: dict[str, nn.Module], size: int, batch: int, rounds: int, warmup: int, cpu_time: bool = False
) -> dict[str, Any]:
    """Seconds of both by section, after their answers have been compared.

    Raises:
        RuntimeError: the heads give different answers or gradients.
    """
    keep_freed_memory()  # as train_net.py does; for both
    maps = _maps(size, batch)
    answers = {name: _train_step(head, maps, Clock())[0] for name, head in heads.items()}
    largest = largest_differences(answers["ours"], answers["public"])
    del answers
    now = Clock(cpu_time)
    training = {n: lambda head=head: _train_step(head, maps, now)[1] for n, head in heads.items()}
    result: dict[str, Any] = {
        "unit": "CPU seconds" if cpu_time else "seconds",
        "largest differences": largest,
    }
    result["training"] = with_ratio(alternate(training, rounds, warmup))
    inference = {n: _inference(head, maps, now) for n, head in heads.items()}
    result["inference"] = with_ratio(alternate(inference, rounds, warmup))
    return result


def report(result: dict[str, Any]) -> str:
    """The result as tables a person reads."""
    facts = "  ".join(f"{k}: {v}" for k, v in result["machine"].items())
    blocks = [f"{result['batch']} images of {result['size']} px  {' '.join(result['options'])}  {facts}"]
    for section in ("training", "inference"):
        rows = result[section]
        blocks.append(phase_table(f"{section}, {result['unit']}", rows, list(rows["ours"])))
    differences = [f"{kind} {difference:.1e}" for kind, difference in result["largest differences"].items()]
    return "\n\n".join([*blocks, f"largest relative difference: {', '.join(differences)}"])


def largest_differences(ours: dict[str, Tensor], public: dict[str, Tensor]) -> dict[str, float]:
    """Of "answers" and of "gradients": norm of the difference over the norm, of the tensor that differs most.

    Raises:
        RuntimeError: one is above ``TOLERANCE``, or the tensors are not the same ones.
    """
    largest = dict.fromkeys(TOLERANCE, 0.0)
    # Some gradients are 0 but for rounding (of a bias before a norm), and have no digits to compare.
    least = 1e-4 * max((float(x.norm()) for n, x in public.items() if n.startswith(_GRADIENT)), default=0.0)
    for name in sorted(ours.keys() | public.keys(), key=lambda name: (name.startswith(_GRADIENT), name)):
        a, b = ours.get(name), public.get(name)
        if a is None or b is None or a.shape != b.shape:
            shapes = [None if x is None else tuple(x.shape) for x in (a, b)]
            raise RuntimeError(f"{name} has shape {shapes[0]} in our head and {shapes[1]} in the public one.")
        kind = "gradients" if name.startswith(_GRADIENT) else "answers"
        difference = float((a - b).norm()) / max(float(b.norm()), least)
        if not difference <= TOLERANCE[kind]:
            raise RuntimeError(
                f"{name} differs by {difference:.2g} of its norm between our head and the public one; they do "
                "different work, so their times cannot be compared."
            )
        largest[kind] = max(largest[kind], difference)
    return largest


def build_heads(cfg: CfgNode, checkout: Path) -> dict[str, nn.Module]:
    """Both heads with the same start weights.

    Raises:
        FileNotFoundError: the folder is no checkout of Mask2Former.
    """
    public_class = import_public_head(checkout)
    shapes = {
        f"res{i + 2}": ShapeSpec(channels=channels, stride=4 << i) for i, channels in enumerate(_CHANNELS)
    }
    torch.manual_seed(0)
    ours = Mask2FormerHead(cfg, shapes)
    # At their start values all offsets and weights are the same for every query; a trained head's are not.
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
                parameter.normal_(std=0.02)
    public = public_class(cfg, shapes)
    public.load_state_dict(ours.state_dict())
    return {"ours": ours, "public": public}


def import_public_head(checkout: Path) -> type[nn.Module]:
    """The class MaskFormerHead of a checkout, without what its packages import beside it (data sets, Swin, ...)."""
    folder = checkout / "mask2former"
    if not (folder / "modeling" / "meta_arch" / "mask_former_head.py").is_file():
        raise FileNotFoundError(
            f"{checkout} is no checkout of Mask2Former: there is no mask2former/modeling in it. Get one with "
            "`git clone https://github.com/facebookresearch/Mask2Former`."
        )
    for package in _PACKAGES:
        module = types.ModuleType("mask2former" + package)
        module.__path__ = [str(folder.joinpath(*package.split(".")[1:]))]
        sys.modules[module.__name__] = module
    if _COMPILED not in sys.modules and importlib.util.find_spec(_COMPILED) is None:
        # Without its functions, each call falls back to plain PyTorch.
        sys.modules[_COMPILED] = types.ModuleType(_COMPILED)
    for name in ("pixel_decoder.msdeformattn", "transformer_decoder.mask2former_transformer_decoder"):
        importlib.import_module(f"mask2former.modeling.{name}")
    return importlib.import_module("mask2former.modeling.meta_arch.mask_former_head").MaskFormerHead


def _maps(size: int, batch: int) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(1)
    sides = [-(-size // (4 << i)) for i in range(4)]
    return {
        f"res{i + 2}": torch.randn(batch, channels, side, side, generator=numbers)
        for i, (channels, side) in enumerate(zip(_CHANNELS, sides))
    }


def _train_step(
    head: nn.Module, maps: dict[str, Tensor], now: Callable[[], float]
) -> tuple[dict[str, Tensor], Seconds]:
    """Answers and gradients by name, and seconds."""
    head.train().zero_grad()
    inputs = {name: one.detach().requires_grad_() for name, one in maps.items()}
    all_layers = (
        {"every_layer": True} if isinstance(head, Mask2FormerHead) else {}
    )  # the public one always does
    start = now()
    answers = _flat(head(inputs, **all_layers))
    forwarded = now()
    numbers = torch.Generator().manual_seed(2)
    outer = [torch.randn(x.shape, generator=numbers) / x[0].numel() for x in answers.values()]
    begun = now()
    torch.autograd.backward(list(answers.values()), outer)
    end = now()
    found = {name: x.detach() for name, x in answers.items()}
    found.update({_GRADIENT + n: x.grad for n, x in inputs.items() if x.grad is not None})
    found.update({_GRADIENT + n: p.grad for n, p in head.named_parameters() if p.grad is not None})
    seconds = {"forward": forwarded - start, "backward": end - begun}
    return found, {**seconds, "both": sum(seconds.values())}


def _inference(head: nn.Module, maps: dict[str, Tensor], now: Callable[[], float]) -> Callable[[], Seconds]:
    def run() -> Seconds:
        head.eval()
        start = now()
        with torch.no_grad():
            head(maps)
        return {"forward": now() - start}

    return run


def _flat(predictions: dict[str, Any]) -> dict[str, Tensor]:
    """pred_logits and pred_masks of the last layer, and those of the others with _0, _1, ..."""
    found = {name: predictions[name] for name in ("pred_logits", "pred_masks")}
    for i, earlier in enumerate(predictions["aux_outputs"]):
        found.update({f"{name}_{i}": earlier[name] for name in ("pred_logits", "pred_masks")})
    return found
