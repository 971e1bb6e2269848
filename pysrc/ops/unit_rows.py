"""unit_rows: what every cosine is taken of."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise.formulas.rows import statistics_dtype


def unit_rows(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) over the last dimension, in float32 or better. A row whose squares might overflow is first
    multiplied by a power of two, which rounds nothing."""
    x = x.to(statistics_dtype(x))
    if x.shape[-1] == 0:
        return x
    overflow = 512 if x.dtype == torch.float64 else 64  # the exponent from which squares do
    norm = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)  # inf where squares do
    scale = torch.ones_like(norm).masked_fill(norm > 2.0 ** (overflow - 14), 2.0 ** -(overflow + 24))
    return F.normalize(x * scale, dim=-1)
