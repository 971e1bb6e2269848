"""Small launches of every operator on one backend, to run under compute-sanitizer. Checks numbers as well.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python bench/sanitize.py --backend cuda

Without torch's caching allocator every tensor is its own allocation, so a read one element too far is seen.
"""

from __future__ import annotations

import argparse

import torch

import tilewise

SHAPES = [(1, 1), (3, 5), (7, 33), (5, 1024), (4, 1027), (2, 50257)]
SMALL = SHAPES[:4]
SHAPES_OF = {torch.float32: SHAPES, torch.bfloat16: SHAPES[2:5], torch.float16: SHAPES[2:4]}
SPHERICAL = {
    "z_loss": {"a": 1.0, "b": 2.0},
    "taylor_softmax_loss": {},
    "spherical_softmax_loss": {},
}


def logits_of(shape: tuple[int, int], dtype: torch.dtype, device: str, strided: bool = False) -> torch.Tensor:
    """Contiguous, or columns that lie two rows apart."""
    rows, classes = shape
    base = torch.randn(classes, 2 * rows, device=device).to(dtype) if strided else None
    return (torch.randn(shape, device=device).to(dtype) if base is None else base[:, ::2].T).detach().requires_grad_()


def labels_of(shape: tuple[int, int], device: str) -> torch.Tensor:
    """Class indices; the last row is ignored where there is more than one."""
    target = torch.randint(shape[1], (shape[0],), device=device)
    if shape[0] > 1:
        target[-1] = -100
    return target


def check(name: str, output: torch.Tensor, logits: torch.Tensor):
    (gradient,) = torch.autograd.grad(output.sum(), logits)
    if not (output.isfinite().all() and gradient.isfinite().all()):
        raise SystemExit(f"{name}: not finite for {tuple(logits.shape)} {logits.dtype}")


def cross_entropy(shape: tuple[int, int], dtype: torch.dtype, device: str):
    rows, classes = shape
    target = labels_of(shape, device)
    options = [
        {},
        {"reduction": "none", "label_smoothing": 0.1, "weight": torch.rand(classes, device=device) + 0.5},
        {"reduction": "sum", "lse_square_scale": 1e-3, "softcap": 20.0, "logit_scale": 0.7},
        {"row_weight": torch.rand(rows, device=device), "inplace_backward": True},
    ]
    for chosen in options:
        logits = logits_of(shape, dtype, device)
        check("cross_entropy", tilewise.cross_entropy(logits, target, **chosen), logits)
    logits = logits_of(shape, dtype, device)
    loss, stats = tilewise.cross_entropy(logits, target, return_stats=True)
    check("cross_entropy with statistics", loss + stats.lse.sum() + stats.entropy.sum(), logits)
    logits = logits_of(shape, dtype, device)
    shares = torch.softmax(torch.randn(shape, device=device), -1).to(dtype)
    check("cross_entropy of probabilities", tilewise.cross_entropy(logits, shares, label_smoothing=0.1), logits)
    if shape in SMALL:
        logits = logits_of(shape, dtype, device, strided=True)
        check("cross_entropy of strided logits", tilewise.cross_entropy(logits, target, inplace_backward=True), logits)


def spherical_family(shape: tuple[int, int], dtype: torch.dtype, device: str):
    target = labels_of(shape, device)
    for name, options in SPHERICAL.items():
        for strided in (False, True) if shape in SMALL else (False,):
            logits = logits_of(shape, dtype, device, strided)
            check(name, getattr(tilewise, name)(logits, target, **options), logits)


def layers(rows: int, classes: int, dtype: torch.dtype, device: str):
    """Losses of a linear layer: with and without a bias, from class indices and from probabilities, in chunks."""
    hidden, weight, bias = (
        torch.randn(*size, device=device).to(dtype).requires_grad_() for size in ((rows, 20), (classes, 20), (classes,))
    )
    target = labels_of((rows, classes), device)
    shares = torch.softmax(torch.randn(rows, classes, device=device), -1).to(dtype)
    for aim in (target, shares):
        options = {"label_smoothing": 0.1, "softcap": 20.0, "lse_square_scale": 1e-3, "reduction": "sum"}
        for chosen in ({}, {"linear_bias": bias, "reduction": "none"}, options):
            check("linear_cross_entropy", tilewise.linear_cross_entropy(hidden, weight, aim, **chosen), weight)
    for name, options in SPHERICAL.items():
        for chosen in ({}, {"bias": bias, "reduction": "none"}):
            loss = getattr(tilewise, f"linear_{name}")(hidden, weight, target, **options, **chosen)
            check(f"linear_{name}", loss, hidden)


def pairwise(rows: int, columns: int, dtype: torch.dtype, device: str):
    """A warp a row and a block a row; with a guide, without positives."""
    x, y = (torch.randn(n, 20, device=device).to(dtype).requires_grad_() for n in (rows, columns))
    labels, others = (torch.arange(n, device=device) % 7 for n in (rows, columns))
    for function in (tilewise.multi_similarity_loss, tilewise.supcon):
        check("pairs", function(x, labels), x)
        check("pairs with references", function(x, labels, ref_embeddings=y, ref_labels=others), x)
    guide = {"guide_query": x.detach(), "guide_key": y.detach()}
    check("info_nce", tilewise.info_nce(x, y, reduction="none", **guide), x)
    check("siglip_loss", tilewise.siglip_loss(y, y.detach(), 2.0, -1.0), y)
    scale = torch.tensor(0.5, device=device, requires_grad=True)
    for reduction in ("mean", "none"):
        for leaf in (y, scale):
            check("clip_loss", tilewise.clip_loss(y, y.detach().flip(0), scale, reduction=reduction), leaf)
    check("nt_xent", tilewise.nt_xent(y, y.detach().flip(0), temperature=0.5), y)
    for mine in (tilewise.multi_similarity_mine, tilewise.batch_hard_mine, tilewise.semihard_mine):
        mine(x.detach(), labels)
    for weighting in (tilewise.weighting.Triplet(), tilewise.weighting.LiftedStructure()):
        check("pair_weighted_loss", tilewise.pair_weighted_loss(x, labels, weighting), x)


def attention(tokens: int, features: int, dtype: torch.dtype, device: str):
    """Grouped heads as views of (B, N, H, D); rotated, packed, causal."""
    q, k, v = (torch.randn(1, tokens, h, features, device=device).to(dtype).transpose(1, 2) for h in (4, 2, 2))
    angle = torch.randn(tokens, features // 2, device=device)
    bounds = torch.tensor([0, tokens // 3, tokens // 3, tokens], device=device)
    for causal in (False, True):
        for options in ({}, {"rope": (angle.cos(), angle.sin()), "cu_seqlens": bounds}):
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            for leaf in leaves:
                check("mala", tilewise.mala(*leaves, causal=causal, **options), leaf)


def transport(n: int, m: int, features: int, device: str):
    """Matrices of both orders and points, with zeros, an infinite cost and penalties; plans, products, unrolled."""
    cost = torch.rand(3, m, n, device=device).mT
    x, y = (torch.rand(3, size, features, device=device) for size in (n, m))
    a, b = (torch.rand(3, size, device=device) + 0.1 for size in (n, m))
    if min(n, m) > 2:
        a[0, 1], cost[1, 2, 1] = 0, torch.inf
    a, b = (w / w.sum(1, keepdim=True) for w in (a, b))
    for options in ({}, {"reg_marginal": (0.5, None), "epsilon_scaling": 0.7}):
        options |= {"epsilon": 0.2, "max_iter": 9}
        leaf = cost.detach().requires_grad_()
        result = tilewise.sinkhorn(leaf, a, b, **options)
        check("sinkhorn", result.value + result.plan().square().sum((1, 2)), leaf)
        with torch.no_grad():
            result.apply(b), result.transpose_apply(a[:, :, None].expand(-1, -1, 20))
        for kind in ("sqeuclidean", "euclidean", "cosine"):
            leaf = x.detach().requires_grad_()
            result = tilewise.sinkhorn_points(leaf, y, a, b, cost=kind, **options)
            check("sinkhorn_points", result.value.sum() + result.barycentric_map().square().sum(), leaf)
    leaf = x.detach().requires_grad_()
    check("sinkhorn_divergence", tilewise.sinkhorn_divergence(leaf, y, a, b, epsilon=0.2, max_iter=9), leaf)
    leaf = a.detach().requires_grad_()
    value = tilewise.sinkhorn(cost, leaf, b, epsilon=0.2, max_iter=9).value.sum()
    (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
    check("sinkhorn's second derivative", slope.square(), leaf)
    tilewise.sinkhorn_knopp(x[0])
    leaf = x.detach().requires_grad_()
    check("monge_gap", tilewise.monge_gap(leaf, x + 1, epsilon=0.2, max_iter=9), leaf)
    if max(n, m) <= 64:
        leaf = cost.detach().requires_grad_()
        check("unrolled", tilewise.sinkhorn(leaf, a, b, epsilon=0.2, max_iter=5, gradient="unrolled").plan(), leaf)


def sparse(n: int, m: int, features: int, device: str):
    """Few and all entries, ties, a forbidden pair, points in blocks, routing."""
    cost = torch.rand(3, m, n, device=device)
    if m > 2:
        cost[1, 2, 0] = torch.inf
        cost[2] = 0.5
    x, y = (torch.rand(3, size, features, device=device) for size in (m, n))
    for k in {1, (m + 1) // 2, m}:
        leaf = cost[0].detach().requires_grad_()
        check("simplex_topk", tilewise.simplex_topk(leaf.mT, k).square(), leaf)
        if k * n < m:
            continue
        even = [torch.full((3, size), 1 / size, device=device) for size in (m, n)]
        options = {"cost": "euclidean", "k": k, "gamma": 1.0, "method": "dual", "max_iter": 3, "tol": 0.0}
        torch.ops.tilewise.sparse_ot_points(x, y, *even, **options, chunk_bytes=64)  # column by column
        torch.ops.tilewise.sparse_ot_columns(torch.cdist(y, x), even[0], even[1], k=k, gamma=0.5)
        for method in ("semi_dual", "dual"):
            leaf = cost.detach().requires_grad_()
            result = tilewise.sparse_ot(leaf, k=k, method=method, max_iter=9)
            check("sparse_ot", result.value, leaf)
            leaf = x.detach().requires_grad_()
            result = tilewise.sparse_ot_points(leaf, y, k=k, method=method, max_iter=9)
            check("sparse_ot_points", result.value, leaf)
        leaf = cost.clamp(max=1).requires_grad_()
        check("sparse_ot_router", tilewise.sparse_ot_router(leaf, k, steps=3).weights, leaf)


def long_columns(device: str):
    """Of which a block reads a part, and rows in shared memory, or what matters of them."""
    for size, k in ((1500, 40), (25000, 40), (25000, 13000)):
        logits = torch.randn(size, 2, device=device)
        leaf = logits.mT.contiguous().requires_grad_()
        check("simplex_topk", tilewise.simplex_topk(leaf, k).square(), leaf)
        check("sparse_ot_router", tilewise.sparse_ot_router(logits.requires_grad_(), k, steps=2).weights, logits)


def sampled(n: int, m: int, features: int, dtype: torch.dtype, device: str):
    """Every method, one place to all, dense and strided rows; norms given and recorded; products in batches."""
    table, ids = torch.zeros(3, n, device=device), torch.arange(2, device=device)
    for strided in (False, True):
        x = torch.randn(2, *((features, n) if strided else (n, features)), device=device).to(dtype)
        x = x.mT if strided else x
        pairs = torch.randn(2, features, m, device=device).to(dtype)
        for k in {1, n, max(1, 2 * n // 3)}:
            for method in ("systematic", "wta", "crs"):
                options = {"k": k, "norms": torch.rand(2, n, device=device), "method": method, "record": (table, ids)}
                weight = torch.randn(m, features, device=device).to(dtype).requires_grad_()
                check("wta_crs_linear", tilewise.wta_crs_linear(x, weight, **options), weight)
                leaf = pairs.detach().requires_grad_()
                product = tilewise.wta_crs_matmul(x, leaf, k=min(k, features), method=method)
                check("wta_crs_matmul", product, leaf)
    tilewise.wta_crs_sample(x.detach(), k=k, seed=3)
    seed = torch.tensor([3], device=device)
    torch.ops.tilewise.wta_crs_linear(x, weight.detach(), None, k=k, seed=seed)
    torch.ops.tilewise.wta_crs_matmul(x, pairs, k=1, seed=seed)


def out_of_range(device: str):
    """Labels far outside the classes: NaN for their rows, no access, the other rows untouched."""
    target = torch.tensor([0, 10**9, -7], device=device)
    for name, options in {"cross_entropy": {}, **SPHERICAL}.items():
        logits = logits_of((3, 33), torch.float32, device)
        loss = getattr(tilewise, name)(logits, target, reduction="none", **options)
        torch.autograd.grad(loss.sum(), logits)
        if loss.isnan().tolist() != [False, True, True]:
            raise SystemExit(f"{name}: labels out of range gave {loss.tolist()}")


def small_launches(device: str):
    """Every operator, at sizes of a few elements."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES[1:3]:
            cross_entropy(shape, dtype, device)
            spherical_family(shape, dtype, device)
        layers(5, 9, dtype, device)
        pairwise(5, 9, dtype, device)
        attention(7, 4, dtype, device)
        sampled(7, 4, 3, dtype, device)
    for sizes in ((3, 4, 2), (6, 5, 3)):
        transport(*sizes, device)
        sparse(*sizes, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cuda", choices=("cpu", "cuda", "triton"))
    backend = parser.parse_args().backend
    device = "cpu" if backend == "cpu" else "cuda"
    torch.manual_seed(0)
    with tilewise.backend(backend):
        for dtype, shapes in SHAPES_OF.items():
            for shape in shapes:
                cross_entropy(shape, dtype, device)
                spherical_family(shape, dtype, device)
            layers(9, 33, dtype, device)
            layers(70, 1500, dtype, device)
            pairwise(9, 33, dtype, device)
            pairwise(5, 1500, dtype, device)
            attention(70, 16, dtype, device)
            attention(35, 96, dtype, device)
            sampled(1, 1, 1, dtype, device)
            sampled(70, 40, 33, dtype, device)
            sampled(1500, 8, 16, dtype, device)
        for sizes in ((1, 1, 1), (3, 4, 2), (9, 17, 3), (33, 64, 3), (70, 130, 40)):
            transport(*sizes, device)
            sparse(*sizes, device)
        long_columns(device)
        if device == "cuda":
            out_of_range(device)
            torch.cuda.synchronize()
    print(f"{backend}: {sum(map(len, SHAPES_OF.values()))} shapes and types, all finite")


if __name__ == "__main__":
    main()
