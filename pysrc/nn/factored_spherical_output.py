"""An output layer with a loss of the spherical family whose exact SGD step does not depend on the number of classes."""

import torch
from torch import Tensor, nn

from tilewise.formulas.spherical import OF_STATISTICS
from tilewise.ops import rows
from tilewise.ops.logits_free import CHUNK, slices, sum_of_class

NAME = "FactoredSphericalOutput"


class FactoredSphericalOutput(nn.Module):
    r"""Output layer and loss in one: the logits are ``hidden @ W.T``, trained by its own exact SGD step.

    W (D, d) is held as ``v @ u + omega``, v (D, d), u (d, d), omega (d,) added to every row. The loss of a batch of m
    rows needs only ``W.T @ W``, the sum of the rows of W and the rows of the target classes; and the SGD update of W,
    dense as it is, changes u, omega and these rows of v. So forward, backward and :meth:`step` cost
    O(d**3 + m d**2), whatever D is. The result equals plain SGD on W, to rounding. The layer is used as

        loss = layer(hidden, target);  loss.backward();  optimizer.step();  layer.step(lr)

    where the optimizer trains everything below. v, u and omega are buffers, not parameters, because no optimizer can
    update the dense W through them: momentum and Adam need :func:`tilewise.linear_z_loss` and its dense weight.

    Args:
        in_features: d, the size of hidden.
        num_classes: D.
        kind: the loss: "z" (:func:`tilewise.z_loss`), "taylor" (:func:`tilewise.taylor_softmax_loss`), "spherical"
            (:func:`tilewise.spherical_softmax_loss`) or "mse", the logits' squared distance to the one-hot target.
        a, b: options of "z"; the defaults are the authors'.
        eps: option of "spherical".
        weight_decay: at least 0; a step adds ``weight_decay * W`` to the gradient, as :class:`torch.optim.SGD` does.
        stabilize_every: after so many steps singular values of u outside [1/2, 2] are set to 1, v taking what they
            held, and the inverse of u is computed anew. Only this costs O(D d) for such a value, and O(D d**2) when
            they are more than a third of d.
        device, dtype: of the buffers; float32 or float64.

    Reference: Vincent, de Brebisson, Bouthillier, *Efficient Exact Gradient Update for training Deep Networks with
    Very Large Sparse Targets*, NeurIPS 2015, arXiv 1412.7091; de Brebisson, Vincent, *The Z-loss*, arXiv 1604.08859.

    Example:
        >>> import torch, tilewise
        >>> layer = tilewise.nn.FactoredSphericalOutput.from_dense(torch.eye(3), kind="mse")
        >>> loss = layer(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([0]))
        >>> loss.backward()
        >>> layer.step(lr=0.5)
        >>> loss.item(), layer(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([0])).item()
        (1.0, 1.0)
        >>> layer.dense_weight()[1]
        tensor([-1.,  0.,  0.])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        kind: str = "z",
        a: float = 1.0,
        b: float = 0.0,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        stabilize_every: int = 10,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if kind not in OF_STATISTICS:
            raise ValueError(f"tilewise.{NAME}: expected kind to be {', '.join(OF_STATISTICS)}, got {kind!r}")
        for name, value in {
            "in_features": in_features,
            "num_classes": num_classes,
            "stabilize_every": stabilize_every,
        }.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"tilewise.{NAME}: expected {name} to be a positive integer, got {value!r}")
        dtype = dtype or torch.get_default_dtype()
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"tilewise.{NAME}: expected dtype to be float32 or float64, got {dtype}")
        self.in_features, self.num_classes, self.kind = in_features, num_classes, kind
        a, b = rows.check_positive(NAME, "a", a), rows.check_number(NAME, "b", b)
        eps = rows.check_positive(NAME, "eps", eps)
        self.options = {"z": (a, b), "spherical": (eps,)}.get(kind, ())
        self.weight_decay = rows.check_number(NAME, "weight_decay", weight_decay, low=0)
        self.stabilize_every = stabilize_every
        self.updates = 0
        self._batch: tuple[Tensor, ...] | None = None  # of the last backward: hidden, target, gc, gq, gs
        self._awaits_backward = False

        bound = in_features**-0.5
        v = torch.empty(num_classes, in_features, device=device, dtype=dtype).uniform_(-bound, bound)
        self.register_buffer("v", v)
        self.register_buffer("u", torch.eye(in_features, device=device, dtype=dtype))
        self.register_buffer("omega", v.new_zeros(in_features))
        for name in ("u_inverse", "gram", "row_sum"):  # follow from the three above
            self.register_buffer(name, None, persistent=False)
        self._derive()

    @classmethod
    def from_dense(cls, weight: Tensor, **options) -> "FactoredSphericalOutput":
        """A layer with the weight (D, d), float32 or float64, and the options of the class."""
        rows.check_matrix(NAME, "weight", weight)
        layer = cls(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype, **options)
        layer.v.copy_(weight.detach())
        layer._derive()
        return layer

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """The mean loss of hidden (m, d), taken in the type of the layer, and class indices target (m,); 0 for m = 0.

        Under ``torch.no_grad`` it only evaluates; otherwise :meth:`step` expects its backward. On the CPU a class index
        out of range is a RuntimeError, on a GPU the loss is NaN.
        """
        self._check_hidden(hidden)
        target = rows.check_class_index(NAME, target, hidden, "hidden")
        hidden = hidden.to(self.v.dtype)
        if torch.is_grad_enabled():
            self._batch, self._awaits_backward = None, True
            if not hidden.requires_grad:  # the layer learns even where nothing below it does
                hidden = hidden.detach().requires_grad_()
        return _Loss.apply(hidden, target, self)

    @torch.no_grad()
    def step(self, lr: float, **options) -> None:
        """Applies ``W -= lr * (dL/dW + weight_decay * W)`` for the batch and upstream factor of the last backward."""
        if options:
            raise TypeError(
                f"tilewise.{NAME}: expected step to be given lr alone, got {', '.join(options)}: only plain SGD has an "
                "exact factored update; momentum and Adam need the dense weight of tilewise.linear_z_loss"
            )
        lr = rows.check_number(NAME, "lr", lr, low=0)
        if self._batch is None:
            state = "the last forward had none" if self._awaits_backward else "there was none since the last step"
            raise RuntimeError(f"tilewise.{NAME}: expected step to follow a backward, but {state}")
        with torch.autocast(self.v.device.type, enabled=False):
            self._update(lr, *self._batch)
            self._batch = None
            self.updates += 1
            if self.updates % self.stabilize_every == 0:
                self._stabilize()

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """W (D, d), a copy."""
        with torch.autocast(self.v.device.type, enabled=False):
            return torch.addmm(self.omega, self.v, self.u)

    @torch.no_grad()
    def predict(self, hidden: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """The topk largest logits of each row of hidden (m, d) and their classes, both (m, topk), largest first.

        Classes are scored in chunks: no (m, D) matrix is held.
        """
        self._check_hidden(hidden)
        if not isinstance(topk, int) or not 1 <= topk <= self.num_classes:
            raise ValueError(f"tilewise.{NAME}: expected topk to be in [1, {self.num_classes}], got {topk!r}")
        with torch.autocast(self.v.device.type, enabled=False):
            hidden = hidden.to(self.v.dtype)
            projected, shift = hidden @ self.u.t(), (hidden @ self.omega)[:, None]
            scores = hidden.new_empty(len(hidden), 0)
            classes = scores.to(torch.int64)
            size = max(topk, CHUNK // max(len(hidden), 1))
            for start in range(0, self.num_classes, size):
                chunk = projected @ self.v[start : start + size].t()
                numbers = torch.arange(start, start + chunk.shape[1], device=chunk.device)
                scores = torch.cat([scores, chunk], 1)
                classes = torch.cat([classes, numbers.expand_as(chunk)], 1)
                scores, best = scores.topk(min(topk, scores.shape[1]))
                classes = classes.gather(1, best)
            return scores + shift, classes

    def get_extra_state(self) -> dict[str, int]:
        return {"updates": self.updates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Called after the buffers are loaded."""
        self.updates = state["updates"]
        self._batch, self._awaits_backward = None, False
        self._derive()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}, kind={self.kind!r}"

    def _check_hidden(self, hidden: Tensor) -> None:
        rows.check_matrix(NAME, "hidden", hidden)
        if hidden.shape[1] != self.in_features:
            raise ValueError(
                f"tilewise.{NAME}: expected hidden to have {self.in_features} columns, got shape {tuple(hidden.shape)}"
            )
        rows.check_device(NAME, "hidden", hidden, self.v, "the layer")

    def _weight_rows(self, select) -> Tensor:
        return torch.addmm(self.omega, self.v[select], self.u)

    @torch.no_grad()
    def _derive(self) -> None:
        with torch.autocast(self.v.device.type, enabled=False):
            self.u_inverse = torch.linalg.inv(self.u)
            self.gram = torch.zeros_like(self.u)
            self.row_sum = torch.zeros_like(self.omega)
            for part in slices(self.v):
                weight = self._weight_rows(part)
                self.gram.addmm_(weight.t(), weight)
                self.row_sum += weight.sum(0)

    def _update(self, lr: float, hidden: Tensor, target: Tensor, gc: Tensor, gq: Tensor, gs: Tensor) -> None:
        """W <- W (I - A) - lr (1 t^T + R), A holding the gradient in q and the decay, R the rows of target classes."""
        pull = gc[:, None] * hidden
        t, r = torch.mv(hidden.t(), gs), pull.sum(0)
        a = torch.mm(hidden.t() * (2 * lr * gq), hidden)
        a.diagonal().add_(lr * self.weight_decay)
        b = torch.eye(len(a), device=a.device, dtype=a.dtype) - a
        u_inverse = torch.linalg.solve(b, self.u_inverse)  # a singular b raises before anything is changed

        # (1 t^T + R)^T W of the old W, and R^T R with the rows of a class summed first.
        cross = torch.addr(torch.mm(pull.t(), self._weight_rows(target)), t, self.row_sum)
        r_r = torch.mm(pull.t(), sum_of_class(pull, target))
        # Increments rather than products: those lose two digits of float32 over thousands of steps.
        a_gram = torch.mm(a, self.gram)
        moved = torch.mm(cross, b)
        self.gram += torch.mm(a_gram, a) - a_gram - a_gram.t() - lr * (moved + moved.t())
        t_r = torch.outer(t, r)
        self.gram += lr**2 * (self.num_classes * torch.outer(t, t) + t_r + t_r.t() + r_r)
        self.row_sum -= torch.mv(a, self.row_sum) + lr * (self.num_classes * t + r)
        self.omega -= torch.mv(a, self.omega) + lr * t
        self.u -= torch.mm(self.u, a)
        self.u_inverse = u_inverse
        self.v.index_add_(0, target, torch.mm(pull, u_inverse), alpha=-lr)

    def _stabilize(self) -> None:
        left, values, _ = torch.linalg.svd(self.u)
        drifted = (values < 0.5) | (values > 2)
        count = int(drifted.sum())
        if 3 * count > len(values):
            for part in slices(self.v):
                self.v[part] = self._weight_rows(part)
            self.u.copy_(torch.eye(len(values)))
            self.omega.zero_()
        elif count:
            left, values = left[:, drifted], values[drifted]
            # u is multiplied by I + left diag(alpha) left^T, which sets the values to 1, and v by its inverse.
            self.u += left * (1 / values - 1) @ (left.t() @ self.u)
            for part in slices(self.v):
                self.v[part].addmm_((self.v[part] @ left) * (values - 1), left.t())
        # Never only updated: the error of an inverse carried along grows without bound.
        self.u_inverse = torch.linalg.inv(self.u)


class _Loss(torch.autograd.Function):
    """The mean loss; its backward hands the coefficients of the batch, times the upstream factor, to the layer."""

    @staticmethod
    def forward(ctx, hidden: Tensor, target: Tensor, layer: FactoredSphericalOutput) -> Tensor:
        of_statistics, coefficients = OF_STATISTICS[layer.kind]
        outside = (target < 0) | (target >= layer.num_classes)
        if not target.is_cuda and outside.any():
            i = int(outside.nonzero()[0])
            expected = f"expected target[{i}] in [0, {layer.num_classes})"
            raise RuntimeError(f"tilewise.{NAME}: {expected}, got {int(target[i])}")
        index = target.masked_fill(outside, 0)
        with torch.autocast(hidden.device.type, enabled=False):
            classes, share = layer.num_classes, 1 / max(len(hidden), 1)
            weight_rows, mapped = layer._weight_rows(index), torch.mm(hidden, layer.gram)
            mu = torch.mv(hidden, layer.row_sum) / classes
            m2 = ((hidden * mapped).sum(1) - classes * mu.square()).clamp(min=0)
            statistics = (hidden * weight_rows).sum(1), mu, m2, classes, *layer.options
            loss = of_statistics(*statistics).masked_fill(outside, torch.nan).sum() * share
            gamma, slope, kappa = share * torch.stack(coefficients(*statistics)).masked_fill(outside, torch.nan)
            gc, gq, gs = gamma, slope / 2, kappa - slope * mu
            d_hidden = 2 * gq[:, None] * mapped + gc[:, None] * weight_rows + torch.outer(gs, layer.row_sum)
        ctx.save_for_backward(hidden, index, gc, gq, gs, d_hidden)
        ctx.layer, ctx.updates = layer, layer.updates
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        hidden, index, gc, gq, gs, d_hidden = ctx.saved_tensors
        if ctx.updates != ctx.layer.updates:
            raise RuntimeError(f"tilewise.{NAME}: expected backward before step, got a loss of an earlier weight")
        # A copy: hidden may itself be a parameter that an optimizer changes before step.
        ctx.layer._batch = (hidden.detach().clone(), index, gc * grad_loss, gq * grad_loss, gs * grad_loss)
        ctx.layer._awaits_backward = False
        return d_hidden * grad_loss, None, None
