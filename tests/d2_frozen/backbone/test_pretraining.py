"""The generated scenes of pretraining, its optimiser, and the probe."""

import numpy as np
import pytest
import torch

from d2_frozen.backbone import create_timm_backbone
from d2_frozen.backbone.pretraining.muon import Muon, orthogonal
from d2_frozen.backbone.pretraining.probe import linear_probe
from d2_frozen.backbone.pretraining.scenes import IGNORE, NUM_SHAPES, NUM_SIZES, NUM_TEXTURES, SceneGenerator
from d2_frozen.backbone.pretraining.shapes import ShapeClasses
from d2_frozen.backbone.pretraining.train import (
    MEAN,
    NEIGHBOURS,
    STD,
    cell_targets,
    learning_rate,
    start_in_full,
    whiten_patches,
)
from d2_frozen.backbone.swin_v2 import PICO_NAME


@pytest.fixture(scope="module")
def generator():
    return SceneGenerator(3)


def test_a_scene_depends_on_seed_index_and_side_alone(generator):
    first = generator.scene(5, 64)
    generator.scene(6, 64)
    again = generator.scene(5, 64)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.image, generator.scene(7, 64).image)


def test_labels_stay_in_range_and_ground_has_no_part(generator):
    for index in range(6):
        scene = generator.scene(index, 64)
        shape, texture, part, size = scene.labels
        assert scene.image.shape == (64, 64, 3) and scene.image.dtype == np.uint8
        assert shape.max() <= NUM_SHAPES and texture.max() < NUM_TEXTURES
        ground = shape == 0
        assert (part[ground] == IGNORE).all() and (part[~ground] < 9).all()
        assert (size[ground] == IGNORE).all() and (size[~ground] < NUM_SIZES).all()


def test_every_shape_class_has_a_closed_outline_within_its_radius():
    shapes, rng = ShapeClasses(0), np.random.default_rng(0)
    for shape in range(NUM_SHAPES):
        for curve in shapes.outlines(shape, rng):
            assert curve.shape[0] >= 3 and curve.shape[1] == 2
            assert np.isfinite(curve).all() and np.abs(curve).max() <= 1.5


def test_cells_take_the_label_of_their_centre_and_the_mean_colour():
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    images[:, 0] = 255
    labels = torch.zeros(1, 4, 8, 8, dtype=torch.uint8)
    labels[0, 0, 2, 6] = 9
    targets = cell_targets(images, labels, 4)
    assert targets["object"].tolist() == [[[0, 1], [0, 0]]]
    assert targets["shape"].tolist() == [[[IGNORE, 8], [IGNORE, IGNORE]]]
    assert (targets["colour"] == 2 * 9).all(), "red, of three levels per channel"


def test_heads_begin_by_looking_at_one_neighbour():
    network = create_timm_backbone(PICO_NAME).network
    start_in_full(network)
    attention = network.layers[1].blocks[1].attn
    bias = 16 * torch.sigmoid(attention.cpb_mlp(attention.relative_coords_table))[0]
    for head in range(4):
        peak = divmod(int(bias[..., head].argmax()), 15)
        assert (peak[0] - 7, peak[1] - 7) == NEIGHBOURS[4 + head]
        assert bias[..., head].max() > 11 and bias[..., head].median() < 3


def test_patch_embedding_begins_white(generator):
    """Strong components leave it with variance 1 and without correlation; weak ones (noise) stay below."""
    network = create_timm_backbone(PICO_NAME).network
    whiten_patches(network, generator, scenes=8)
    images = torch.stack([torch.from_numpy(generator.scene(i, 128).image).permute(2, 0, 1) for i in range(8)])
    with torch.no_grad():
        values = network.patch_embed.proj((images.float() - MEAN) / STD).permute(1, 0, 2, 3).flatten(1)
    covariance = values @ values.T / values.shape[1]
    assert values.mean(1).abs().max() < 1e-3
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3
    assert 0.9 < covariance.diag().max() <= 1.001


def test_schedule_warms_up_holds_and_ends_at_zero():
    assert [learning_rate(p, 2.0) for p in (0.0, 0.015, 0.3, 0.875, 1.0)] == pytest.approx([0, 1, 2, 1, 0])


def test_muon_steps_have_nearly_equal_singular_values():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(8, 20)))
    assert values.min() > 0.6 and values.max() < 1.3
    weight = torch.nn.Parameter(torch.randn(4, 4))
    distance = (weight.detach() - torch.eye(4)).norm()
    optimizer = Muon([weight], lr=0.02, weight_decay=0.0)
    for _ in range(300):  # each step is 0.2 * sqrt(4) * lr long in every singular direction
        optimizer.zero_grad()
        (weight - torch.eye(4)).square().sum().backward()
        optimizer.step()
    assert (weight.detach() - torch.eye(4)).norm() < 0.3 * distance


def test_probe_separates_what_is_linearly_separable_and_not_noise():
    torch.manual_seed(0)
    classes = torch.arange(120) % 3
    features = torch.randn(120, 5)
    features[:, 0] += 6.0 * classes
    clear = linear_probe((features[:90], classes[:90]), (features[90:], classes[90:]))
    noise = linear_probe((torch.randn(90, 5), classes[:90]), (torch.randn(30, 5), classes[90:]))
    assert clear["balanced"] > 90 > 70 > noise["balanced"]
