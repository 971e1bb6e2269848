"""The CUDA kernel of the pairwise engine, run on the emulator, against the reference in float64."""

import math

import emulated
import pytest
import torch
from emulated import BFLOAT, FLOAT, HALF, ROUNDING, Guards, checked, close, pointer
from pairwise_problems import LOSSES

from tilewise.reference.pairwise import relations, row_losses

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs g++ (or CXX) to build the emulator")

SHAPES = [(1, 1), (9, 40), (3, 1500), (2, 9000)]  # a warp a row, blocks of two sizes


@pytest.fixture(scope="module")
def library():
    return emulated.build()


def launch(library, guards, s, loss, parameters, *, dtype, labels, self_offset, guide, margin, scale, bias, upstream):
    rows, columns = s.shape
    tensors = {
        "similarities": guards.put(s),
        "x_labels": guards.put(labels[0]),
        "y_labels": guards.put(labels[1]),
        "guide": guards.put(guide),
        "scale": guards.put(torch.tensor([scale])),
        "bias": None if bias is None else guards.put(torch.tensor([bias])),
        "loss_rows": guards.empty(rows),
        "active_rows": guards.empty(rows),
        "gradient": None if dtype is None else guards.empty(rows, columns, dtype=dtype),
        "grad_loss": guards.put(upstream),
        "bias_rows": guards.empty(rows),
    }
    if dtype == FLOAT:
        tensors["gradient"] = tensors["similarities"]  # in place
    call = emulated.PairCall(rows=rows, columns=columns, row_stride=columns, self_offset=self_offset or 0)
    call.excludes_self = self_offset is not None
    call.guide_stride, call.guide_margin = columns, margin
    call.loss = loss.removesuffix(" of all pairs").encode()
    for i, value in enumerate(parameters):
        call.parameters[i] = value
    call.gradient_dtype = emulated.DTYPES[dtype or FLOAT]
    call.grad_loss_stride = upstream.stride(0)
    for name, tensor in tensors.items():
        setattr(call, name, pointer(tensor))
    checked(library.pairwise(call))
    guards.check()
    return tensors


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF, None], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_against_the_reference(library, loss, shape, dtype):
    if shape[1] > 1500 and dtype in (BFLOAT, HALF):
        pytest.skip("the storage type does not depend on the size of the block")
    torch.manual_seed(0)
    rows = shape[0]
    s = torch.randn(shape) / 2
    labels = [torch.randint(0, 4, (n,)) for n in shape]
    labels[0][-1] = 77  # no positives
    self_offset = None if dtype == BFLOAT else 2
    guide = torch.randn(shape) if dtype == HALF else None
    scale, bias = (1.0, None) if loss.startswith("multi_similarity") else (3.0, 0.25)
    upstream = torch.tensor([0.7]).expand(rows) if dtype == BFLOAT else torch.randn(rows)
    found = launch(
        library,
        Guards(),
        s,
        loss,
        LOSSES[loss],
        dtype=dtype,
        labels=labels,
        self_offset=self_offset,
        guide=guide,
        margin=0.2,
        scale=scale,
        bias=bias,
        upstream=upstream,
    )
    masks = relations(*labels, self_offset, None if guide is None else guide.double(), 0.2)
    z = scale * s.double() + (bias or 0.0)
    losses, active, weights = row_losses(z, *masks, loss.removesuffix(" of all pairs"), LOSSES[loss])
    close("loss", found["loss_rows"], losses, 3e-6, 3e-6)
    assert torch.equal(found["active_rows"], active.float())
    if dtype is None:
        assert found["bias_rows"].isnan().all()  # not asked for
        return
    expected = weights * upstream[:, None].double()
    size = expected.abs().amax().item()
    close("gradient", found["gradient"], expected, ROUNDING[dtype] + 1e-5, 3e-6 * size + 1e-7)
    close("bias", found["bias_rows"], expected.sum(1), 1e-4, 1e-5 * expected.abs().sum(1).amax().item() + 1e-9)


def test_extremes(library):
    """Scores of 1e4, -inf, and a row of NaN: as the formula has it, and NaN stays in its row."""
    s = torch.tensor([[1e4, -1e4, 0.0, 3.0], [-math.inf, 1.0, 2.0, 0.0], [math.nan, 1.0, 2.0, 0.0]])
    labels = [torch.tensor([0, 1, 1]), torch.tensor([0, 1, 1, 2])]
    found = launch(
        library,
        Guards(),
        s,
        "softmax",
        [],
        dtype=BFLOAT,
        labels=labels,
        self_offset=None,
        guide=None,
        margin=0.0,
        scale=1.0,
        bias=None,
        upstream=torch.ones(3),
    )
    losses, _, weights = row_losses(s[:2].double(), *relations(labels[0][:2], labels[1]), "softmax")
    close("loss", found["loss_rows"][:2], losses, 1e-6, 1e-6)
    close("gradient", found["gradient"][:2], weights, 1e-2, 1e-6)
    assert found["loss_rows"][2].isnan() and found["gradient"][2].isnan().any()
