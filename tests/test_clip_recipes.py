"""Recipes of training: rates over the epochs, and which recipe a name means."""

import math

import pytest
import torch

from unmask import clip_recipes
from unmask.clip_recipes import RECIPES, Recipe, optimizer_of, rate, recipe_of


def rates(recipe, losses):
    return [rate(recipe, losses[:epoch]) for epoch in range(len(losses) + 1)]


def test_coops_rate_warms_up_for_one_epoch_and_then_follows_the_cosine_of_all_epochs():
    found = rates(RECIPES["published"]["coop"], [1.0] * 50)
    assert found[0] == 1e-5 and found[50] == 0
    for epoch in range(1, 50):
        assert found[epoch] == pytest.approx(0.002 * (1 + math.cos(math.pi * (epoch - 1) / 50)) / 2)


def test_clippings_fine_tuning_ends_with_the_warm_up():
    assert rates(RECIPES["clipping"]["clip-finetune"], [1.0]) == [1e-5, 0]
    assert rates(RECIPES["clipping"]["coop"], [1.0, 1.0]) == [1e-5, 0.002, 0]


def test_a_plateau_cuts_the_rate_to_a_tenth_after_five_epochs_without_gain_and_ends_below_the_lowest():
    recipe = Recipe("adamw", 1e-4, 0.0, 256, 100, decay="plateau")
    better = [1.0, 0.9, 0.8]
    found = rates(recipe, better + [0.8] * 15)
    assert found[: 3 + 5] == [1e-4] * 8
    assert found[8:13] == pytest.approx([1e-5] * 5)
    assert found[13:18] == pytest.approx([1e-6] * 5)
    assert found[18] == 0
    assert rates(recipe, [1 / (k + 1) for k in range(100)])[:100] == [1e-4] * 100


def test_optimisers_are_those_of_the_recipe():
    weight = torch.nn.Parameter(torch.ones(1))
    sgd = optimizer_of(RECIPES["published"]["coop"], [weight])
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.9, 5e-4)
    adam = optimizer_of(RECIPES["published"]["ufd"], [weight])
    assert isinstance(adam, torch.optim.AdamW) and adam.defaults["weight_decay"] == 0


def test_unknown_names_are_refused():
    assert RECIPES["published"].keys() == RECIPES["small"].keys()
    assert recipe_of("small", "clip-lare:F4c-text") is clip_recipes.RECIPES["small"]["clip-lare"]
    with pytest.raises(ValueError, match="small"):
        recipe_of("smal", "ufd")
    with pytest.raises(ValueError, match="convnext"):
        recipe_of("small", "convnext")
    with pytest.raises(ValueError, match="lntune"):
        recipe_of("clipping", "lntune")
