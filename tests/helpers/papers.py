"""The papers' algorithms, written out from their text."""

import torch

from osrm_peft.merging.methods.svt import above


def paper(vectors, density):
    """TIES on flat task vectors, entry by entry, from Algorithm 1 of the paper."""
    trimmed = []
    for vector in vectors:
        k = max(1, round(density * len(vector)))
        smallest_kept = sorted((abs(x) for x in vector), reverse=True)[k - 1]
        trimmed.append([x if abs(x) >= smallest_kept else 0.0 for x in vector])
    merged = []
    for entries in zip(*trimmed, strict=True):
        positive, negative = [x for x in entries if x > 0], [x for x in entries if x < 0]
        total = sum(entries)
        agreeing = positive if total > 0 else negative if total < 0 else []
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return merged


def svt(X, mu):
    return above(X, mu).soft(X, mu)


def algorithm_1(thetas, mu, iterations, combine):
    """The paper's Algorithm 1 on full parameters θ_t = W₀ + τ_t, one matrix at a time; returns θ₀ and τ."""
    deltas = [torch.zeros_like(theta) for theta in thetas]
    for _ in range(iterations):
        base = sum(theta - delta for theta, delta in zip(thetas, deltas, strict=True)) / len(thetas)
        deltas = []
        for theta in thetas:
            U, S, Vh = torch.linalg.svd(theta - base, full_matrices=False)
            deltas.append(U @ torch.diag((S - mu).clamp_min(0)) @ Vh)
    return base, sum(deltas) / (len(deltas) if combine == "average" else 1)
