"""The CUDA kernel of the pairwise engine, run on the emulator, against the reference in float64."""

import math

import emulated
import pytest
import torch
from emulated import BFLOAT, FLOAT, HALF, ROUNDING, Guards, checked, close, pointer
from pairwise_problems import LOSSES

from tilewise.reference.pairwise import relations, row_losses

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs g++ (or CXX) to build the emulator")

# A warp a row, blocks of two sizes; rows that end with a vector, and not.
SHAPES = [(1, 1), (9, 40), (3, 1500), (3, 1501), (2, 9000)]


@pytest.fixture(scope="module")
def library():
    return emulated.build()


def launch(
    library, s, loss, parameters=(), *, dtype, labels, upstream, self_offset=None, guide=None, margin=0.0, scale=1.0,
    bias=None, unit=8, short=True
):  # fmt: skip
    """Rows begin at multiples of `unit` elements; with `short` labels are compared in 32 bits."""
    guards, (rows, columns) = Guards(), s.shape
    stride = -(-columns // unit) * unit
    tensors = {
        "similarities": guards.put(s, strides=(stride, 1)),
        "x_labels": guards.put(labels[0]),
        "y_labels": guards.put(labels[1]),
        "short_labels": guards.empty(columns, dtype=torch.int32) if short else None,
        "too_long": guards.put(torch.zeros(1, dtype=torch.int32)) if short else None,
        "guide": guards.put(guide),
        "scale": guards.put(torch.tensor([scale])),
        "bias": None if bias is None else guards.put(torch.tensor([bias])),
        "loss_rows": guards.empty(rows),
        "active_rows": guards.empty(rows),
        "gradient": None if dtype is None else guards.empty(rows, columns, dtype=dtype, strides=(stride, 1)),
        "grad_loss": guards.put(upstream),
        "bias_rows": guards.empty(rows),
    }
    if dtype == FLOAT:
        tensors["gradient"] = tensors["similarities"]  # in place
    call = emulated.PairCall(rows=rows, columns=columns, row_stride=stride, self_offset=self_offset or 0)
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
    self_offset = None if dtype == BFLOAT else shape[1] // 2
    guide = torch.randn(shape) if dtype == HALF else None
    scale, bias = (1.0, None) if loss.startswith("multi_similarity") else (3.0, 0.25)
    upstream = torch.tensor([0.7]).expand(rows) if dtype == BFLOAT else torch.randn(rows)
    options = {"self_offset": self_offset, "guide": guide, "margin": 0.2, "scale": scale, "bias": bias}
    found = launch(library, s, loss, LOSSES[loss], dtype=dtype, labels=labels, upstream=upstream, **options)
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
    found = launch(library, s, "softmax", dtype=BFLOAT, labels=labels, upstream=torch.ones(3))
    losses, _, weights = row_losses(s[:2].double(), *relations(labels[0][:2], labels[1]), "softmax")
    close("loss", found["loss_rows"][:2], losses, 1e-6, 1e-6)
    close("gradient", found["gradient"][:2], weights, 1e-2, 1e-6)
    assert found["loss_rows"][2].isnan() and found["gradient"][2].isnan().any()


LONG = 2**32


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("columns", [44, 45, 2100])
@pytest.mark.parametrize("kind", ["short", "long", "long row", "not formed", "rows anywhere"])
def test_labels_of_any_length(library, kind, columns, dtype):
    """Labels that differ in their high bits alone are different; nothing depends on how they are compared."""
    torch.manual_seed(1)
    s, labels = torch.randn(3, columns), [torch.tensor([1, -2, 3]), torch.randint(-3, 4, (columns,))]
    if kind == "long":
        labels[1] += LONG * (torch.arange(columns) % 3 - 1)
    if kind == "long row":
        labels[0][1] += LONG
    options = {"unit": 1 if kind == "rows anywhere" else 8, "short": kind != "not formed", "self_offset": columns - 5}
    found = launch(library, s, "softmax", dtype=dtype, labels=labels, upstream=torch.ones(3), **options)
    losses, active, weights = row_losses(s.double(), *relations(*labels, columns - 5), "softmax")
    assert active[1] == (kind != "long row")
    assert torch.equal(found["active_rows"], active.float())
    close("loss", found["loss_rows"], torch.where(active, losses, 0), 3e-6, 3e-6)
    close("gradient", found["gradient"], torch.where(active[:, None], weights, 0), ROUNDING[dtype] + 1e-5, 1e-6)
    if options["short"]:
        assert torch.equal(found["short_labels"].long(), labels[1].int().long())
        assert found["too_long"].item() == (kind == "long")


@pytest.mark.parametrize("self_offset", [None, -2, 0, 31, 32, 90, 93, 96])
def test_own_column_anywhere(library, self_offset):
    """Also at the edges of what goes by vectors, and beyond the columns."""
    torch.manual_seed(2)
    s, labels = torch.randn(4, 95), [torch.arange(4) % 2, torch.arange(95) % 2]
    options = {"dtype": FLOAT, "labels": labels, "upstream": torch.ones(4), "self_offset": self_offset}
    for loss in ("softmax", "triplet"):
        found = launch(library, s, loss, LOSSES[loss], **options)
        losses, _, weights = row_losses(s.double(), *relations(*labels, self_offset), loss, LOSSES[loss])
        close("loss", found["loss_rows"], losses, 3e-6, 3e-6)
        close("gradient", found["gradient"], weights, 1e-5, 1e-6)
