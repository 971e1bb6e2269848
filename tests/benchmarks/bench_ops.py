"""CPU regression suite: forward + backward of every operator, compared with the last saved run.

    pytest tests/benchmarks/bench_ops.py --benchmark-autosave --benchmark-compare

pytest does not collect it by itself (its name does not begin with test_), so `make test` stays short.
"""

import pytest
import torch

import tilewise

pytest.importorskip("pytest_benchmark")

ROWS, CLASSES = 512, 32000
OPERATORS = {
    "cross_entropy": (tilewise.cross_entropy, {}),
    "cross_entropy_smoothed": (tilewise.cross_entropy, {"label_smoothing": 0.1, "lse_square_scale": 1e-4}),
    "z_loss": (tilewise.z_loss, {"a": 1.0, "b": 2.0}),
    "taylor_softmax_loss": (tilewise.taylor_softmax_loss, {}),
    "spherical_softmax_loss": (tilewise.spherical_softmax_loss, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPERATORS)
def test_forward_backward(benchmark, name, dtype):
    operator, options = OPERATORS[name]
    torch.manual_seed(0)
    logits = torch.randn(ROWS, CLASSES).to(dtype).requires_grad_()
    target = torch.randint(CLASSES, (ROWS,))

    def step():
        loss = operator(logits, target, **options)
        return loss, *torch.autograd.grad(loss, logits)

    with tilewise.backend("reference"):
        expected_loss, expected_gradient = step()
    loss, gradient = benchmark.pedantic(step, rounds=7, warmup_rounds=2)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    off = (gradient.double() - expected_gradient.double()).norm() / expected_gradient.double().norm()
    assert off < (1e-4 if dtype == torch.float32 else 1e-2)
