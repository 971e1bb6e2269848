"""tilewise: training objectives computed tile by tile, never holding the big matrix."""

from tilewise import nn, reference, weighting
from tilewise.backend import backend, start
from tilewise.ops.clip_loss import clip_loss
from tilewise.ops.contrastive import info_nce, nt_xent, siglip_loss, supcon
from tilewise.ops.cross_entropy import CrossEntropyStats, cross_entropy
from tilewise.ops.linear_cross_entropy import linear_cross_entropy
from tilewise.ops.linear_z_loss import linear_spherical_softmax_loss, linear_taylor_softmax_loss, linear_z_loss
from tilewise.ops.mala import mala
from tilewise.ops.mining import batch_hard_mine, multi_similarity_mine, semihard_mine
from tilewise.ops.multi_similarity_loss import multi_similarity_loss
from tilewise.ops.pair_weighted_loss import pair_weighted_loss
from tilewise.ops.simplex_topk import simplex_topk
from tilewise.ops.sinkhorn import sinkhorn
from tilewise.ops.sinkhorn_divergence import monge_gap, sinkhorn_divergence
from tilewise.ops.sinkhorn_knopp import sinkhorn_knopp
from tilewise.ops.sinkhorn_points import sinkhorn_points
from tilewise.ops.sparse_ot import SparseOTResult, sparse_ot
from tilewise.ops.sparse_ot_points import sparse_ot_points
from tilewise.ops.sparse_ot_router import Routing, sparse_ot_router
from tilewise.ops.transport import SinkhornResult, TransportLoss
from tilewise.ops.wta_crs import RowSample, wta_crs_linear, wta_crs_matmul, wta_crs_sample
from tilewise.ops.z_loss import spherical_softmax_loss, taylor_softmax_loss, z_loss
from tilewise.version import __version__

start()

__all__ = [
    "CrossEntropyStats",
    "Routing",
    "RowSample",
    "SinkhornResult",
    "SparseOTResult",
    "TransportLoss",
    "__version__",
    "backend",
    "batch_hard_mine",
    "clip_loss",
    "cross_entropy",
    "info_nce",
    "linear_cross_entropy",
    "linear_spherical_softmax_loss",
    "linear_taylor_softmax_loss",
    "linear_z_loss",
    "mala",
    "monge_gap",
    "multi_similarity_loss",
    "multi_similarity_mine",
    "nn",
    "nt_xent",
    "pair_weighted_loss",
    "reference",
    "semihard_mine",
    "siglip_loss",
    "simplex_topk",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_knopp",
    "sinkhorn_points",
    "sparse_ot",
    "sparse_ot_points",
    "sparse_ot_router",
    "spherical_softmax_loss",
    "supcon",
    "taylor_softmax_loss",
    "weighting",
    "wta_crs_linear",
    "wta_crs_matmul",
    "wta_crs_sample",
    "z_loss",
]
