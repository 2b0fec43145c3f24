"""Facts about checkpoints that the golden files do not hold."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from iopath.common.file_io import PathHandler, PathManager
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 2, bias=False))
        self.head = nn.Linear(2, 3)


def test_longest_ending_wins():
    """ "b.c.weight" and "c.weight" both end "a.b.c.weight"; the longer one is taken, the other stays."""
    model = {"a.b.c.weight": torch.zeros(2), "x.c.weight": torch.zeros(2)}
    found = {"b.c.weight": torch.full((2,), 1.0), "c.weight": torch.full((2,), 2.0)}
    aligned = align_and_update_state_dicts(model, found, c2_conversion=False)
    assert aligned["a.b.c.weight"].tolist() == [1, 1]
    assert aligned["x.c.weight"].tolist() == [2, 2]


def test_one_entry_for_two_tensors_is_refused():
    model = {"a.c.weight": torch.zeros(2), "b.c.weight": torch.zeros(2)}
    with pytest.raises(ValueError):
        align_and_update_state_dicts(model, {"c.weight": torch.zeros(2)}, c2_conversion=False)


def test_caffe2_background_moves_to_the_end():
    """Detectron 1: class 0, with a box and a mask of its own. Detectron2: the last class, without them."""
    model = {
        "roi_heads.box_predictor.cls_score.weight": torch.zeros(3, 1),
        "roi_heads.box_predictor.cls_score.bias": torch.zeros(3),
        "roi_heads.box_predictor.bbox_pred.weight": torch.zeros(8, 1),
        "proposal_generator.rpn_head.anchor_deltas.bias": torch.zeros(12),
        "roi_heads.mask_head.predictor.bias": torch.zeros(2),
        "backbone.fpn_lateral4.weight": torch.zeros(2, 2, 1, 1),
        "backbone.fpn_output5.weight": torch.zeros(2, 2, 3, 3),
    }
    file = {
        "cls_score_w": torch.tensor([[0.0], [1.0], [2.0]]),
        "cls_score_b": torch.tensor([0.0, 1.0, 2.0]),
        "bbox_pred_w": torch.arange(12.0)[:, None],
        "rpn_bbox_pred_fpn2_b": torch.arange(12.0),
        "mask_fcn_logits_b": torch.tensor([0.0, 1.0, 2.0]),
        "fpn_inner_res4_5_sum_lateral_w": torch.ones(2, 2, 1, 1),
        "fpn_res5_2_sum_w": torch.ones(2, 2, 3, 3),
    }
    aligned = align_and_update_state_dicts(model, file)
    assert sorted(aligned) == sorted(model)
    assert aligned["roi_heads.box_predictor.cls_score.bias"].tolist() == [1, 2, 0]
    assert aligned["roi_heads.box_predictor.cls_score.weight"].flatten().tolist() == [1, 2, 0]
    assert aligned["roi_heads.box_predictor.bbox_pred.weight"].flatten().tolist() == list(range(4, 12))
    assert aligned["roi_heads.mask_head.predictor.bias"].tolist() == [1, 2]
    assert aligned["proposal_generator.rpn_head.anchor_deltas.bias"].tolist() == list(range(12))


def test_python2_pickles_load(tmp_path):
    """Protocol 2 with byte strings as text, as Python 2 wrote the public weights."""
    net = _Net()
    weights = {name: tensor.numpy() + 1 for name, tensor in net.state_dict().items()}
    file = tmp_path / "weights.pkl"
    file.write_bytes(pickle.dumps({"model": weights, "__author__": "test"}, protocol=2))
    DetectionCheckpointer(net).load(str(file))
    for name, tensor in net.state_dict().items():
        assert np.array_equal(tensor.numpy(), weights[name])


def test_ddp_prefix_and_relative_last_checkpoint(tmp_path):
    """A folder may move: last_checkpoint holds a bare file name."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    DetectionCheckpointer(_Net(), str(old)).save("model_0000003", iteration=3)
    old.rename(new)
    net = _Net()
    assert DetectionCheckpointer(net, str(new)).resume_or_load("", resume=True)["iteration"] == 3


class _Toy(PathHandler):
    """toy://NAME is a file of a folder."""

    def __init__(self, folder):
        self.folder = folder

    def _get_supported_prefixes(self):
        return ["toy://"]

    def _get_local_path(self, path, force=False, **kwargs):
        return str(self.folder / path.removeprefix("toy://"))

    def _isfile(self, path, **kwargs):
        return (self.folder / path.removeprefix("toy://")).is_file()


def test_paths_go_through_the_checkpointers_own_path_manager(tmp_path):
    source, target = _Net(), _Net()
    torch.save({"model": source.state_dict()}, tmp_path / "net.pth")
    checkpointer = DetectionCheckpointer(target)
    checkpointer.path_manager = PathManager()
    checkpointer.path_manager.register_handler(_Toy(tmp_path))
    checkpointer.load("toy://net.pth")
    assert torch.equal(source.head.weight, target.head.weight)
