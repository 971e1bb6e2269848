"""Modules of the same meaning as the functions."""

from tilewise.nn.losses import CrossEntropyLoss, SphericalSoftmaxLoss, TaylorSoftmaxLoss, ZLoss

__all__ = ["CrossEntropyLoss", "SphericalSoftmaxLoss", "TaylorSoftmaxLoss", "ZLoss"]
