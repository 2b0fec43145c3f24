"""CKA from Gram matrices: against the formulas of the papers, and the facts that make it a similarity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from d2_frozen.study.cka.estimator import IMAGE, Gram, MinibatchCKA, gram_of_rows, u_centred


def hsic_1(K: np.ndarray, L: np.ndarray) -> float:
    """Song et al. 2012, equation 5, with its traces and sums."""
    n = len(K)
    K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    one = np.ones(n)
    return (
        np.trace(K @ L)
        + one @ K @ one * (one @ L @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ K @ L @ one)
    ) / (n * (n - 3))


def biased_cka(x: Tensor, y: Tensor) -> float:
    """Kornblith et al. 2019: ||Y^T X||^2 / (||X^T X|| ||Y^T Y||) of centred features."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float((y.t() @ x).norm() ** 2 / ((x.t() @ x).norm() * (y.t() @ y).norm()))


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def gram(features: Tensor) -> Gram:
    return Gram(gram_of_rows(features), torch.arange(len(features)))


def cka(*batches: tuple[Tensor, Tensor]) -> float:
    estimate = MinibatchCKA(["x"], ["y"])
    for x, y in batches:
        estimate.update({"x": gram(x)}, {"y": gram(y)})
    return float(estimate.cka()[0, 0])


def test_one_batch_is_the_full_formula() -> None:
    x, y = rows(9, 5, 1) + 3, rows(9, 7, 2)
    y[:, :5] += x
    K, L = (features.double().numpy() @ features.double().numpy().T for features in (x, y))
    wanted = hsic_1(K, L) / np.sqrt(hsic_1(K, K) * hsic_1(L, L))
    assert cka((x, y)) == pytest.approx(wanted, abs=1e-12)
    assert 0.2 < wanted < 0.9


def test_batches_are_summed_before_they_are_divided() -> None:
    parts = [(rows(n, 4, n), rows(n, 4, n) + rows(n, 4, 50 + n)) for n in (4, 6, 11)]
    sums = np.zeros(3)
    for x, y in parts:
        K, L = (features.double().numpy() @ features.double().numpy().T for features in (x, y))
        sums += hsic_1(K, L), hsic_1(K, K), hsic_1(L, L)
    assert cka(*parts) == pytest.approx(sums[0] / np.sqrt(sums[1] * sums[2]), abs=1e-12)


def test_similarity_of_all_pairs_is_that_of_each() -> None:
    maps = {name: rows(8, 6, i) + rows(8, 6, 9) for i, name in enumerate("abc")}
    grams = {name: gram(features) for name, features in maps.items()}
    estimate = MinibatchCKA(["a", "b"], ["c", "a"])
    estimate.update(grams, grams)
    wanted = [[cka((maps[x], maps[y])) for y in ("c", "a")] for x in ("a", "b")]
    np.testing.assert_allclose(estimate.cka(), wanted, atol=1e-12)


def test_identical_rotated_scaled_and_shifted_features_are_the_same() -> None:
    x = rows(12, 6)
    rotation = torch.linalg.qr(rows(6, 6, 3)).Q
    assert cka((x, x)) == pytest.approx(1, abs=1e-12)
    assert cka((x, x @ rotation)) == pytest.approx(1, abs=1e-6)
    assert cka((x, -3.5 * x + 2)) == pytest.approx(1, abs=1e-6)
    stretched = x * torch.tensor([10.0, 1, 1, 1, 1, 1])  # linear CKA is not invariant to any linear map
    assert cka((x, stretched)) < 0.9


def test_independent_features_have_none_and_the_biased_estimate_says_otherwise() -> None:
    """16 examples of 4000 numbers: all are nearly orthogonal to each other, which looks like similarity."""
    parts = [(rows(16, 4000, 2 * i), rows(16, 4000, 2 * i + 1)) for i in range(40)]
    assert abs(cka(*parts)) < 0.05
    assert np.mean([biased_cka(x, y) for x, y in parts]) > 0.9


def test_expectation_does_not_depend_on_the_batch_size() -> None:
    """Of y = x + noise with s times its deviation: CKA = 1 / (1 + s^2)."""
    for n, count in ((4, 600), (32, 40)):
        parts = [(x := rows(n, 60, 3 * i), x + rows(n, 60, 9000 + i)) for i in range(count)]
        assert cka(*parts) == pytest.approx(0.5, abs=0.04)


def test_inner_products_are_exact_in_chunks_and_in_half_precision() -> None:
    x = rows(5, 23).half()
    whole = x.double() @ x.double().t()
    for at_once in (1, 7, 10**6):
        torch.testing.assert_close(gram_of_rows(x, at_once), whole, rtol=0, atol=1e-12)
    assert gram_of_rows(x).dtype == torch.float64


def test_centred_rows_sum_to_zero_and_equal_features_leave_nothing() -> None:
    centred = u_centred(gram_of_rows(rows(7, 3)))
    torch.testing.assert_close(centred.sum(1), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not u_centred(gram_of_rows(rows(1, 300).expand(7, -1))).any()


def test_a_map_that_is_the_same_for_all_images_has_no_similarity() -> None:
    assert np.isnan(cka((rows(6, 300), rows(1, 300).expand(6, -1))))


def test_rois_and_images_meet_in_means_over_the_rois() -> None:
    images = rows(6, 5)
    rois = rows(11, 8, 1)
    owner = torch.tensor([0, 0, 1, 2, 2, 2, 3, 5, 5, 5, 5])  # image 4 has none
    of_rois = Gram(gram_of_rows(rois), owner, ("pooler", (2, 1, 3, 1, 0, 4)))
    estimate = MinibatchCKA(["images"], ["rois"])
    estimate.update({"images": gram(images)}, {"rois": of_rois})
    present = [0, 1, 2, 3, 5]
    means = torch.stack([rois[owner == image].mean(0) for image in present])
    assert estimate.cka()[0, 0] == pytest.approx(cka((images[present], means)), abs=1e-6)
    assert of_rois.kind != IMAGE


def test_too_few_examples_do_not_count() -> None:
    estimate = MinibatchCKA(["x"], ["x"])
    estimate.update({"x": gram(rows(3, 4))}, {"x": gram(rows(3, 4))})
    assert np.isnan(estimate.cka()) and estimate.batches == 0
    estimate.update({}, {})
    estimate.update({"x": gram(rows(4, 4))}, {"x": gram(rows(4, 4))})
    assert estimate.cka() == pytest.approx(1) and estimate.batches == 1


def test_standard_error_of_two_batches_is_half_their_difference() -> None:
    parts = [(rows(8, 4, i), rows(8, 4, i) + rows(8, 4, 70 + i)) for i in range(2)]
    estimate = MinibatchCKA(["x"], ["y"])
    estimate.update({"x": gram(parts[0][0])}, {"y": gram(parts[0][1])})
    assert np.isnan(estimate.standard_error())
    estimate.update({"x": gram(parts[1][0])}, {"y": gram(parts[1][1])})
    assert estimate.standard_error() == pytest.approx(abs(cka(parts[0]) - cka(parts[1])) / 2, abs=1e-9)


def test_standard_error_is_that_of_repetitions() -> None:
    def run(seed: int) -> tuple[float, float]:
        estimate = MinibatchCKA(["x"], ["y"])
        for i in range(30):
            x = rows(8, 5, 1000 * seed + i)
            estimate.update({"x": gram(x)}, {"y": gram(x + rows(8, 5, 1000 * seed + 500 + i))})
        return float(estimate.cka()[0, 0]), float(estimate.standard_error()[0, 0])

    values, errors = np.array([run(seed) for seed in range(30)]).T
    assert np.mean(errors) == pytest.approx(values.std(ddof=1), rel=0.35)


def test_sums_do_not_grow() -> None:
    estimate = MinibatchCKA(["x"], ["x", "y"])
    before = {key: getattr(value, "nbytes", None) for key, value in vars(estimate).items()}
    for i in range(50):
        grams = {"x": gram(rows(4, 3, i)), "y": gram(rows(4, 3, i))}
        estimate.update(grams, grams)
    assert {key: getattr(value, "nbytes", None) for key, value in vars(estimate).items()} == before
