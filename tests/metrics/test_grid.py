"""Mosaics and the grid pointing game: known scores of known maps."""

import math

import pytest
import torch

from captum_mipin.errors import InputError
from captum_mipin.metrics import grid_pointing_game, mosaics


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bright(logit=20.0):
    """Four classes, one a channel: the brightest channel wins."""
    return lambda x: logit * x.mean((2, 3))


def shades(copies=2, size=4):
    x = torch.eye(4).repeat(copies, 1)[:, :, None, None].expand(-1, -1, size, size)
    return x.clone(), torch.arange(4).repeat(copies)


def test_grid_pointing_game_of_known_maps():
    x, labels = shades()
    grid = mosaics(bright(), x, labels, 2, 12)
    assert grid.x.shape == (12, 4, 8, 8)
    index = torch.arange(12)
    own = grid.x[index, grid.targets]  # 1 in the cell to be found, 0 elsewhere
    assert torch.equal(own.view(12, 2, 4, 2, 4).mean((2, 4)).flatten(1).argmax(1), grid.cells)
    assert grid_pointing_game(own, grid).values.tolist() == [1] * 12
    assert grid_pointing_game(1e-30 * own, grid).values.tolist() == [1] * 12
    assert grid_pointing_game(1 - own, grid).values.tolist() == [0] * 12
    assert grid_pointing_game(torch.ones_like(own), grid).values.tolist() == [0.25] * 12
    nothing = grid_pointing_game(-own, grid)
    assert (nothing.mean, nothing.parts["nothing positive"].mean) == (0, 1)
    own[3, 0, 0] = math.nan
    assert grid_pointing_game(own, grid).unscored == {"NaN": (3,)}


def test_mosaics_are_made_on_the_way():
    x, labels = shades()

    def method(inputs, target):
        return inputs[torch.arange(len(inputs)), target]

    result = grid_pointing_game(
        method, x, labels, n=2, count=7, model=bright(), generator=generator(5), batch_size=3
    )
    assert (result.mean, len(result), result.settings["confidence"]) == (1, 7, 0.99)
    grid = mosaics(bright(), x, labels, 2, 7, generator=generator(5))
    assert result.settings["target"] == grid.targets.tolist()
    for bad, message in (
        (
            lambda: grid_pointing_game(method, x, labels, n=3, model=bright()),
            "4 classes have an image .* at least 9 classes",
        ),
        (lambda: mosaics(bright(0.1), x, labels), "0 classes have"),
        (lambda: mosaics(bright(), x, labels, classes=[9]), "0 of these are classes to find"),
        (lambda: grid_pointing_game(method, x, 3, model=bright()), "the class of each image"),
        (lambda: grid_pointing_game(method, x, labels), "pass model="),
    ):
        with pytest.raises(InputError, match=message):
            bad()
    assert set(mosaics(bright(), x, labels, 2, 6, classes=[1, 3]).targets.tolist()) == {1, 3}
