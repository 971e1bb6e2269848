"""The CUDA kernels of clip_loss, run on the emulator, against the reference in float64."""

import math

import emulated
import pytest
import torch
from emulated import BFLOAT, FLOAT, HALF, ROUNDING, ClipCall, Guards, checked, close, pointer

from tilewise.reference.clip_loss import OPS

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs g++ (or CXX) to build the emulator")

LINES = ("row_max", "row_weight", "column_max", "column_weight", "share")


@pytest.fixture(scope="module")
def library():
    return emulated.build()


class Chunks:
    """A call in chunks of `held` rows of z = scale s, whose rows are the images beside a unit matrix of texts."""

    def __init__(self, library, s, scale, held, offset=0):
        self.library, self.held, self.n, self.guards = library, held, len(s), Guards()
        put = self.guards.put
        self.tensors = {"scale": put(torch.tensor([scale])), "state": self.guards.empty(5 * self.n)}
        self.tensors |= {name: self.guards.empty(self.n) for name in ("loss_rows", "share_rows")}
        self.tensors |= {name: self.guards.empty(1) for name in ("loss", "total")}
        strips, bands = -(-self.n // 256), -(-held // 32)
        self.tensors["parts"] = self.guards.empty(2 * (held * strips + bands * self.n))
        self.s, self.offset = s, offset

    def call(self, function, first=0, **more):
        tensors = self.tensors | {
            "similarities": self.guards.put(self.s[first : first + self.held], offset=self.offset),
            **more,
        }
        if "gradient" in tensors and tensors["gradient"] is None:
            tensors["gradient"] = tensors["similarities"]  # in place
        call = ClipCall(first=first, rows=len(tensors["similarities"]), columns=self.n)
        for name, tensor in tensors.items():
            setattr(call, name, pointer(tensor))
        if "gradient" in tensors:
            call.gradient_dtype = emulated.DTYPES[tensors["gradient"].dtype]
        checked(getattr(self.library, function)(call))
        self.guards.check()
        return tensors

    def forward(self):
        for first in range(0, self.n, self.held):
            self.call("clip_statistics", first)
        self.call("clip_finish")
        return self.tensors

    def gradient(self, dtype, grad_loss):
        parts = []
        for first in range(0, self.n, self.held):
            rows = min(self.held, self.n - first)
            out = None if dtype == FLOAT else self.guards.empty(rows, self.n, dtype=dtype, offset=self.offset)
            parts.append(self.call("clip_gradient", first, gradient=out, grad_loss=self.guards.put(grad_loss)))
        return torch.cat([part["gradient"] for part in parts])


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF], ids=str)
@pytest.mark.parametrize(
    ("n", "held", "offset"),
    [(1, 1, 0), (7, 3, 0), (40, 40, 0), (40, 40, 1), (264, 100, 0), (301, 301, 0), (520, 500, 0)],
)
def test_against_the_reference(library, n, held, offset, dtype):
    """One tile, edges of tiles, rows of any alignment, chunks that join; a float32 gradient over the similarities."""
    torch.manual_seed(0)
    s, scale = torch.randn(n, n) / 2, -3.0 if n == 7 else 9.0
    grad_loss = None if n == 40 else torch.randn(n)
    chunks = Chunks(library, s, scale, held, offset)
    found = chunks.forward()
    wide = s.double(), torch.eye(n).double(), torch.tensor(scale).double()
    rows, state = OPS["clip_loss"](*wide, reduction="none")
    close("loss", found["loss_rows"], rows, 3e-6, 3e-6)
    close("mean", found["loss"], rows.mean()[None], 1e-6, 1e-6)
    assert found["total"].item() == n
    for name, line, exact in zip(LINES, found["state"].view(5, n), state[:-1].view(5, n), strict=True):
        close(name, line, exact, 3e-6, 1e-7)
    upstream = None if grad_loss is None else grad_loss.double()
    expected, _ = OPS["clip_loss_backward"](*wide, state, upstream, text_grad=False)
    size = expected.abs().amax().item()
    close("gradient", chunks.gradient(dtype, grad_loss), expected, ROUNDING[dtype] + 1e-5, 1e-6 * size + 1e-7)


def test_confident_pairs(library):
    """What the others leave of a positive that takes nearly all: to 1e-4 of itself."""
    torch.manual_seed(0)
    s = torch.randint(-12, 13, (40, 40)) / 4
    s.diagonal().copy_(torch.arange(40) / 2 + 6)
    chunks = Chunks(library, s, 1.0, 40)
    found = chunks.forward()
    wide = s.double(), torch.eye(40).double(), torch.tensor(1.0).double()
    rows, state = OPS["clip_loss"](*wide, reduction="none")
    assert rows.min() < 1e-7
    expected, _ = OPS["clip_loss_backward"](*wide, state)
    close("confident loss", found["loss_rows"], rows, 1e-4, 1e-30)
    close("confident gradient", chunks.gradient(FLOAT, None), expected, 1e-4, 1e-30)


def test_extremes(library):
    """Scores of 1e30, rows and columns of -inf but for their positive; NaN and infinities of one row reach no other."""
    s = torch.full((5, 5), -math.inf)
    s.diagonal().fill_(2.0)
    s[3, 3] = 1e30
    found = Chunks(library, s, 1.0, 5).forward()
    assert not found["loss_rows"].any() and not found["state"].view(5, 5)[4].any()
    for value in (math.nan, math.inf):
        s = torch.randn(5, 5)
        s[1, 2] = value
        assert Chunks(library, s, 1.0, 5).forward()["loss_rows"].isnan().tolist() == [False, True, True, False, False]
