"""Loss modules: their options that are tensors belong to them."""

import pickle

import contract  # noqa: F401  (marks this module for every backend)
import pytest
import torch
from contract import DEVICE
from torch import nn

import tilewise
from tilewise.nn.losses import LossModule


def pairs():
    torch.manual_seed(0)
    return torch.randn(8, 6, device=DEVICE), torch.randn(8, 6, device=DEVICE)


@pytest.mark.parametrize("kind", ["InfoNCELoss", "NTXentLoss", "SupConLoss"])
def test_a_temperature_is_a_parameter(kind):
    x, y = pairs()
    loss = getattr(tilewise.nn, kind)(temperature=nn.Parameter(torch.tensor(0.5)), normalize=False).to(DEVICE)
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    second = torch.arange(8, device=DEVICE) // 2 if kind == "SupConLoss" else y
    before = loss(x, second)
    before.backward()
    torch.optim.SGD(loss.parameters(), lr=0.1).step()
    after = loss(x, second)
    assert loss.temperature.grad != 0 and after != before
    other = getattr(tilewise.nn, kind)(temperature=nn.Parameter(torch.tensor(9.0)), normalize=False).to(DEVICE)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(x, second), after)
    assert torch.equal(pickle.loads(pickle.dumps(loss))(x, second), after)
    assert loss.double().temperature.dtype == torch.float64


def test_a_tensor_is_a_buffer_and_a_module_a_child():
    loss = tilewise.nn.SinkhornDivergence(epsilon=torch.tensor(0.5))
    assert list(loss.state_dict()) == ["epsilon"] and not list(loss.parameters())
    assert loss.to("meta").epsilon.is_meta

    class Weighting(nn.Module):
        def __init__(self):
            super().__init__()
            self.margin = nn.Parameter(torch.tensor(0.5))

        def forward(self, s, positive, negative):
            return ((1 - s) * positive + torch.relu(s - self.margin.detach()) * negative).sum(1)

    loss = tilewise.nn.PairWeightedLoss(Weighting())
    assert list(loss.state_dict()) == ["weighting.margin"]


def test_every_option_is_an_attribute():
    loss = LossModule(scale=torch.ones(2), kind="z", none=None)
    assert loss.options == {"scale": loss.scale, "kind": "z", "none": None}
    assert repr(loss) == "LossModule(kind='z', none=None)"
