"""Pictures of sampled points and of attention over time, from places and weights that are known."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from unmask import d2st_figures


@pytest.fixture
def look():
    """One pathway of one group, two points: in frame 0 at patch (1, 0), and just before frame 2 at patch (2, 3)."""
    places = torch.tensor([[[[0.2, 1.0, 0.0], [1.8, 2.0, 3.0]]]])
    attention = torch.zeros(1, 1, 3, 17, 2)
    attention[0, 0, :, 0] = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.5, 0.5]])
    return {"spatial": (places, attention)}


def test_points_are_drawn_on_the_frame_they_lie_nearest_to(look):
    fig, axes = plt.subplots(1, 3)
    d2st_figures.draw_points(axes, np.zeros((3, 64, 64, 3), np.uint8), look)
    drawn = [np.concatenate([part.get_offsets() for part in ax.collections]) for ax in axes]
    plt.close(fig)
    assert [len(points) for points in drawn] == [1, 0, 1]
    # A patch has 16 pixels; (x, y) of its centre.
    np.testing.assert_allclose(drawn[0], [[8, 24]])
    np.testing.assert_allclose(drawn[2], [[56, 40]])


def test_attention_is_summed_by_the_frame_of_its_points(look):
    expected = [[1, 0, 0], [0.25, 0, 0.75], [0.5, 0, 0.5]]
    np.testing.assert_allclose(d2st_figures.over_time(look["spatial"]), expected, atol=1e-6)
