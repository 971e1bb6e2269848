"""What the Monge gap teaches a network that is to carry one set of points to another.

python bench/headlines/monge_gap.py            # what `make headlines` does, about two minutes
python bench/headlines/monge_gap.py --quick    # tiny sizes, seconds; results go to a temporary folder

The claim (Uscidda and Cuturi 2023): a network trained to fit the target alone finds some map onto it; with the Monge
gap as a regulariser it finds one that pays the least. A disc is carried to a ring of eight spots in the plane, and the
colours of one photograph to those of another, by the same small network, with and without the gap.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import io
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the modules of bench/, not those of this folder

import plots
import results
from results import say

WIDTH, RATE, BATCH, STEPS = 64, 4e-3, 512, 1500
EPSILON, WEIGHT = 0.01, 1.0
SOLVER = {"epsilon": EPSILON, "tol": 1e-3, "max_iter": 100}
HELD, ARROWS = 1000, 120
CONTENDERS = {"fit alone": 0.0, "fit and Monge gap": WEIGHT}


def disc(count: int, generator: torch.Generator) -> Tensor:
    radius = 0.4 * torch.rand(count, generator=generator).sqrt()
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def ring(count: int, generator: torch.Generator) -> Tensor:
    angle = 2 * math.pi / 8 * torch.randint(8, (count,), generator=generator)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.06 * torch.randn(count, 2, generator=generator)


def photographs(width: int) -> list[Tensor]:
    """The two sample images of scikit-learn, (height, width, 3) in [0, 1]."""
    images = importlib.import_module("sklearn.datasets").load_sample_images().images
    pillow = importlib.import_module("PIL.Image")
    small = [pillow.fromarray(image).resize((width, width * image.shape[0] // image.shape[1])) for image in images]
    numpy = importlib.import_module("numpy")
    return [torch.from_numpy(numpy.array(image)).float() / 255 for image in small]


def picture(image: Tensor) -> str:
    """A JPEG as a data address."""
    pillow, file = importlib.import_module("PIL.Image"), io.BytesIO()
    pillow.fromarray((image.clamp(0, 1) * 255).round().byte().numpy()).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def network(features: int) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(features, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, features)
    return nn.Sequential(*layers)


def train(source, target, features: int, weight: float, steps: int, device: str) -> tuple[nn.Module, dict]:
    """A map and its losses over the steps; `source` and `target` draw batches from a generator."""
    tilewise = importlib.import_module("tilewise")
    model, generator = network(features).to(device), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    fits, gaps, began = [], [], time.perf_counter()
    for _ in range(steps):
        x, y = (draw(BATCH, generator).to(device) for draw in (source, target))
        moved = model(x)
        fit = tilewise.sinkhorn_divergence(moved, y, **SOLVER)
        with torch.set_grad_enabled(weight > 0):
            gap = tilewise.monge_gap(x, moved, **SOLVER)
        optimizer.zero_grad()
        (fit + weight * gap).backward()
        optimizer.step()
        schedule.step()
        fits.append(round(fit.item(), 6))
        gaps.append(round(gap.item(), 6))
    return model, {"fit": fits, "gap": gaps, "step_ms": 1e3 * (time.perf_counter() - began) / steps}


@torch.no_grad()
def judged(model: nn.Module, source, target, device: str) -> dict:
    """On held-out points: what is left to the target, and what the map pays against the least that any pays."""
    tilewise, generator = importlib.import_module("tilewise"), torch.Generator().manual_seed(2)
    x, y = (draw(HELD, generator).to(device) for draw in (source, target))
    moved = model(x)
    paid = (x - moved).square().sum(1).mean().item()
    costs = torch.cdist(x.double(), moved.double()).square().cpu()
    least = costs[importlib.import_module("scipy.optimize").linear_sum_assignment(costs.numpy())].mean().item()
    return {"divergence": tilewise.sinkhorn_divergence(moved, y, **SOLVER).item(), "paid": paid, "least": least}


def learn(source, target, features: int, steps: int, device: str, show) -> list[dict]:
    found = []
    for name, weight in CONTENDERS.items():
        model, losses = train(source, target, features, weight, steps, device)
        row = {"contender": name, "weight": weight} | losses | judged(model, source, target, device)
        with torch.no_grad():
            row["shown"] = show(model)
        found.append(row)
        say(
            f"  {name:18} divergence {row['divergence']:.4f}, pays {row['paid']:.4f} where {row['least']:.4f} would "
            f"do, {row['step_ms']:.0f} ms a step"
        )
    return found


def shape(steps: int, device: str) -> dict:
    say("a disc to a ring of spots")
    points = disc(ARROWS, torch.Generator().manual_seed(3))

    def arrows(model):
        return torch.cat([points, model(points.to(device)).cpu()], 1).tolist()

    return {"target": ring(400, torch.Generator().manual_seed(4)).tolist(), "rows": learn(
        disc, ring, 2, steps, device, arrows)}  # fmt: skip


def colours(steps: int, width: int, device: str) -> dict:
    say("the colours of a photograph to those of another")
    images = photographs(width)

    def draw_from(pixels: Tensor):
        return lambda count, generator: pixels[torch.randint(len(pixels), (count,), generator=generator)]

    draws = [draw_from(image.reshape(-1, 3)) for image in images]

    def recoloured(model):
        return picture(model(images[0].reshape(-1, 3).to(device)).cpu().reshape(images[0].shape))

    return {"images": [picture(image) for image in images], "rows": learn(*draws, 3, steps, device, recoloured)}


def losses_of(rows: list[dict], key: str, title: str) -> str:
    """Curves over the steps, of means over 10 steps each."""
    series = {
        row["contender"]: [sum(row[key][i : i + 10]) / len(row[key][i : i + 10]) for i in range(0, len(row[key]), 10)]
        for row in rows
    }
    kinds = {row["contender"]: "ours" if row["weight"] else "peer" for row in rows}
    swatches = {name: f"c{order}" for order, name in enumerate(series)}
    return f"<h5>{title}</h5>{plots.legend(swatches)}{plots.curves(title, 'tens of steps', series, kinds)}"


def judged_table(rows: list[dict]) -> str:
    body = [
        [
            row["contender"],
            f"{row['divergence']:.4f}",
            f"{row['paid']:.4f}",
            f"{row['least']:.4f}",
            f"{row['paid'] / row['least'] - 1:.0%}",
            f"{row['step_ms']:.0f}",
        ]
        for row in rows
    ]
    head = ["held-out points", "divergence from the target", "map pays", "least", "too much", "ms a step"]
    return plots.table(head, body, lambda i: "ours" if rows[i]["weight"] else "peer")


def section(content: dict) -> str:
    """This headline's part of the report."""
    plane, photos = content["shape"], content["colours"]
    maps = "".join(
        f"<h5>{row['contender']}</h5>"
        + plots.arrows(f"Where the map takes points of the disc: {row['contender']}", row["shown"], plane["target"])
        for row in plane["rows"]
    )
    names = ["the photograph", "the one whose colours it is given", *(row["contender"] for row in photos["rows"])]
    shown = [*photos["images"], *(row["shown"] for row in photos["rows"])]
    pictures = "".join(
        f'<figure><img alt="{name}" src="{address}"><figcaption>{name}</figcaption></figure>'
        for name, address in zip(names, shown, strict=True)
    )
    parts = []
    for title, part, pictured in (
        ("A disc to a ring of eight spots", plane, f'<div class="pair">{maps}</div>'),
        ("The colours of one photograph to those of another", photos, f'<div class="gallery">{pictures}</div>'),
    ):
        curves = losses_of(part["rows"], "fit", "Fitting loss") + losses_of(part["rows"], "gap", "Monge gap")
        parts.append(f'<div class="card"><h4>{title}</h4>{pictured}{judged_table(part["rows"])}{curves}</div>')
    return (
        "<h3>Headline: transport maps with the Monge gap</h3>"
        f'<p class="soft">One small network, {content["steps"]} steps of {BATCH} points, squared distances, '
        f"epsilon {EPSILON}. The fitting loss is the Sinkhorn divergence of the moved points from the target. "
        f"What a map pays is the mean of |x - T(x)|^2; the least is that of the best pairing of the same points.</p>"
        + "".join(parts)
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="folder for headline_monge_gap.json (bench/results/<machine>)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks this script only")
    options = parser.parse_args(arguments)
    device, quick = options.device, options.quick
    out = options.out or (Path(tempfile.mkdtemp(prefix="tilewise-headline-")) if quick else None)
    out = out or results.RESULTS / results.machine_name(device)
    steps = 3 if quick else STEPS
    content = {"environment": results.environment(device), "headline": "monge_gap", "steps": steps}
    content["shape"] = shape(steps, device)
    content["colours"] = colours(steps, 32 if quick else 240, device)
    results.save(out / "headline_monge_gap.json", content)
    say(f"\nresults are in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
