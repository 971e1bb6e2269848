"""tilewise: training objectives computed tile by tile, never holding the big matrix."""

from tilewise import loading

loading.load_libraries()

from tilewise import nn, reference  # noqa: E402  (they register on the operators that were just loaded)
from tilewise.backend import backend, start  # noqa: E402
from tilewise.ops.cross_entropy import CrossEntropyStats, cross_entropy  # noqa: E402
from tilewise.ops.linear_cross_entropy import linear_cross_entropy  # noqa: E402
from tilewise.ops.linear_z_loss import (  # noqa: E402
    linear_spherical_softmax_loss,
    linear_taylor_softmax_loss,
    linear_z_loss,
)
from tilewise.ops.z_loss import spherical_softmax_loss, taylor_softmax_loss, z_loss  # noqa: E402
from tilewise.version import __version__  # noqa: E402

start()

__all__ = [
    "CrossEntropyStats",
    "__version__",
    "backend",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_spherical_softmax_loss",
    "linear_taylor_softmax_loss",
    "linear_z_loss",
    "nn",
    "reference",
    "spherical_softmax_loss",
    "taylor_softmax_loss",
    "z_loss",
]
