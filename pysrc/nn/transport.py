"""Modules of what is made of optimal transport between sets of points."""

from dataclasses import replace

import torch
from torch import Tensor

from tilewise.nn.losses import LossModule
from tilewise.ops import rows
from tilewise.ops.sinkhorn_divergence import divergence, monge_gap, sinkhorn_divergence, solved
from tilewise.ops.sinkhorn_points import prepared
from tilewise.ops.transport import TransportLoss, finished

OP = "nn.SamplesLoss"


class SinkhornDivergence(LossModule):
    """:func:`tilewise.sinkhorn_divergence` with fixed options."""

    def forward(self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor | TransportLoss:
        return sinkhorn_divergence(x, y, a, b, **self.options)


class MongeGap(LossModule):
    """:func:`tilewise.monge_gap` with fixed options."""

    def forward(self, x: Tensor, tx: Tensor) -> Tensor | TransportLoss:
        return monge_gap(x, tx, **self.options)


class SamplesLoss(LossModule):
    """Sinkhorn divergence in the scaling of geomloss; drop-in for ``geomloss.SamplesLoss("sinkhorn")``.

    Costs are d (p = 1) or d^2 / 2 (p = 2) for distances d, epsilon is blur^p and the penalty of the marginals reach^p.
    Where geomloss takes one iteration for each epsilon, this takes as many as the marginals ask for, of all of them and
    of the last above all, so that the loss does not depend on ``scaling``; for a small blur it is the cost of exact
    transport.

    Args:
        loss: ``"sinkhorn"``.
        p: 1 or 2.
        blur: > 0, in units of the points.
        reach: > 0, or None: marginals are constraints.
        diameter: of both sets together, where epsilon begins to fall; None measures their bounding box.
        scaling: in (0, 1), by which the blur is multiplied when a problem is settled.
        debias: False leaves V(x, y), which is not 0 for equal sets.
        potentials: return the potentials (f, g), without gradient, in place of the loss.
        max_iter: of iterations.
        tol: of the marginals' relative error, which ends the iterations.
        return_result: return a :class:`~tilewise.TransportLoss`; without, a loss on a CPU that has not converged is a
            warning, as of :func:`tilewise.sinkhorn_divergence`.
        truncate, cost, kernel, cluster_scale, verbose, backend: of geomloss's implementations. None of them changes
            the loss, but a cost or a kernel of one's own, which are refused.

    Raises:
        ValueError: another loss or p, or a cost or kernel of one's own.
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: int = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost=None,
        kernel=None,
        cluster_scale: float | None = None,
        debias: bool = True,
        potentials: bool = False,
        verbose: bool = False,
        backend: str = "auto",
        *,
        max_iter: int = 1000,
        tol: float = 1e-3,
        return_result: bool = False,
    ):
        if loss != "sinkhorn":
            raise ValueError(f"tilewise.{OP}: expected loss to be 'sinkhorn', got {loss!r}")
        if p not in (1, 2):
            raise ValueError(f"tilewise.{OP}: expected p to be 1 or 2, got {p!r}")
        if cost is not None or kernel is not None:
            raise ValueError(f"tilewise.{OP}: expected no cost and no kernel of one's own: p says which there is")
        blur = rows.check_positive(OP, "blur", blur)
        reach, diameter = (
            None if value is None else rows.check_positive(OP, name, value)
            for name, value in (("reach", reach), ("diameter", diameter))
        )
        super().__init__(p=p, blur=blur, reach=reach, diameter=diameter, scaling=scaling, debias=debias)
        self.potentials, self.max_iter, self.tol, self.return_result = potentials, max_iter, tol, return_result

    def forward(self, *args: Tensor) -> Tensor | TransportLoss | tuple[Tensor, Tensor]:
        """(x, y), or (a, x, b, y) with weights; points (N, D) or (B, N, D), weights of their shape without D."""
        if len(args) not in (2, 4):
            raise ValueError(f"tilewise.{OP}: expected (x, y) or (a, x, b, y), got {len(args)} arguments")
        (x, y), (a, b) = (args, (None, None)) if len(args) == 2 else (args[1::2], args[::2])
        a, b = (
            w.squeeze(-1) if isinstance(w, Tensor) and isinstance(p, Tensor) and w.dim() == p.dim() else w
            for w, p in ((a, x), (b, y))
        )
        p, blur, reach, diameter, scaling, debias = self.options.values()
        unit = float(p)  # |x - y|^2 is 2 of geomloss's costs
        pair, problem, options = prepared(
            OP, x, y, a, b, epsilon=unit * blur**p, cost="sqeuclidean" if p == 2 else "euclidean",
            max_iter=self.max_iter, tol=self.tol, reg_marginal=None if reach is None else unit * reach**p,
            epsilon_scaling=scaling**p
        )  # fmt: skip
        if diameter is not None:
            options["start"] = torch.full_like(problem.epsilon, unit * diameter**p)
        if not self.potentials:
            loss = divergence(pair, problem, options, debias)
            return finished(OP, replace(loss, value=loss.value / unit), self.return_result)
        with torch.no_grad():
            (f, g), *own = _potentials(pair, problem, options, debias)
            if debias:
                f, g = f - own[0], g - own[1]
        return tuple((w / unit).reshape(*problem.batch, w.shape[1]) for w in (f, g))


def _potentials(pair, problem, options, debias: bool):
    """(f, g) of the problem, and with debias those of x and of y with themselves."""
    a, b, epsilon = problem.a, problem.b, problem.epsilon
    yield solved(pair.x, pair.y, a, b, epsilon, **options)[:2]
    for points, weights in ((pair.x, a), (pair.y, b)) if debias else ():
        f, g, *_ = solved(points, points, weights, weights, epsilon, **options, symmetric=True)
        yield (f + g) / 2
