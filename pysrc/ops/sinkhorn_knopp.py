"""sinkhorn_knopp: balanced assignments of samples to prototypes or experts."""

import torch
import torch.distributed as dist
from torch import Tensor

from tilewise.formulas.rows import statistics_dtype
from tilewise.ops import register, rows

OP = "sinkhorn_knopp"
_solve = register.operator("sinkhorn")


@torch.no_grad()
def sinkhorn_knopp(
    logits: Tensor, *, n_iter: int = 3, epsilon: float = 0.05, process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Soft assignments of samples to prototypes (or of tokens to experts) that use all of them alike.

    ``exp(logits / epsilon)``, whose columns are brought to equal sums and then its rows to 1, n_iter times. There is no
    gradient: assignments are targets. The exponentials never overflow.

    From "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (Caron et al., 2020).

    Args:
        logits: (N, K) scores of N samples for K prototypes, float64 (on a CPU), float32, bfloat16 or float16.
        n_iter: at least 1.
        epsilon: > 0, in units of the logits.
        process_group: samples are spread over the ranks of this group, which sum their columns in every iteration; each
            has its own (N, K), of any N. None: this process alone.

    Returns:
        (N, K) in float32 or better: rows sum to 1, columns nearly to N / K (over all ranks).

    Raises:
        ValueError: a shape or an option is not as above.
        TypeError: a dtype is not as above.

    Example:
        >>> import torch, tilewise
        >>> tilewise.sinkhorn_knopp(torch.randn(64, 8), n_iter=20, epsilon=1.0).sum(0).round().tolist()
        [8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    """
    rows.check_matrix(OP, "logits", logits)
    rows.check_floating(OP, "logits", logits)
    if 0 in logits.shape and (process_group is None or logits.shape[1] == 0):
        raise ValueError(f"tilewise.{OP}: expected logits to have rows and columns, got shape {tuple(logits.shape)}")
    epsilon = rows.check_positive(OP, "epsilon", epsilon, statistics_dtype(logits))
    rows.check_integer(OP, "n_iter", n_iter)
    logits = logits.to(statistics_dtype(logits))
    if process_group is not None:
        return _over_ranks(logits, n_iter, epsilon, process_group)
    logits = logits - logits.amax()  # what all have in common would cost digits
    # The columns first, as if all rows had the same potential; then whole iterations of rows and columns.
    g = -epsilon * torch.logsumexp(logits / epsilon, 0)
    if n_iter > 1:
        n, k = logits.shape
        a, b = (logits.new_full((1, size), 1 / size) for size in (n, k))
        _, g, *_ = _solve(
            -logits[None], a, b, logits.new_full((1,), epsilon), None, g[None], max_iter=n_iter - 1, tol=-1.0
        )
        g = g[0]
    return torch.softmax((logits + g) / epsilon, 1)


def _over_ranks(logits: Tensor, n_iter: int, epsilon: float, group: dist.ProcessGroup) -> Tensor:
    common = logits.amax() if len(logits) else logits.new_full((), -torch.inf)
    dist.all_reduce(common, dist.ReduceOp.MAX, group)
    scores = (logits - common) / epsilon
    f = torch.zeros_like(scores[:, 0])
    g = scores.new_zeros(scores.shape[1])
    for _ in range(n_iter):
        columns = scores + f[:, None]
        top = columns.amax(0) if len(columns) else torch.full_like(g, -torch.inf)
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
        sums = torch.exp(columns - top).sum(0)
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        g = -(top + sums.log())
        f = -torch.logsumexp(scores + g, 1)
    return torch.softmax(scores + g, 1)
