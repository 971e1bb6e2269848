"""Converted layers beside the rest of a program: groups hold nothing back, other classes are respected, ids checked."""

import copy
import gc
import io
import warnings
import weakref

import contract  # noqa: F401  (marks this module for every backend)
import pytest
import torch
from contract import DEVICE, INTERPRETED
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import tilewise
from tilewise.nn import WTACRSLinear, convert_linear, restore_linear, set_sample_ids


class CrossAttention(nn.Module):
    """q of one input, k and v of another; v may be left out. It tells which activations there were."""

    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x, memory, seen=None, values=True):
        h, m = self.norm(x), self.norm(memory)
        if seen is not None:
            seen += [weakref.ref(h), weakref.ref(m)]
        scores = torch.softmax(self.q(h) @ self.k(m).mT, -1)
        return scores @ (self.v(m) if values else m)


def crossed() -> CrossAttention:
    torch.manual_seed(0)
    return convert_linear(CrossAttention().to(DEVICE), ratio=0.5, groups=[("q", "k", "v")])


def inputs():
    return (torch.randn(2, n, 8, device=DEVICE) for n in (5, 6))


@pytest.mark.parametrize("values", [True, False])
def test_a_group_lets_go_of_every_input(values):
    model, seen = crossed(), []
    model(*inputs(), seen, values).square().sum().backward()
    gc.collect()
    assert len(seen) == 2 and not any(ref() is not None for ref in seen)
    assert model.q.shared.sample is None


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be compiled")
@pytest.mark.parametrize("values", [True, False])
def test_a_compiled_group_holds_nothing(values):
    torch._dynamo.reset()
    model = crossed()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(*inputs(), None, values).square().sum().backward()
    gc.collect()
    assert model.q.shared.sample is None


def test_groups_of_different_inputs_copy_and_pickle():
    """Also while an input is alive, of which a member has not asked for its sample yet."""
    model = crossed()
    x, memory = inputs()
    held = model.norm(x)
    model.q(held)
    assert model.q.shared.sample is not None
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for other in (copy.deepcopy(model), averaged.module, torch.load(file, weights_only=False)):
        assert other.q.shared is other.v.shared is not model.q.shared and other.q.shared.sample is None
        assert torch.equal(other(x, memory), model(x, memory))
        other(x, memory).square().sum().backward()


@pytest.mark.parametrize("parametrization", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_restoring_refuses_what_others_made_of_a_layer(parametrization):
    model = convert_linear(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ratio=0.5).to(DEVICE)
    parametrization(model[1])
    x = torch.randn(9, 4, device=DEVICE)
    expected = model(x)
    with pytest.raises(ValueError, match=r"itself, got 1 \(ParametrizedWTACRSLinear\): undo first"):
        restore_linear(model)
    assert type(model[0]) is WTACRSLinear and torch.equal(model(x), expected)
    parametrize.remove_parametrizations(model[1], "weight")
    assert [type(layer) for layer in restore_linear(model)] == [nn.Linear] * 2
    torch.testing.assert_close(model(x), expected)


def test_what_is_not_converted_is_listed():
    class Conv1D(nn.Module):  # as in transformers
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4))

    class Scaled(nn.Linear):
        pass

    def model():
        return nn.ModuleDict({"a": nn.Linear(4, 4), "b": Scaled(4, 4), "c": Conv1D()})

    with pytest.warns(UserWarning, match=r"left as they are: b \(Scaled\), c \(Conv1D\)$"):
        convert_linear(model(), ratio=0.5)
    with pytest.warns(UserWarning, match=r"left as they are: b \(Scaled\)$"):
        convert_linear(model(), ratio=0.5, exclude="c")
    with pytest.raises(ValueError, match=r"nn.Linear that \('c',\) names, got c \(Conv1D\)$"):
        convert_linear(model(), ratio=0.5, include="c")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_linear(model(), ratio=0.5, exclude=["b", "c"])


@pytest.mark.parametrize("ids", [[0, -1], [0, 3], [-4, 1]])
def test_ids_of_no_sample_are_refused(ids):
    model = convert_linear(nn.Sequential(nn.Linear(4, 4)), ratio=0.5, samples=3, tokens=5)
    with pytest.raises(ValueError, match=r"set_sample_ids: expected ids in \[0, 3\), got \["):
        set_sample_ids(model, torch.tensor(ids))
    assert model[0].sample_ids is None


@pytest.mark.skipif(DEVICE != "cpu", reason="an assertion of a GPU ends its use")
def test_a_recorded_negative_id_is_refused():
    x, weight = torch.randn(2, 5, 4), torch.randn(4, 4, requires_grad=True)
    table = torch.full((3, 5), -1.0)
    y = tilewise.wta_crs_linear(x, weight, k=3, record=(table, torch.tensor([0, -1])))
    with pytest.raises(IndexError, match="out of bounds"):
        y.sum().backward()
    assert (table[1:] == -1).all()
