"""The operators of sampled products: norms of rows, a sample of them, and the rows of a sample."""

import torch

from tilewise.ops import derivatives, register

row_norms, sample_rows, gather_rows = map(register.operator, ("wta_crs_norms", "wta_crs_sample", "wta_crs_gather"))


@register.fake("wta_crs_norms")
def _norms_fake(x):
    return x.new_empty(x.shape[:2], dtype=torch.float32)


@register.fake("wta_crs_sample")
def _sample_fake(x_norms, norms, seed, *, k, **options):
    places = x_norms.shape[0], k
    return x_norms.new_empty(places, dtype=torch.int32), x_norms.new_empty(places)


@register.fake("wta_crs_gather")
def _gather_fake(x, indices, scales):
    return x.new_empty(x.shape[0], indices.shape[1], x.shape[2])


def _keep_places(ctx, inputs, options, output):
    x, indices, scales = inputs
    ctx.save_for_backward(indices, scales)
    ctx.rows = x.shape[1]


def _scatter(ctx, grad):
    indices, scales = ctx.saved_tensors
    if scales is not None:
        grad = (grad * scales[:, :, None]).to(grad.dtype)
    zeros = grad.new_zeros(grad.shape[0], ctx.rows, grad.shape[2])
    return zeros.scatter_add(1, indices.long()[:, :, None].expand_as(grad), grad), None, None


register.autograd("wta_crs_gather", _scatter, _keep_places, jvp=lambda ctx, x, *_: gather_rows(x, *ctx.saved_tensors))
derivatives.refuse_derivative("wta_crs_norms", "expected no gradient: the sample is a constant")
derivatives.refuse_derivative("wta_crs_sample", "expected no gradient: the sample is a constant")
