"""Masked attention: who may look where, and that the fused attention is the usual one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seg_app.models.masked_decoder import MaskedTransformerDecoder, inside_own_mask
from seg_app.models.position import sine_positions
from seg_app.models.transformer_layers import Attention


def decoder(layers: int = 3, **changes) -> MaskedTransformerDecoder:
    arguments = dict(
        num_classes=4,
        hidden_dim=16,
        num_queries=5,
        nheads=2,
        dim_feedforward=24,
        dec_layers=layers,
        pre_norm=False,
        mask_dim=8,
        enforce_input_project=False,
    )
    return MaskedTransformerDecoder(16, **{**arguments, **changes})


def inputs(B: int = 2):
    torch.manual_seed(4)
    maps = [torch.randn(B, 16, h, w) for h, w in ((1, 2), (2, 3), (4, 6))]
    return maps, torch.randn(B, 8, 8, 12)


def test_a_query_whose_mask_is_all_background_looks_everywhere() -> None:
    features = torch.tensor([[[1.0, 2.0, -3.0]]])  # one channel, three cells
    allowed = inside_own_mask(torch.tensor([[[1.0], [-1.0], [0.0]]]), features)
    assert allowed[0].tolist() == [[True, True, False], [False, False, True], [True, True, True]]
    background = inside_own_mask(torch.tensor([[[-1.0]]]), features.abs())
    assert background.all()


def test_fused_attention_equals_multihead_attention() -> None:
    torch.manual_seed(0)
    usual = nn.MultiheadAttention(16, 2, batch_first=True)
    fused = Attention(16, 2)
    fused.load_state_dict(usual.state_dict())
    nn.init.normal_(usual.in_proj_bias)
    fused.load_state_dict(usual.state_dict())
    query, key, value = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    allowed = torch.rand(2, 5, 7) > 0.5
    allowed[..., 0] = True
    expected = usual(query, key, value, attn_mask=~allowed.repeat_interleave(2, 0))[0]
    assert torch.allclose(fused(query, key, value, allowed), expected, atol=1e-6)


def test_cells_outside_the_mask_have_no_influence() -> None:
    layer = Attention(8, 2)
    key = torch.randn(1, 6, 8)
    allowed = torch.tensor([[[True, False, True, False, False, True]]])
    other = torch.where(allowed[0, 0, :, None], key, torch.randn(1, 6, 8))
    query = torch.randn(1, 1, 8)
    assert torch.allclose(layer(query, key, key, allowed), layer(query, other, other, allowed), atol=1e-6)


def test_last_prediction_is_the_same_with_and_without_the_earlier_ones() -> None:
    maps, features = inputs()
    model = decoder()
    every, last = model(maps, features), model(maps, features, every_layer=False)
    assert "aux_outputs" not in last and len(every["aux_outputs"]) == 3
    assert torch.equal(every["pred_masks"], last["pred_masks"])
    lazy = model(maps, features, full_masks=False)
    assert torch.equal(lazy["pred_masks"].all(), every["pred_masks"])


def test_images_of_a_batch_do_not_mix() -> None:
    maps, features = inputs()
    model = decoder()
    both = model(maps, features)
    second = model([one[1:] for one in maps], features[1:])
    assert torch.allclose(both["pred_logits"][1:], second["pred_logits"], atol=1e-5)


def test_every_parameter_gets_a_gradient() -> None:
    maps, features = inputs()
    model = decoder(pre_norm=True, enforce_input_project=True)
    out = model(maps, features)
    answers = [out, *out["aux_outputs"]]
    sum((one["pred_logits"] ** 2).sum() + (one["pred_masks"] ** 2).mean() for one in answers).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_zero_layers_are_predictions_of_the_bare_queries() -> None:
    out = decoder(layers=0)(*inputs())
    assert out["aux_outputs"] == [] and out["pred_masks"].shape == (2, 5, 8, 12)


def test_old_name_of_the_queries_loads() -> None:
    a, b = decoder(), decoder()
    old = {f"x.{name.replace('query_feat', 'static_query')}": value for name, value in a.state_dict().items()}
    holder = nn.ModuleDict({"x": b})
    holder.load_state_dict(old)
    assert torch.equal(a.query_feat.weight, b.query_feat.weight)


def test_positions() -> None:
    """Cell (row 1, column 2) of a 2 x 4 map: half of the height, half of the width, so both angles are pi."""
    positions = sine_positions(2, 4, 8, torch.device("cpu"))
    cell = positions[:, 0, 1]
    assert torch.allclose(cell[:4], cell[4:], atol=1e-5)
    # Half the channels are about the row: sine and cosine of pi, then of pi / 100.
    expected = torch.tensor([0.0, -1.0, 0.0314108, 0.9995066])
    assert torch.allclose(cell[:4], expected, atol=1e-5)
    with pytest.raises(ValueError, match="divides by 4"):
        sine_positions(2, 2, 6, torch.device("cpu"))
