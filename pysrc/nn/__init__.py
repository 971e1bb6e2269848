"""Modules of the same meaning as the functions."""

from tilewise.nn.factored_spherical_output import FactoredSphericalOutput
from tilewise.nn.losses import CrossEntropyLoss, SphericalSoftmaxLoss, TaylorSoftmaxLoss, ZLoss

__all__ = ["CrossEntropyLoss", "FactoredSphericalOutput", "SphericalSoftmaxLoss", "TaylorSoftmaxLoss", "ZLoss"]
