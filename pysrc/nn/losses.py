"""Loss modules over rows of logits."""

from torch import Tensor, nn

from tilewise.ops.cross_entropy import CrossEntropyStats, cross_entropy
from tilewise.ops.z_loss import spherical_softmax_loss, taylor_softmax_loss, z_loss


class LossModule(nn.Module):
    """Holds a loss function's keyword options: attributes, of which parameters, tensors (as buffers) and modules are
    registered as a module's always are."""

    def __init__(self, **options):
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    @property
    def options(self) -> dict:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        shown = {name: value for name, value in self.options.items() if not isinstance(value, (Tensor, nn.Module))}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class CrossEntropyLoss(LossModule):
    """:func:`tilewise.cross_entropy` with fixed options; drop-in for :class:`torch.nn.CrossEntropyLoss` on 2-D logits.

    Args:
        weight: (V,) class weights, kept as a buffer.
        **options: keyword options of :func:`tilewise.cross_entropy` other than ``row_weight``.
    """

    def __init__(self, weight: Tensor | None = None, **options):
        super().__init__(**options)
        self.register_buffer("weight", weight)

    def forward(
        self, logits: Tensor, target: Tensor, row_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, CrossEntropyStats]:
        return cross_entropy(logits, target, self.weight, row_weight=row_weight, **self.options)


class ZLoss(LossModule):
    """:func:`tilewise.z_loss`; a and b are tuned per task, the defaults are the authors'."""

    def __init__(self, a: float = 1.0, b: float = 0.0, *, ignore_index: int = -100, reduction: str = "mean"):
        super().__init__(a=a, b=b, ignore_index=ignore_index, reduction=reduction)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return z_loss(logits, target, **self.options)


class TaylorSoftmaxLoss(LossModule):
    """:func:`tilewise.taylor_softmax_loss`."""

    def __init__(self, *, ignore_index: int = -100, reduction: str = "mean"):
        super().__init__(ignore_index=ignore_index, reduction=reduction)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return taylor_softmax_loss(logits, target, **self.options)


class SphericalSoftmaxLoss(LossModule):
    """:func:`tilewise.spherical_softmax_loss`."""

    def __init__(self, *, eps: float = 1e-6, ignore_index: int = -100, reduction: str = "mean"):
        super().__init__(eps=eps, ignore_index=ignore_index, reduction=reduction)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return spherical_softmax_loss(logits, target, **self.options)
