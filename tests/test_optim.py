"""Layer-wise rates and sharpness-aware steps, against hand-computed cases."""

import pytest
import torch
from torch import nn

from unmask import optim


class Toy(nn.Module):
    """Named as a ConvNeXt detector is."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.stem = nn.Linear(2, 2)
        self.backbone.stages = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(4)])
        self.frequency, self.head = nn.Linear(2, 2), nn.Linear(2, 1)


def test_rates_fall_towards_the_stem_and_norms_do_not_decay():
    module = Toy()
    groups = optim.parameter_groups(module, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(rate) == len(list(module.parameters()))
    assert rate[id(module.head.weight)] == (1.0, 0.1) and rate[id(module.head.bias)] == (1.0, 0.0)
    assert rate[id(module.frequency.weight)] == (1.0, 0.1)
    for stage, expected in enumerate((0.0625, 0.125, 0.25, 0.5)):
        assert rate[id(module.backbone.stages[stage].weight)] == (expected, 0.1)
    assert rate[id(module.backbone.stem.weight)] == (0.03125, 0.1)
    module.head.weight.requires_grad_(False)
    groups = optim.parameter_groups(module, 1.0, 0.1, 0.5)
    assert id(module.head.weight) not in {id(p) for group in groups for p in group["params"]}


def test_the_sharpness_aware_gradient_is_that_of_the_worst_nearby_weights():
    module = nn.Linear(2, 1, bias=False)
    start = torch.tensor([[3.0, 4.0]])
    module.weight.data.copy_(start)

    def backward():  # loss w1^4 + w2^2 has gradient (4 w1^3, 2 w2)
        (module.weight[0, 0] ** 4 + module.weight[0, 1] ** 2).backward()

    backward()
    gradient = torch.tensor([108.0, 8.0])
    assert torch.allclose(module.weight.grad[0], gradient)
    optim.sharpness_aware(module, 0.5, backward)
    moved = start[0] + 0.5 * gradient / gradient.norm()
    assert torch.allclose(module.weight.grad[0], torch.stack([4 * moved[0] ** 3, 2 * moved[1]]))
    assert torch.allclose(module.weight, start, atol=1e-6), "the weights are back"


def test_running_statistics_are_those_of_the_true_weights():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3))
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))

    def backward():
        module(x).square().sum().add(module[0].weight.sum()).backward()

    backward()
    mean = module[1].running_mean.clone()
    optim.sharpness_aware(module, 1.0, backward)
    assert torch.equal(module[1].running_mean, mean) and module[1].momentum == 0.3
    with pytest.raises(ZeroDivisionError):
        optim.sharpness_aware(module, 1.0, lambda: 1 / 0)
    assert module[1].momentum == 0.3
