"""torch.utils.flop_counter counts the products that operators form."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import tilewise

N, V, D = 8, 32, 16
LABELS = torch.arange(N) // 2


def counted(function, *shapes, backward: bool = True) -> int:
    torch.manual_seed(0)
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    with FlopCounterMode(display=False) as counter:
        loss = function(*tensors)
        if backward:
            loss.sum().backward()
    return counter.get_total_flops()


def test_a_linear_layer_with_its_loss_is_three_products():
    def ours(x, w):
        return tilewise.linear_cross_entropy(x, w, LABELS)

    def eager(x, w):
        return F.cross_entropy(F.linear(x, w), LABELS)

    assert counted(ours, (N, D), (V, D)) == counted(eager, (N, D), (V, D)) == 6 * N * V * D
    rows = counted(lambda x, w: tilewise.linear_cross_entropy(x, w, LABELS, reduction="none"), (N, D), (V, D))
    assert rows == 8 * N * V * D  # the logits a second time
    with torch.no_grad():
        assert counted(ours, (N, D), (V, D), backward=False) == 2 * N * V * D


@pytest.mark.parametrize("loss", [tilewise.supcon, tilewise.multi_similarity_loss])
def test_pairs(loss):
    same = counted(lambda x: loss(x, LABELS), (N, D))
    between = counted(lambda x, y: loss(x, LABELS, ref_embeddings=y, ref_labels=LABELS), (N, D), (N, D))
    assert same == between == 6 * N * N * D


def test_both_directions_of_clip_loss_share_their_similarities():
    """One product forward, three backward; two where one side is frozen."""
    loss = tilewise.clip_loss
    assert counted(lambda x, y: loss(x, y, 2.0), (N, D), (N, D)) == 4 * 2 * N * N * D
    assert counted(lambda x, y: loss(x, y, 2.0), (N, D), (N, D), backward=False) == 2 * N * N * D
    text, scale = torch.randn(N, D), torch.ones((), requires_grad=True)
    assert counted(lambda x: loss(x, text, scale), (N, D)) == 3 * 2 * N * N * D


def test_guided_pairs():
    guide = torch.randn(N, 4)
    guided = counted(lambda x, y: tilewise.info_nce(x, y, guide_query=guide, guide_key=guide), (N, D), (N, D))
    assert guided == 6 * N * N * D + 2 * N * N * 4


def test_attention_is_linear_in_the_tokens():
    b, h, n, d, dv = 2, 4, 64, 16, 8
    shapes = (b, h, n, d), (b, h, n, d), (b, h, n, dv)
    assert counted(tilewise.mala, *shapes, backward=False) == 2 * 2 * b * h * n * d * dv
    assert counted(tilewise.mala, *shapes) == 3 * 2 * 2 * b * h * n * d * dv


def test_a_sampled_layer_saves_of_one_product():
    k = 2
    sampled = counted(lambda x, w: tilewise.wta_crs_linear(x, w, k=k, seed=1), (N, D), (V, D))
    assert sampled == 4 * N * V * D + 2 * k * V * D


def test_a_loss_without_logits_has_products_of_the_width_alone():
    flops = counted(lambda x, w: tilewise.linear_z_loss(x, w, LABELS, a=1.0, b=0.0), (N, D), (V, D))
    assert flops == 2 * D * D * ((N + V) + N + (N + V))
