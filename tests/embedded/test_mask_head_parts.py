"""On CPU the mask head sees some boxes at a time; nobody can tell from the masks."""

import torch

import detectron2.modeling.roi_heads.mask_head as mask_head
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances


def test_parts_give_what_the_whole_gives(monkeypatch):
    torch.manual_seed(0)
    head = mask_head.MaskRCNNConvUpsampleHead(
        ShapeSpec(channels=4, height=6, width=6), num_classes=3, conv_dims=[4, 4]
    ).eval()
    features, classes = torch.randn(10, 4, 6, 6), torch.arange(10) % 3
    found = []
    for at_once in (4, 100):
        monkeypatch.setattr(mask_head, "_CPU_BOXES_AT_ONCE", at_once)
        instances = [Instances((50, 50), pred_classes=part) for part in classes.split([7, 3])]
        with torch.no_grad():
            head(features, instances)
        found.append(torch.cat([one.pred_masks for one in instances]))
    assert found[0].shape == (10, 1, 12, 12)
    torch.testing.assert_close(found[0], found[1])


def test_no_boxes():
    head = mask_head.MaskRCNNConvUpsampleHead(
        ShapeSpec(channels=4, height=6, width=6), num_classes=3, conv_dims=[4]
    ).eval()
    nothing = Instances((50, 50), pred_classes=torch.zeros(0, dtype=torch.long))
    head(torch.zeros(0, 4, 6, 6), [nothing])
    assert nothing.pred_masks.shape == (0, 1, 12, 12)
