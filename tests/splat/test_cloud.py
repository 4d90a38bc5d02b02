import dataclasses

import pytest
import torch
from splat.scene_samples import ball

from gencompress.splat.cloud import tensors, with_tensors


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_length_and_degree(degree):
    cloud = ball(7, degree)
    assert len(cloud) == 7 and cloud.degree == degree
    assert list(tensors(cloud)) == ["means", "quats", "scales", "opacities", "sh"]


def test_new_fields_keep_the_kind_and_the_old_cloud():
    cloud = dataclasses.replace(ball(5), antialiased=True)
    moved = with_tensors(cloud, {"means": cloud.means + 1})
    assert moved.antialiased and torch.equal(moved.means, cloud.means + 1)
    assert moved.sh is cloud.sh
    with pytest.raises(dataclasses.FrozenInstanceError):
        cloud.means = moved.means


@pytest.mark.parametrize(
    ("field", "shape", "says"),
    [
        ("means", (5, 2), "means"),
        ("quats", (5, 3), "quats"),
        ("quats", (4, 4), "quats"),
        ("scales", (5, 1), "1 columns"),
        ("scales", (5, 4), "4 columns"),
        ("opacities", (5, 1), "opacities"),
        ("sh", (5, 5, 3), r"1\|4\|9\|16"),
        ("sh", (5, 12), r"1\|4\|9\|16"),
        ("sh", (5, 4, 4), "sh"),
    ],
)
def test_shapes_that_do_not_fit(field, shape, says):
    with pytest.raises(ValueError, match=says):
        with_tensors(ball(5), {field: torch.zeros(shape)})


def test_only_float32():
    with pytest.raises(ValueError, match="opacities is torch.float64"):
        with_tensors(ball(5), {"opacities": torch.zeros(5, dtype=torch.float64)})
