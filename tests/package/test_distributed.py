"""Losses and assignments over 2 and 3 real processes (gloo) against one process with the whole batch, in float64."""

import copy
import inspect
import os
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import tilewise
from tilewise import distributed

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
ROWS, WIDTH = 6, 5


def inputs(world):
    torch.manual_seed(0)
    x, y = (torch.randn(world * ROWS, WIDTH, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 4, (world * ROWS,))
    labels[1] = 50  # without positives
    return x, y, labels


def losses(x, y, labels, two, module, **options):
    """Every loss, from `tilewise` or from `tilewise.distributed`."""
    return {
        "info_nce": lambda: module.info_nce(x, y, temperature=two[0], **options),
        "clip": lambda: module.clip_loss(x, y, two[0], **options),
        "siglip": lambda: module.siglip_loss(x, y, two[0], two[1], **options),
        "supcon": lambda: module.supcon(x, labels, temperature=two[0], **options),
        "multi_similarity": lambda: module.multi_similarity_loss(x, labels, **options),
        "multi_similarity of all": lambda: module.multi_similarity_loss(x, labels, epsilon=None, **options),
    }


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)


def compare(rank, world):
    x, y, labels = inputs(world)
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    for reduction in ("mean", "sum", "none"):
        whole = [t.clone().requires_grad_() for t in (x, y, torch.tensor([2.0, -1.0], dtype=torch.float64))]
        expected = losses(whole[0], whole[1], labels, whole[2], tilewise, reduction=reduction)
        for form in ("gather", "ring"):
            local = [x[own].clone(), y[own].clone(), torch.tensor([2.0, -1.0], dtype=torch.float64)]
            local = [t.requires_grad_() for t in local]
            options = {"reduction": reduction} | ({"form": form} if form == "ring" else {})
            for name, loss in losses(local[0], local[1], labels[own], local[2], distributed, **options).items():
                what = f"{name} {form} {reduction}"
                mine, truth = loss(), expected[name]()
                grads, exact = gradients(mine.sum(), local), gradients(truth.sum(), whole)
                if reduction == "none":
                    torch.testing.assert_close(mine, truth[own], rtol=1e-9, atol=1e-12, msg=what)
                else:
                    total = mine.detach().clone()
                    dist.all_reduce(total)
                    total = total / world if reduction == "mean" else total
                    torch.testing.assert_close(total, truth.detach(), rtol=1e-9, atol=1e-12, msg=what)
                shared = grads[2].clone()
                dist.all_reduce(shared)
                share = 1 / world if reduction == "mean" else 1.0
                pairs = [(grads[0], exact[0][own]), (grads[1], exact[1][own]), (shared, exact[2])]
                for found, want in pairs:
                    torch.testing.assert_close(found * share, want, rtol=1e-9, atol=1e-12, msg=what)


def train_with_ddp(rank, world):
    """Averaged gradients of a module are those of one process with the whole batch."""
    torch.manual_seed(1)
    module = torch.nn.Linear(WIDTH, 4).double()
    x, _, labels = inputs(world)
    tilewise.supcon(module(x), labels).backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    wrapped = DDP(module)
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    distributed.supcon(wrapped(x[own]), labels[own]).backward()
    torch.testing.assert_close([p.grad for p in module.parameters()], expected, rtol=1e-9, atol=1e-12)


def train_with_sampled_gradients(rank, world):
    """Ranks draw for their own rows: averaged gradients are the means of theirs, and caches stay apart."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    tilewise.nn.convert_linear(model, ratio=0.3, samples=4 * world)
    x = torch.randn(world, 4, 8)
    alone = copy.deepcopy(model)
    means = {}
    for other in range(world):
        torch.manual_seed(10 + other)
        tilewise.nn.set_sample_ids(alone, torch.arange(4 * other, 4 * other + 4))
        alone.zero_grad()
        alone(x[other]).square().mean().backward()
        for name, p in alone.named_parameters():
            means[name] = means.get(name, 0) + p.grad / world
    known = inspect.signature(DDP).parameters
    wrapped = DDP(model, **{next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in known): False})
    tilewise.nn.set_sample_ids(model, torch.arange(4 * rank, 4 * rank + 4))
    torch.manual_seed(10 + rank)
    wrapped(x[rank]).square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, means[name])
    seen = (model[0].cache.norms[:, 0] >= 0).nonzero()[:, 0]
    assert seen.tolist() == list(range(4 * rank, 4 * rank + 4))


def refuse_uneven(rank, world):
    x = torch.randn(3 + (rank == 1), WIDTH)
    labels = torch.zeros(len(x), dtype=torch.int64)
    for form in ("gather", "ring"):
        with pytest.raises(ValueError, match=r"the same number of rows, got \[3, 4"):
            distributed.supcon(x, labels, form=form)
    for uneven, message in [(x, r"gather_rows: .*the same number of rows, got \[3, 4"), (x[:3, rank:], "same size")]:
        with pytest.raises(ValueError, match=message):
            distributed.gather_rows(uneven)
    for options, message in [({"reduction": "mean_active"}, "'none', 'sum' or 'mean'"), ({"form": "tree"}, "'ring'")]:
        with pytest.raises(ValueError, match=message):
            distributed.supcon(x, labels, **options)


def assign(rank, world):
    """Ranks may have any number of samples, none too."""
    torch.manual_seed(2)
    logits = torch.randn(30, 5, dtype=torch.float64)
    sizes = [4, 26] if world == 2 else [12, 0, 18]
    expected = tilewise.sinkhorn_knopp(logits, n_iter=7, epsilon=0.1).split(sizes)[rank]
    found = tilewise.sinkhorn_knopp(logits.split(sizes)[rank], n_iter=7, epsilon=0.1, process_group=dist.group.WORLD)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def route(rank, world):
    """The tokens of all ranks together fill the experts, as in one process; a rank may have few of them."""
    torch.manual_seed(3)
    logits = torch.randn(30, 5, dtype=torch.float64)
    sizes = [4, 26] if world == 2 else [12, 1, 17] if world == 3 else [30]
    for capacity in (2, 7, 30):
        whole = tilewise.sparse_ot_router(logits, capacity, steps=9)
        own = logits.split(sizes)[rank].clone().requires_grad_()
        found = distributed.sparse_ot_router(own, capacity, steps=9)
        dense = torch.zeros(5, sizes[rank], dtype=torch.float64).scatter_add(1, found.indices, found.weights)
        expected = torch.zeros(5, 30, dtype=torch.float64).scatter_add(1, whole.indices, whole.weights)
        torch.testing.assert_close(dense, expected.split(sizes, 1)[rank], rtol=1e-9, atol=1e-12)
        load = found.load.clone()
        dist.all_reduce(load)
        assert torch.equal(load, whole.load) and torch.equal(found.load, (found.weights > 0).sum(1))
        (gradient,) = torch.autograd.grad(found.weights.square().sum(), own)
        assert gradient.abs().sum() > 0 or int(found.load.sum()) == 0
    with pytest.raises(ValueError, match="capacity to be at most 30, all tokens, got 31"):
        distributed.sparse_ot_router(own, 31)


def worker(rank, function, world, folder):
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        function(rank, world)
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)


FUNCTIONS = (compare, train_with_ddp, train_with_sampled_gradients, refuse_uneven, assign, route)


RUNS = [(compare, 2)] + [(function, 3) for function in FUNCTIONS]


@pytest.mark.parametrize("function, world", RUNS, ids=[f"{function.__name__}-{world}" for function, world in RUNS])
def test_processes(function, world, tmp_path):
    context = mp.get_context("spawn")
    processes = [context.Process(target=worker, args=(rank, function, world, tmp_path)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    failures = [file.read_text() for file in sorted(tmp_path.glob("*.txt"))]
    assert not failures, "\n".join(failures)
    assert [process.exitcode for process in processes] == [0] * world


def test_one_process(tmp_path):
    """Without company both forms are the plain loss."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        compare(0, 1)
        route(0, 1)
    finally:
        dist.destroy_process_group()
