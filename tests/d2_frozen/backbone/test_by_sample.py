"""Features sample by sample: independent of the others in the batch; stored ones stand for the run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from d2_frozen.backbone import FrozenBackbone
from d2_frozen.backbone.by_sample import Batch, FeatureService
from d2_frozen.caching import FEATURES, SLOT, FeatureCache, Slot, Store
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import ImageList


class Two(Backbone):
    """Maps of strides 2 (channels last, as Swin gives them) and 4; counts its images."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(3, 5, 4, 4)
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        last = self.fine(images).contiguous(memory_format=torch.channels_last)
        return {"fine": last, "coarse": self.coarse(images)}

    def output_shape(self):
        return {"fine": ShapeSpec(channels=4, stride=2), "coarse": ShapeSpec(channels=5, stride=4)}


def image_sample(height: int, width: int, **more) -> dict:
    return {"image": torch.zeros(3, height, width), **more}


def padded(sample: dict) -> tuple[int, int]:
    """To multiples of 4."""
    return tuple(-(-side // 4) * 4 for side in sample["image"].shape[-2:])


def batch_of(*hw: tuple[int, int]) -> torch.Tensor:
    batch = torch.zeros(len(hw), 3, 12, 16)
    for row, (height, width) in enumerate(hw):
        batch[row, :, :height, :width] = torch.randn(3, height, width)
    return batch


@pytest.fixture
def frozen() -> FrozenBackbone:
    return FrozenBackbone(Two())


def test_an_image_is_computed_as_if_it_were_alone(frozen: FrozenBackbone) -> None:
    sizes = [(12, 16), (7, 9)]
    images = batch_of(*sizes)
    frozen.by_sample = Batch([image_sample(*hw) for hw in sizes], padded)
    maps = frozen(images)
    alone = frozen.inner(images[1:, :, :8, :12].contiguous())
    for name, stride in (("fine", 2), ("coarse", 4)):
        height, width = 8 // stride, 12 // stride
        assert maps[name].shape[2:] == (12 // stride, 16 // stride)
        assert torch.equal(maps[name][1:, :, :height, :width], alone[name])
        assert (maps[name][1, :, height:] == 0).all() and (maps[name][1, :, :, width:] == 0).all()
        assert maps[name].is_contiguous()


def test_without_an_announced_batch_it_is_the_plain_backbone(frozen: FrozenBackbone) -> None:
    images = batch_of((12, 16), (7, 9))
    maps = frozen(images)
    assert torch.equal(maps["fine"], frozen.inner(images)["fine"])


def test_more_images_than_samples_are_refused(frozen: FrozenBackbone) -> None:
    frozen.by_sample = Batch([image_sample(12, 16)], padded)
    with pytest.raises(ValueError, match="1 more than the samples"):
        frozen(batch_of((12, 16), (12, 16)))


@pytest.mark.parametrize("passes", [[6], [3, 3], [2, 4], [1, 1, 4]])
def test_clips_may_come_in_any_passes(passes: list[int], frozen: FrozenBackbone, tmp_path) -> None:
    """Two clips of 3 frames; the first is stored, and read back bit for bit whatever the passes are."""
    frames = torch.randn(6, 3, 8, 8)
    expected = frozen.inner(frames)["coarse"]
    cache = FeatureCache(Store(tmp_path), "fp32")
    clip = torch.zeros(1, 3, 3, 8, 8)
    keys = [bytes([n]) * 16 for n in (1, 2)]
    frozen.by_sample = Batch([{"video": clip, SLOT: Slot(key)} for key in keys], padded, cache, ["coarse"])
    maps = torch.cat([frozen(part)["coarse"] for part in frames.split(passes)])
    assert torch.allclose(maps, expected, atol=1e-6)
    cache.close()
    found = cache.fetch(Slot(keys[0], cache.store.find(keys[0])))
    assert list(found) == ["coarse"] and torch.equal(found["coarse"], maps[:3])
    seen = frozen.inner.seen
    frozen.by_sample = Batch([{"video": clip, FEATURES: found}, {"video": clip}], padded, cache)
    assert torch.equal(frozen(frames[:2])["coarse"], maps[:2])
    assert frozen.inner.seen == seen


def test_autocast_and_stored_precision(frozen: FrozenBackbone, tmp_path) -> None:
    """bfloat16 in the store: what is computed is rounded like what is read."""
    cache = FeatureCache(Store(tmp_path), "bf16")
    images = batch_of((12, 16))
    frozen.by_sample = Batch([image_sample(12, 16, **{SLOT: Slot(b"k" * 16)})], padded, cache)
    computed = frozen(images)["coarse"]
    assert computed.dtype == torch.float32
    assert torch.equal(computed, frozen.inner(images)["coarse"].bfloat16().float())
    cache.close()
    features = cache.fetch(Slot(b"k" * 16, cache.store.find(b"k" * 16)))
    frozen.by_sample = Batch([image_sample(12, 16, **{FEATURES: features})], padded)
    assert torch.equal(frozen(images)["coarse"], computed)
    frozen.by_sample = Batch([image_sample(12, 16, **{FEATURES: features})], padded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen(images)["coarse"].dtype == torch.bfloat16


class Model(nn.Module):
    """As meta-architectures are: called with samples; pads images to multiples of 4."""

    def __init__(self, backbone: FrozenBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def preprocess_image(self, samples):
        return ImageList.from_tensors([sample["image"] for sample in samples], 4)

    def forward(self, samples):
        return self.backbone(self.preprocess_image(samples).tensor)


def test_a_service_serves_training_only_and_the_latest_one(frozen: FrozenBackbone, tmp_path) -> None:
    model = Model(frozen)
    features = {"coarse": torch.full((1, 5, 3, 4), 7.0)}
    sample = image_sample(12, 16, **{FEATURES: features})
    services = []
    for _ in range(2):  # a second run on the same model
        for service in services:
            service.remove()
        services.append(FeatureService(model, frozen, FeatureCache(Store(tmp_path), "fp32")))
        assert (model.train()([sample])["coarse"] == 7).all()
        assert frozen.by_sample is None
        assert not (model.eval()([sample])["coarse"] == 7).any()
    with pytest.raises(RuntimeError):
        model.train()([{"image": torch.zeros(1, 12, 16), SLOT: Slot(b"x" * 16)}])  # one channel
    assert frozen.by_sample is None
    services[-1].remove()
    assert not (model.train()([sample])["coarse"] == 7).any()
    assert copy.deepcopy(model)([sample])["coarse"].shape == (1, 5, 3, 4)
