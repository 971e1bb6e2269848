"""The spherical family from the statistics of a row: the target logit o_c, the row's mean mu, its sum of squared
deviations m2 and the number of classes v. Whoever has these needs no logits."""

import torch
from torch import Tensor


def z_of_statistics(o_c, mu, m2, v, a, b) -> Tensor:
    z = torch.where(m2 == 0, 0, (o_c - mu) / (m2 / v).sqrt())
    return torch.nn.functional.softplus(a * (b - z), threshold=1e9) / a


def taylor_of_statistics(o_c, mu, m2, v) -> Tensor:
    return (v * (1 + mu + mu.square() / 2) + m2 / 2).log() - (1 + o_c + o_c.square() / 2).log()


def spherical_of_statistics(o_c, mu, m2, v, eps) -> Tensor:
    return (m2 + v * (mu.square() + eps)).log() - (o_c.square() + eps).log()


def mse_of_statistics(o_c, mu, m2, v) -> Tensor:
    """The squared distance to the one-hot target."""
    return m2 + v * mu.square() - 2 * o_c + 1


# Coefficients gamma, lambda, kappa of dL/do_k = kappa + lambda (o_k - mu) + gamma 1[k = c], from the same statistics.


def z_coefficients(o_c, mu, m2, v, a, b) -> tuple[Tensor, ...]:
    sd = (m2 / v).sqrt()
    z = (o_c - mu) / sd
    g = torch.sigmoid(a * (b - z))
    return tuple(torch.where(m2 == 0, 0, term) for term in (-g / sd, g * z / (v * sd**2), g / (sd * v)))


def taylor_coefficients(o_c, mu, m2, v) -> tuple[Tensor, ...]:
    total = v * (1 + mu + mu.square() / 2) + m2 / 2
    return -(1 + o_c) / (1 + o_c + o_c.square() / 2), 1 / total, (1 + mu) / total


def spherical_coefficients(o_c, mu, m2, v, eps) -> tuple[Tensor, ...]:
    total = m2 + v * (mu.square() + eps)
    return -2 * o_c / (o_c.square() + eps), 2 / total, 2 * mu / total


def mse_coefficients(o_c, mu, m2, v) -> tuple[Tensor, ...]:
    return torch.full_like(o_c, -2), torch.full_like(o_c, 2), 2 * mu


OF_STATISTICS = {
    "z": (z_of_statistics, z_coefficients),
    "taylor": (taylor_of_statistics, taylor_coefficients),
    "spherical": (spherical_of_statistics, spherical_coefficients),
    "mse": (mse_of_statistics, mse_coefficients),
}
