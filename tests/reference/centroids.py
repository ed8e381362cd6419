"""Slow versions of the centroid rules, written from the papers' formulae in all D dimensions.

Points are (K, D), weights (K,), both float64 where not said otherwise; one centroid at a time.
"""

import itertools
import math

import torch


def lol(points, weights, mu):
    """Bodin et al., arXiv 2408.08558: z = (1 − a/√b) μ + Σ w_n x_n / √b."""
    a, b = sum(weights), sum(w * w for w in weights)
    total = sum(w * x for w, x in zip(weights, points, strict=True))
    return (1 - a / b**0.5) * mu + total / b**0.5


def karcher_mean(points, weights, steps=2000, rate=0.3):
    """Fréchet mean of the directions by small gradient steps of ½ Σ w θ², radius Σ w ‖x‖."""
    norms = points.norm(dim=1)
    units = points / norms[:, None]
    m = (weights[:, None] * units).sum(0)
    m = m / m.norm()
    for _ in range(steps):
        cosines = (units @ m).clamp(-1, 1)
        away = units - cosines[:, None] * m
        logs = cosines.acos()[:, None] * away / away.norm(dim=1, keepdim=True).clamp_min(1e-15)
        m = m + rate * (weights[:, None] * logs).sum(0)
        m = m / m.norm()
    return (weights * norms).sum() * m


def low_pass(points, sigma=2.0):
    """Gaussian blur of (K, C, H, W) by its sum over the reflected plane, gain exp(−σ²ω²/2)."""

    def blurred(x):  # along the last axis, in the DCT-II basis written out
        n = x.shape[-1]
        place = torch.arange(n, dtype=x.dtype) + 0.5
        total = torch.zeros_like(x)
        for k in range(n):
            wave = torch.cos(math.pi * k / n * place)
            share = (x * wave).sum(-1, keepdim=True) / (wave * wave).sum()
            total = total + math.exp(-((sigma * math.pi * k / n) ** 2) / 2) * share * wave
        return total

    return blurred(blurred(points).transpose(-1, -2)).transpose(-1, -2)


def split_centroid(norm, split, points, weights):
    """Landolsi & Kahl, arXiv 2505.07481, sec. 3 and 5: Σ w d + g · Σ w e of points (K, C, H, W)."""
    means = {"m": lambda x: x.mean(), "lp": lambda x: low_pass(x[None])[0]}[split]
    parts = [torch.zeros_like(x) + means(x) for x in points]
    rest = [x - d for x, d in zip(points, parts, strict=True)]
    total = sum(w * e for w, e in zip(weights, rest, strict=True))
    goal = {
        "lin": total.norm(),
        "fix": math.sqrt(total.numel()),
        "nin": sum(w * e.norm() for w, e in zip(weights, rest, strict=True)),
    }[norm]
    return sum(w * d for w, d in zip(weights, parts, strict=True)) + goal / total.norm() * total


def diff_ii_circle(x, y, place):
    """Diff-II, CVPR 2025: sin((1 + a)θ)/sin θ x − sin(aθ)/sin θ y, with aθ = ``place``."""
    theta = torch.acos(x @ y / (x.norm() * y.norm()))
    return (torch.sin(theta + place) * x - torch.sin(place) * y) / torch.sin(theta)


def rho(norm, dim):
    """−log χ_D, written out."""
    constant = (dim / 2 - 1) * math.log(2) + math.lgamma(dim / 2)
    return constant - (dim - 1) * norm.log() + norm.square() / 2


def polyline_cost(path, dim, eps):
    """Samuel et al., arXiv 2306.08687: Σ ‖Δ‖ ρ(‖middle‖) + Σ relu(‖Δ‖ − ε) of (…, n, D) paths."""
    pieces = path.diff(dim=-2).square().sum(-1).add(1e-18).sqrt()
    middles = (path[..., 1:, :] + path[..., :-1, :]).div(2).norm(dim=-1)
    return (pieces * rho(middles, dim) + torch.relu(pieces - eps)).sum(-1)


def piece_limit(points, n):
    """ε = 2 δ / n; δ is the distance of two points, of more their root mean square distance."""
    distances = torch.pdist(points)
    return 2 * distances.square().mean().sqrt() / n


def nao_objective(points, weights, centroid, costs):
    """Σ_n K w_n cost_n − log χ(‖c‖)."""
    return len(points) * (weights * costs).sum() + rho(centroid.norm(), points.shape[1])


def nao_by_adam(points, weights, n=50, limit=10_000, seed=0):
    """The published optimisation: Adam in D dimensions over the centroid and all path points.

    Learning rate 0.01, from the mean and from straight lines with U(0, 0.01) noise; it stops after
    5 changes of the loss below 0.01 in a row.

    Returns:
        (centroid, its loss, iterations).
    """
    generator = torch.Generator().manual_seed(seed)
    count, dim = points.shape
    eps = piece_limit(points, n)
    centroid = (weights[:, None] * points).sum(0)
    t = torch.linspace(0, 1, n, dtype=points.dtype)[1:-1, None]
    inner = points[:, None] * (1 - t) + centroid * t
    inner = inner + torch.rand(inner.shape, generator=generator, dtype=points.dtype) / 100
    centroid.requires_grad_(), inner.requires_grad_()
    adam = torch.optim.Adam([centroid, inner], lr=0.01)
    losses: list[float] = []
    while len(losses) < limit and not settled(losses):
        adam.zero_grad()
        paths = torch.cat([points[:, None], inner, centroid.expand(count, 1, dim)], 1)
        loss = nao_objective(points, weights, centroid, polyline_cost(paths, dim, eps))
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return centroid.detach(), losses[-1], len(losses)


def settled(losses):
    """Whether the last five changes are all below 0.01."""
    last = losses[-6:]
    return len(last) == 6 and all(abs(a - b) < 0.01 for a, b in itertools.pairwise(last))


def nao_objective_of(points, weights, centroid, n=50):
    """The published objective of a centroid with the best polylines we can find for it.

    A path's cost depends on norms and distances, so its best polyline lies in the plane of its two
    ends; there L-BFGS finds it, from two starts: the sphere reached by swings of falling size
    (midpoints near the sphere are what the objective asks for), and without them.
    """
    dim = points.shape[1]
    points, weights, centroid = points.double(), weights.double(), centroid.double()
    eps, middle = piece_limit(points, n), math.sqrt(dim - 1)
    norms, radius = points.norm(dim=1), centroid.norm()
    angles = (points @ centroid / (norms * radius)).clamp(-1, 1).acos()
    first = torch.stack([norms, 0 * norms], -1)[:, None]
    last = radius * torch.stack([angles.cos(), angles.sin()], -1)[:, None]
    k = torch.arange(1, n - 1, dtype=torch.float64)
    best = polyline_cost(torch.cat([first, last], 1), dim, eps)
    for swing in (-0.55, 0.55):
        out = (norms - middle)[:, None] * swing**k + (radius - middle) * swing ** (n - 1 - k)
        turn = angles[:, None] * k / (n - 1)
        inner = (middle + out)[..., None] * torch.stack([turn.cos(), turn.sin()], -1)
        inner.requires_grad_()
        solver = torch.optim.LBFGS(
            [inner], max_iter=2000, history_size=20, line_search_fn="strong_wolfe"
        )

        def cost(inner=inner):
            return polyline_cost(torch.cat([first, inner, last], 1), dim, eps)

        def closure(solver=solver, cost=cost):
            solver.zero_grad()
            loss = cost().sum()
            loss.backward()
            return loss

        solver.step(closure)
        best = torch.minimum(best, cost().detach())
    return nao_objective(points, weights, centroid, best).item()


def geodesic_cost(a, b, angle, dim, n=1200):
    """∫ ρ ds of the best plane curve between two norms at an angle, by a fine polyline.

    Each piece is integrated by Simpson's rule: with the midpoint alone a path may swing across the
    sphere and be seen only while it passes it.
    """
    middle = math.sqrt(dim - 1)
    k = torch.linspace(0, 1, n, dtype=torch.float64)
    legs = torch.stack([k * 4, torch.ones_like(k), (1 - k) * 4]).amin(0)
    ends = a + (b - a) * k
    radii = (ends + (middle - ends) * legs)[1:-1]
    turns = (angle * ((k - 0.2) / 0.6).clamp(0, 1))[1:-1]
    inner = torch.stack([radii, turns * middle]).requires_grad_()

    def cost():
        zero = torch.zeros(1, dtype=torch.float64)
        r = torch.cat([zero + a, inner[0], zero + b])
        phi = torch.cat([zero, inner[1] / middle, zero + angle])
        path = r[:, None] * torch.stack([phi.cos(), phi.sin()], -1)
        pieces = path.diff(dim=0).norm(dim=-1)
        middles = ((path[1:] + path[:-1]) / 2).norm(dim=-1)
        return (pieces * (rho(r[1:], dim) + rho(r[:-1], dim) + 4 * rho(middles, dim)) / 6).sum()

    solver = torch.optim.LBFGS(
        [inner], max_iter=3000, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        loss = cost()
        loss.backward()
        return loss

    solver.step(closure)
    return cost().item()
