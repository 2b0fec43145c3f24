"""The comparison with the public head: refusals, and that ours against itself agrees; nothing is timed here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from d2_frozen.bench import main
from detectron2.config import get_cfg
from seg_app.benchmarks import mask2former
from seg_app.config import add_segmentation_config

SMALL = ["MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1", "MODEL.MASK_FORMER.DEC_LAYERS", "2"]
SMALL += ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.MASK_FORMER.HIDDEN_DIM", "32"]


@pytest.fixture
def ours_as_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our head under the public one's signature: it gives the predictions of every layer without being asked."""

    class PublicHead(torch.nn.Module):
        def __init__(self, cfg, shapes) -> None:
            super().__init__()
            for name, part in mask2former.Mask2FormerHead(cfg, shapes).named_children():
                self.add_module(name, part)

        def forward(self, maps):
            mask_features, coarse_to_fine = self.pixel_decoder(maps)
            return self.predictor(coarse_to_fine, mask_features, every_layer=True)

    monkeypatch.setattr(mask2former, "import_public_head", lambda checkout: PublicHead)


def test_a_folder_that_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no checkout of Mask2Former.*git clone"):
        main(["mask2former", "--checkout", str(tmp_path)])


@pytest.mark.usefixtures("ours_as_public")
def test_equal_heads_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = main(
        ["mask2former", "--checkout", str(tmp_path), "--size", "64", "--rounds", "1", "--warmup", "0", *SMALL]
    )
    assert result["largest differences"] == {"answers": 0.0, "gradients": 0.0}
    assert set(result["training"]["ours / public"]) == {"forward", "backward", "both"}
    assert set(result["inference"]) == {"ours", "public", "ours / public"}
    assert "ours / public" in capsys.readouterr().out


@pytest.mark.usefixtures("ours_as_public")
def test_different_work_is_not_compared(tmp_path: Path) -> None:
    cfg = add_segmentation_config(get_cfg())
    cfg.merge_from_list(SMALL)
    heads = mask2former.build_heads(cfg, tmp_path)
    with torch.no_grad():
        heads["public"].predictor.mask_embed.layers[2].weight *= 1.01
    with pytest.raises(RuntimeError, match=r"pred_masks\w* differs by .* of its norm"):
        mask2former.compare(heads, size=64, batch=1, rounds=1, warmup=0)
    found = {"pred_masks": torch.ones(2, 3)}
    with pytest.raises(RuntimeError, match=r"pred_masks has shape \(2, 3\) in our head and None"):
        mask2former.largest_differences(found, {})
