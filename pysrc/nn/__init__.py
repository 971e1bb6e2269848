"""Modules of the same meaning as the functions."""

from tilewise.nn.factored_spherical_output import FactoredSphericalOutput
from tilewise.nn.losses import CrossEntropyLoss, SphericalSoftmaxLoss, TaylorSoftmaxLoss, ZLoss
from tilewise.nn.mala import MALA, MALAttention, rotation_2d
from tilewise.nn.pairwise import (
    ClipLoss,
    InfoNCELoss,
    MultiSimilarityLoss,
    MultiSimilarityMiner,
    NTXentLoss,
    PairWeightedLoss,
    SigLipLoss,
    SupConLoss,
)
from tilewise.nn.sparse_transport import MixtureOfExperts, SparseOTRouter
from tilewise.nn.transport import MongeGap, SamplesLoss, SinkhornDivergence
from tilewise.nn.wta_crs import NormCache, SampledGroup, WTACRSLinear, convert_linear, restore_linear, set_sample_ids

__all__ = [
    "MALA",
    "ClipLoss",
    "CrossEntropyLoss",
    "FactoredSphericalOutput",
    "InfoNCELoss",
    "MALAttention",
    "MixtureOfExperts",
    "MongeGap",
    "MultiSimilarityLoss",
    "MultiSimilarityMiner",
    "NTXentLoss",
    "NormCache",
    "PairWeightedLoss",
    "SampledGroup",
    "SamplesLoss",
    "SigLipLoss",
    "SinkhornDivergence",
    "SparseOTRouter",
    "SphericalSoftmaxLoss",
    "SupConLoss",
    "TaylorSoftmaxLoss",
    "WTACRSLinear",
    "ZLoss",
    "convert_linear",
    "restore_linear",
    "rotation_2d",
    "set_sample_ids",
]
