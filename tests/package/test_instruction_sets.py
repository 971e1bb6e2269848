"""Every instruction set that this processor has computes the same, up to the rounding of sums in another order."""

import subprocess
import sys

import pytest
import torch

from tilewise import loading

PROGRAM = """
import sys, torch, tilewise
from tilewise import loading
torch.manual_seed(0)
results = [loading.cpu_isa()]
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    logits = (3 * torch.randn(9, 4099)).to(dtype).requires_grad_()
    target = torch.randint(0, 4099, (9,))
    options = dict(label_smoothing=0.1, softcap=9.0, return_stats=True)
    loss, stats = tilewise.cross_entropy(logits, target, **options)
    total = loss + stats.entropy.sum() + tilewise.z_loss(logits, target, a=1.0, b=0.5)
    results += [total.detach(), torch.autograd.grad(total, logits)[0]]
for dtype in (torch.float64, torch.float32):
    x, y, w = (torch.randn(n, 37, dtype=dtype).requires_grad_() for n in (83, 83, 211))
    labels = torch.arange(83) // 3
    losses = [
        tilewise.multi_similarity_loss(x, labels),
        tilewise.siglip_loss(x, y, 0.3, -1.0),
        tilewise.linear_cross_entropy(x, w, labels, softcap=9.0),
        *(tilewise.mala(*(t[None, None] for t in (x, y, w[:83])), causal=causal).sum() for causal in (False, True)),
    ]
    a, b = (torch.rand(5, n, dtype=dtype) + 0.1 for n in (60, 90))
    a, b = (w / w.sum(1, keepdim=True) for w in (a, b))
    cost = torch.rand(5, 60, 90, dtype=dtype)
    for size in (90, 20):  # one problem after the other, and side by side
        weights = a if size == 90 else None, b if size == 90 else None
        solved = tilewise.sinkhorn(cost[:, :, :size], *weights, epsilon=0.1, tol=0.0, max_iter=20)
        results += [solved.value, solved.plan().sum(2)]
    losses += [
        tilewise.sinkhorn_points(x / 9, w / 9, epsilon=0.2, cost=cost, tol=0.0, max_iter=20).value
        for cost in ("sqeuclidean", "euclidean")
    ]
    results += [tilewise.simplex_topk(x.detach(), 7), tilewise.sparse_ot(cost[:2], k=60, tol=0.0, max_iter=4).alpha]
    sample = tilewise.wta_crs_sample(w, k=30, norms=w.detach().norm(dim=1), seed=7)
    results += [sample.rows, sample.scales.to(dtype), sample.indices.to(dtype)]
    losses += [tilewise.wta_crs_linear(x[:, :9], w[:20, :9], k=11, seed=7).square().sum()]
    losses += [tilewise.sinkhorn(w[:9, :9], epsilon=1.0, gradient="unrolled", max_iter=5).plan()[0].sum()]
    results += [loss.detach() for loss in losses]
    results += torch.autograd.grad(sum(losses), (x, y, w))
torch.save(results, sys.argv[1])
"""


@pytest.mark.skipif(len(loading.cpu_isas()) == 1, reason="one build serves all processors of this architecture")
def test_levels_agree(tmp_path, monkeypatch):
    results = {}
    for level in loading.cpu_isas():
        monkeypatch.setenv("TILEWISE_CPU_ISA", level)
        subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / level)], check=True)
        isa, *results[level] = torch.load(tmp_path / level)
        assert isa == level
    for level, tensors in results.items():
        for tensor, expected in zip(tensors, results["v2"], strict=True):
            eps = torch.finfo(tensor.dtype).eps
            size = expected.abs().max().item() if tensor.dim() == 2 and tensor.shape[1] == 37 else 0  # sums of products
            torch.testing.assert_close(
                tensor, expected, rtol=16 * eps, atol=(8 + 64 * size) * eps, msg=lambda m, at=level: f"{at}: {m}"
            )
