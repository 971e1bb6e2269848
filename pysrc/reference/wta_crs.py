"""Sampled column-row products (csrc/wta_crs/wta_crs.h has the formulas), with a sort where kernels count."""

import torch
from torch import Tensor

MIX_BITS = 16
_MASK = (1 << 64) - 1


def weight_bits(rows: int, k: int) -> int:
    return min(30, 60 - rows.bit_length() - k.bit_length())


def wta_crs_norms(x: Tensor) -> Tensor:
    return x.double().square().sum(2).sqrt().float()


def weights_of(x_norms: Tensor, norms: Tensor | None, k: int, mix: float) -> tuple[Tensor, Tensor]:
    """Integer weights (B, n), and whether all norms of a problem are finite and not negative (B,)."""
    size = x_norms.double() * (1 if norms is None else norms.double())
    usable = ((size >= 0) & (size < torch.inf)).all(1)
    size = torch.where(usable[:, None], size, 0)
    largest = size.amax(1, keepdim=True)
    units = torch.where(largest > 0, size / largest * 2.0 ** weight_bits(size.shape[1], k), 0).long()
    mean = units.sum(1, keepdim=True) // size.shape[1]
    share = int(mix * 2**MIX_BITS)
    return 1 + (mean * share >> MIX_BITS) + (units * (2**MIX_BITS - share) >> MIX_BITS), usable


def random_below(rest: int, seed: int, index: int) -> int:
    """SplitMix64."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    z ^= z >> 31
    return min(int((z >> 11) * 2.0**-53 * float(rest)), rest - 1)


def certain_rows(weights: Tensor, k: int) -> Tensor:
    """The c largest, where (1 - P_c) / (k - c) is least over c < k."""
    falling, order = weights.sort(descending=True, stable=True)
    n = len(weights)
    if k == n:
        return torch.ones(n, dtype=torch.bool, device=weights.device)
    rest = weights.sum() - torch.cat([falling.new_zeros(1), falling[: k - 1].cumsum(0)])
    left = k - torch.arange(k, device=weights.device)
    # A row goes in as long as it does not raise the quotient; afterwards none lowers it.
    enters = falling[:k] * left >= rest
    count = int(enters.long().cumprod(0).sum())
    chosen = torch.zeros(n, dtype=torch.bool, device=weights.device)
    chosen[order[:count]] = True
    return chosen


def sample_one(weights: Tensor, k: int, method: str, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    certain = certain_rows(weights, k) if method != "crs" else torch.zeros_like(weights, dtype=torch.bool)
    kept = certain.nonzero()[:, 0]
    left, tail = k - len(kept), torch.where(certain, 0, weights)
    rest, sums = int(tail.sum()), tail.cumsum(0)
    if method == "systematic" and left > 0:
        start = random_below(rest, seed, stream)
        points = [start + t * rest for t in range(left)]
        drawn = torch.searchsorted(sums * left, torch.tensor(points, device=weights.device), right=True)
    else:
        points = [random_below(rest, seed, stream + t) for t in range(left)]
        drawn = torch.searchsorted(sums, torch.tensor(points, dtype=torch.int64, device=weights.device), right=True)
    of_drawn = rest / (left * weights[drawn]).double()
    indices, scales = torch.cat([kept, drawn]), torch.cat([torch.ones(len(kept)).to(of_drawn), of_drawn])
    if method == "systematic":
        indices, order = indices.sort()
        scales = scales[order]
    return indices.int(), scales.float()


def wta_crs_sample(
    x_norms: Tensor, norms: Tensor | None, seed: Tensor, *, k: int, method: str = "systematic", mix: float = 0.05
) -> tuple[Tensor, Tensor]:
    weights, usable = weights_of(x_norms, norms, k, mix)
    samples = [sample_one(w, k, method, int(seed), problem * k) for problem, w in enumerate(weights)]
    if not samples:
        return x_norms.new_empty(0, k, dtype=torch.int32), x_norms.new_empty(0, k)
    indices, scales = (torch.stack(parts) for parts in zip(*samples, strict=True))
    return indices, torch.where(usable[:, None], scales, torch.nan)


def wta_crs_gather(x: Tensor, indices: Tensor, scales: Tensor | None = None) -> Tensor:
    rows = x.gather(1, indices.long()[:, :, None].expand(-1, -1, x.shape[2]))
    if scales is None:
        return rows.contiguous()
    return (rows.to(torch.promote_types(x.dtype, torch.float32)) * scales[:, :, None]).to(x.dtype)


OPS = {"wta_crs_norms": wta_crs_norms, "wta_crs_sample": wta_crs_sample, "wta_crs_gather": wta_crs_gather}
