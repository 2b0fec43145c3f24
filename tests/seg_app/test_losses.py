"""Points, matching and losses: closed forms, brute force, invariances, nothing to match."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seg_app.models import criterion as criterion_module
from seg_app.models.criterion import SetCriterion, dice_loss, mask_cross_entropy
from seg_app.models.matcher import HungarianMatcher
from seg_app.models.points import draw_candidates, least_sure, sample_all_masks, sample_maps, sample_masks
from seg_app.models.query_masks import QueryMasks


def criterion(num_classes: int = 4, points: int = 50) -> SetCriterion:
    return SetCriterion(
        num_classes,
        HungarianMatcher(2.0, 5.0, 5.0, points),
        {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 5.0},
        no_object_weight=0.1,
        num_points=points,
        oversample_ratio=3.0,
        importance_ratio=0.75,
    )


def boxes(*corners: tuple[int, int, int, int], size: tuple[int, int] = (16, 16)) -> Tensor:
    masks = torch.zeros(len(corners), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, corners):
        mask[y0:y1, x0:x1] = True
    return masks


def quadrants() -> Tensor:
    return boxes((0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16))


def predictions(B: int = 1, Q: int = 5, K: int = 4, size: int = 8) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return {"pred_logits": torch.randn(B, Q, K + 1), "pred_masks": 3 * torch.randn(B, Q, size, size)}


def test_sampling_equals_grid_sample() -> None:
    torch.manual_seed(0)
    maps, points = torch.randn(2, 9, 5, 7), torch.rand(2, 40, 2)
    points[0, :2] = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[..., 0]
    assert torch.allclose(sample_maps(maps, points), expected, atol=1e-6)  # many channels, on CPU
    assert torch.allclose(sample_maps(maps[:, :3], points), expected[:, :3], atol=1e-6)
    masks = torch.rand(4, 5, 7) > 0.5
    chosen = torch.tensor([3, 1])
    expected = F.grid_sample(masks[chosen][:, None].float(), 2 * points[:, :, None] - 1, align_corners=False)
    assert torch.allclose(sample_masks(masks, chosen, points), expected[:, 0, :, 0], atol=1e-6)
    everywhere = sample_all_masks(masks, points[1])
    assert torch.allclose(everywhere[1], expected[1, 0, :, 0], atol=1e-6) and everywhere.shape == (4, 40)


def test_uncertain_points_lie_where_the_logit_is_zero() -> None:
    """Logits grow from left to right and vanish in the middle: three quarters of the points gather there."""
    ramp = torch.linspace(-10, 10, 64).expand(1, 1, 8, 64)
    drawn = draw_candidates(1, 400, 8, 0.75, ramp.device)
    points = least_sure(ramp, *drawn, 400)
    assert points.shape == (1, 400, 2)
    near = (points[0, :, 0] - 0.5).abs() < 0.08
    assert near[:300].all() and 0.05 < near[300:].float().mean() < 0.35  # the rest is uniform: 0.16 expected


def test_closed_forms_of_the_losses() -> None:
    truth = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    # Logit 0 is probability 1/2 everywhere: log 2 per mask; dice 1 - (2 * 1 + 1) / (2 + 2 + 1) and 1 - 1 / (2 + 0 + 1).
    assert math.isclose(
        float(mask_cross_entropy(torch.zeros(2, 4), truth, 4)), 2 * math.log(2) / 4, rel_tol=1e-6
    )
    assert math.isclose(float(dice_loss(torch.zeros(2, 4), truth, 4)), (2 / 5 + 2 / 3) / 4, rel_tol=1e-6)
    certain = 100 * (2 * truth - 1)
    assert float(mask_cross_entropy(certain, truth, 1)) < 1e-6
    assert abs(float(dice_loss(certain, truth, 1))) < 1e-6


def test_right_predictions_cost_nothing_but_borders() -> None:
    masks = quadrants()
    logits = torch.full((1, 5, 5), -50.0)
    logits[0, torch.arange(5), torch.tensor([2, 0, 4, 1, 4])] = 50.0
    full = torch.full((1, 5, 16, 16), -50.0)
    for query, target in ((0, 2), (1, 0), (3, 1)):
        full[0, query][masks[target]] = 50.0
    losses = criterion()(
        {"pred_logits": logits, "pred_masks": full}, [{"labels": torch.tensor([0, 1, 2]), "masks": masks}]
    )
    assert losses["loss_ce"].item() < 1e-6
    # Between two pixels both go through 1/2, and three quarters of the points are drawn there.
    assert losses["loss_dice"].item() < 0.3
    wrong = criterion()(
        {"pred_logits": logits, "pred_masks": -full}, [{"labels": torch.tensor([0, 1, 2]), "masks": masks}]
    )
    assert float(wrong["loss_mask"]) > 3 * losses["loss_mask"].item()


def test_matching_equals_brute_force() -> None:
    outputs = predictions(B=2, Q=3)
    targets = [
        {"labels": torch.tensor([1, 0, 3]), "masks": quadrants()},
        {"labels": torch.tensor([2, 2]), "masks": quadrants()[:2]},
    ]
    matcher = HungarianMatcher(2.0, 5.0, 5.0, 200)
    torch.manual_seed(1)
    costs = matcher.costs(outputs, targets)
    torch.manual_seed(1)
    matches = matcher(outputs, targets)
    for cost, target, (queries, objects) in zip(costs, targets, matches):
        T = len(target["labels"])
        best = min(
            sum(float(cost[q, t]) for t, q in enumerate(chosen))
            for chosen in itertools.permutations(range(3), T)
        )
        assert len(queries) == T and sorted(objects.tolist()) == list(range(T))
        assert math.isclose(float(cost[queries, objects].sum()), best, rel_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_costs_are_of_float32_also_in_mixed_precision(dtype: torch.dtype) -> None:
    """A mask of the whole map with logits 40 at 12544 points sums to 5e5, of which float16 makes infinity."""
    torch.manual_seed(0)
    embedded, features = torch.rand(1, 3, 8), torch.full((1, 8, 16, 16), 10.0)
    targets = [{"labels": torch.tensor([1]), "masks": torch.ones(1, 128, 128, dtype=torch.bool)}]
    matcher = HungarianMatcher(2.0, 5.0, 5.0, 12544)
    for size in (16, 128):  # masks at points from all pixels, and from the features at these points
        masks = QueryMasks(embedded, features.expand(1, 8, 16, 16).repeat(1, 1, size // 16, size // 16))
        outputs = {"pred_logits": torch.randn(1, 3, 5), "pred_masks": masks}
        torch.manual_seed(1)
        plain = matcher.costs(outputs, targets)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=dtype):
            mixed = matcher.costs(outputs, targets)
        assert mixed.dtype == torch.float32 and torch.equal(mixed, plain)


def test_costs_equal_the_formulas() -> None:
    """One pair at a time, with torch's own cross entropy, at the points that the matcher drew."""
    outputs = predictions(B=2, Q=3)
    targets = [
        {"labels": torch.tensor([1, 0, 3]), "masks": quadrants()},
        {"labels": torch.tensor([2]), "masks": quadrants()[:1]},
    ]
    P = 30
    torch.manual_seed(7)
    costs = HungarianMatcher(2.0, 3.0, 5.0, P).costs(outputs, targets)
    torch.manual_seed(7)
    for b, target in enumerate(targets):
        points = torch.rand(1, P, 2)
        for q in range(3):
            guess = sample_maps(outputs["pred_masks"][b : b + 1, q : q + 1], points)[0, 0]
            for t, label in enumerate(target["labels"].tolist()):
                truth = sample_maps(target["masks"][None, t : t + 1].float(), points)[0, 0]
                chance = guess.sigmoid()
                dice = 1 - (2 * (chance * truth).sum() + 1) / (chance.sum() + truth.sum() + 1)
                expected = (
                    -2.0 * outputs["pred_logits"][b, q].softmax(-1)[label]
                    + 3.0 * F.binary_cross_entropy_with_logits(guess, truth)
                    + 5.0 * dice
                )
                assert math.isclose(float(costs[b, q, t]), float(expected), rel_tol=1e-5)


def test_order_of_targets_does_not_matter() -> None:
    outputs = predictions()
    masks, labels = quadrants(), torch.tensor([1, 0, 3])
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        torch.manual_seed(3)
        target = {"labels": labels[order], "masks": masks[order]}
        results.append(criterion()(outputs, [target]))
    # Matches come in the order of the queries, so each mask meets the same points.
    for name in results[0]:
        assert math.isclose(float(results[0][name]), float(results[1][name]), rel_tol=1e-5)


def test_masks_that_were_never_made_give_equal_losses_and_gradients() -> None:
    torch.manual_seed(2)
    embedded, features = torch.randn(2, 5, 6), torch.randn(2, 6, 9, 9)
    logits = torch.randn(2, 5, 5)
    none = {"labels": torch.zeros(0, dtype=torch.long), "masks": torch.zeros(0, 16, 16, dtype=torch.bool)}
    targets = [{"labels": torch.tensor([1, 0, 3]), "masks": quadrants()}, none]
    results = []
    for points in (20, 90):  # fewer and more than pixels
        for full in (True, False):
            leaves = [embedded.clone().requires_grad_(), features.clone().requires_grad_()]
            masks = QueryMasks(*leaves)
            outputs = {"pred_logits": logits, "pred_masks": masks.all() if full else masks}
            torch.manual_seed(8)
            losses = criterion(points=points)(outputs, targets)
            gradients = torch.autograd.grad(losses["loss_mask"] + losses["loss_dice"], leaves)
            results.append([losses["loss_mask"], losses["loss_dice"], *gradients])
    for i in (0, 2):
        for a, b in zip(results[i], results[i + 1]):
            assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("points", [20, 90])  # fewer and more than pixels
def test_layers_together_give_what_they_give_one_by_one(monkeypatch, points: int, lazy: bool) -> None:
    """The same points are drawn, too: a run goes on with the same random numbers."""
    torch.manual_seed(2)
    features = torch.randn(2, 6, 9, 9)
    layers = []
    for _ in range(4):
        masks = QueryMasks(torch.randn(2, 5, 6), features)
        layers.append(
            {"pred_logits": torch.randn(2, 5, 5), "pred_masks": masks if lazy else masks.all()},
        )
    outputs = {**layers[-1], "aux_outputs": layers[:-1]}
    targets = [
        {"labels": torch.tensor([1, 0, 3]), "masks": quadrants()},
        {"labels": torch.tensor([2, 2]), "masks": boxes((0, 0, 9, 20), (3, 5, 7, 9), size=(24, 20))},
    ]
    results = []
    for at_once in (criterion_module._NUMBERS_AT_ONCE, 1):
        monkeypatch.setattr(criterion_module, "_NUMBERS_AT_ONCE", at_once)
        torch.manual_seed(8)
        losses = criterion(points=points)(outputs, targets)
        results.append({**losses, "next number": torch.rand(())})
    assert (
        list(results[0])[:4] == ["loss_ce", "loss_ce_0", "loss_ce_1", "loss_ce_2"] and len(results[0]) == 13
    )
    assert set(results[0]) == set(results[1])
    for name, value in results[0].items():
        assert math.isclose(float(value), float(results[1][name]), rel_tol=1e-5), name


@pytest.mark.parametrize("lazy", [True, False])
def test_no_targets_at_all(lazy: bool) -> None:
    """Every query should say "no object"; masks get a gradient of zero, so that every parameter takes part (DDP)."""
    embedded = torch.randn(2, 5, 6, requires_grad=True)
    masks = QueryMasks(embedded, torch.randn(2, 6, 8, 8))
    logits = torch.zeros(2, 5, 5, requires_grad=True)
    none = {"labels": torch.zeros(0, dtype=torch.long), "masks": torch.zeros(0, 16, 16, dtype=torch.bool)}
    losses = criterion()({"pred_logits": logits, "pred_masks": masks if lazy else masks.all()}, [none, none])
    assert math.isclose(losses["loss_ce"].item(), math.log(5), rel_tol=1e-6)
    assert losses["loss_mask"].item() == losses["loss_dice"].item() == 0
    sum(losses.values()).backward()
    assert embedded.grad is not None and (embedded.grad == 0).all()


def test_more_targets_than_queries() -> None:
    outputs = predictions(Q=2)
    target = {"labels": torch.tensor([0, 1, 2]), "masks": quadrants()}
    (queries, objects), *_ = HungarianMatcher(2.0, 5.0, 5.0, 50)(outputs, [target])
    assert queries.tolist() == [0, 1] and len(set(objects.tolist())) == 2
    assert all(math.isfinite(float(loss)) for loss in criterion()(outputs, [target]).values())


def test_diverged_predictions_and_senseless_settings_are_named() -> None:
    outputs = predictions()
    outputs["pred_masks"][0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="BASE_LR"):
        HungarianMatcher(2.0, 5.0, 5.0, 50)(
            outputs, [{"labels": torch.tensor([0]), "masks": quadrants()[:1]}]
        )
    with pytest.raises(ValueError, match="all 0"):
        HungarianMatcher(0, 0, 0, 50)
    with pytest.raises(ValueError, match="OVERSAMPLE_RATIO"):
        SetCriterion(
            4,
            HungarianMatcher(1, 1, 1, 5),
            {},
            no_object_weight=0.1,
            num_points=5,
            oversample_ratio=0.5,
            importance_ratio=0.75,
        )
