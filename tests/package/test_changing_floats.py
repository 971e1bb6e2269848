"""torch.compile with a number that changes at every call: one graph for the first, and one for all others."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import tilewise

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 1])
CALLS = {
    "cross_entropy, logit_scale": lambda x, s: tilewise.cross_entropy(x, LABELS, logit_scale=s),
    "cross_entropy, label_smoothing": lambda x, s: tilewise.cross_entropy(x, LABELS, label_smoothing=s / 10),
    "cross_entropy, softcap": lambda x, s: tilewise.cross_entropy(x, LABELS, softcap=s),
    "linear_cross_entropy, softcap": lambda x, s: tilewise.linear_cross_entropy(x, x[:5], LABELS, softcap=s),
    "z_loss, a": lambda x, s: tilewise.z_loss(x, LABELS, a=s, b=0.0),
    "mala, scale": lambda x, s: tilewise.mala(*(x[None, None],) * 3, scale=s).square().sum(),
    "info_nce, temperature": lambda x, s: tilewise.info_nce(x, x, temperature=s),
    "clip_loss, logit_scale": lambda x, s: tilewise.clip_loss(x, x, s),
    "simplex_topk, scale": lambda x, s: tilewise.simplex_topk(x, 3, scale=s).square().sum(),
    "sinkhorn, epsilon": lambda x, s: tilewise.sinkhorn(x, epsilon=s, max_iter=5, tol=0.0).value,
}


@pytest.mark.parametrize("call", CALLS)
def test_two_graphs_serve_every_number(call):
    torch._dynamo.reset()
    torch.manual_seed(0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[call], fullgraph=True, backend=counter)
    x = torch.randn(8, 6, requires_grad=True)
    for number in (1.0, 1.5, 0.7, 2.3, 3.1):
        found, expected = (torch.autograd.grad(f(x, number), x)[0] for f in (compiled, CALLS[call]))
        torch.testing.assert_close(found, expected)
    assert counter.frame_count <= 2


def test_numbers_change_where_nothing_records():
    torch._dynamo.reset()
    call = CALLS["cross_entropy, logit_scale"]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    x = torch.randn(8, 6)
    for number in (0.5, 1.5, 0.7):
        torch.testing.assert_close(compiled(x, number), call(x, number))
    assert counter.frame_count <= 2
