"""torch.set_default_device is of no concern to public functions and modules: what they make is where their input is."""

import copy
import inspect

import pytest
import torch
from contract import DEVICE
from public_functions import CALLS, LABELS, names, values_and_gradients
from torch import nn

from tilewise import nn as modules


def linears(count):
    return [nn.Linear(6, 6) for _ in range(count)]


ROWS, POINTS = (8, 6), (7, 3)
MODULES = {  # name -> a module, the shapes of its floating inputs, and its other inputs
    "ClipLoss": lambda: (modules.ClipLoss(), (ROWS, ROWS), 10.0),
    "CrossEntropyLoss": lambda: (modules.CrossEntropyLoss(torch.ones(6), label_smoothing=0.1), (ROWS,), LABELS),
    "FactoredSphericalOutput": lambda: (modules.FactoredSphericalOutput(6, 5), (ROWS,), LABELS),
    "InfoNCELoss": lambda: (modules.InfoNCELoss(temperature=nn.Parameter(torch.tensor(0.1))), (ROWS, ROWS)),
    "MALA": lambda: (modules.MALA(8, 2), ((2, 4, 4, 8),)),
    "MALAttention": lambda: (modules.MALAttention(6, 2), (ROWS,)),
    "MixtureOfExperts": lambda: (modules.MixtureOfExperts(modules.SparseOTRouter(6, 3), linears(3)), (ROWS,)),
    "MongeGap": lambda: (modules.MongeGap(epsilon=0.5), (POINTS, POINTS)),
    "MultiSimilarityLoss": lambda: (modules.MultiSimilarityLoss(), (ROWS,), LABELS),
    "MultiSimilarityMiner": lambda: (modules.MultiSimilarityMiner(), (ROWS,), LABELS),
    "NTXentLoss": lambda: (modules.NTXentLoss(), (ROWS, ROWS)),
    "NormCache": lambda: (_Cached(), ((3, 4, 6),)),
    "PairWeightedLoss": lambda: (modules.PairWeightedLoss(_row_losses), (ROWS,), LABELS),
    "SampledGroup": lambda: (modules.SampledGroup(linears(2), ratio=0.5), (ROWS,)),
    "SamplesLoss": lambda: (modules.SamplesLoss(), (POINTS, POINTS)),
    "SigLipLoss": lambda: (modules.SigLipLoss(), (ROWS, ROWS), 10.0, -10.0),
    "SinkhornDivergence": lambda: (modules.SinkhornDivergence(epsilon=0.5), (POINTS, POINTS)),
    "SparseOTRouter": lambda: (modules.SparseOTRouter(6, 3), (ROWS,)),
    "SphericalSoftmaxLoss": lambda: (modules.SphericalSoftmaxLoss(), (ROWS,), LABELS),
    "SupConLoss": lambda: (modules.SupConLoss(), (ROWS,), LABELS),
    "TaylorSoftmaxLoss": lambda: (modules.TaylorSoftmaxLoss(), (ROWS,), LABELS),
    "WTACRSLinear": lambda: (modules.WTACRSLinear(6, 5, ratio=0.5), (ROWS,)),
    "ZLoss": lambda: (modules.ZLoss(), (ROWS,), LABELS),
}


def _row_losses(s, positive, negative):
    return ((1 - s) * positive + torch.relu(s) * negative).sum(1)


class _Cached(nn.Sequential):
    """A layer that goes by the norms of the last visit."""

    def __init__(self):
        super().__init__(nn.Linear(6, 5))
        modules.convert_linear(self, ratio=0.5, samples=3, tokens=4)

    def forward(self, x):
        modules.set_sample_ids(self, torch.arange(len(x), device=x.device))
        return super().forward(x)


def flat(outputs) -> list[torch.Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [t for t in outputs if t is not None]


def same_on_meta(run):
    torch.manual_seed(1)
    expected = run()
    torch.manual_seed(1)
    with torch.device("meta"):
        found = run()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", names())
def test_functions(name):
    call = CALLS[name]
    tensors = call.tensors([torch.float32] * len(call.shapes))
    same_on_meta(lambda: values_and_gradients(call.function(*tensors), tensors))


def test_every_module_is_here():
    classes = [name for name in modules.__all__ if inspect.isclass(getattr(modules, name))]
    assert sorted(MODULES) == sorted(classes)


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    torch.manual_seed(0)
    module, shapes, *rest = MODULES[name]()
    module.to(DEVICE)
    inputs = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    state = copy.deepcopy(module.state_dict())

    def run():
        module.load_state_dict(state)
        return values_and_gradients(flat(module(*inputs, *rest)), inputs)

    same_on_meta(run)
