"""Spaces: where a layer's task vectors are merged, and how the result returns to the layer."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from osrm_peft.adapters.factors import Factors
from osrm_peft.merging.lowrank import Compressed, balanced, column_basis, compress_matrix

Space = Literal["auto", "weight", "core", "knots"]
SPACES = get_args(Space)[1:]


class Layer(NamedTuple):
    """One layer in a space: τ_t = left · stack[t] · rightᵀ.

    Attributes:
        stack: (T, p, q) what the method sees.
        left, right: (o, p), (n, q) orthonormal bases; None is the identity.
    """

    stack: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    def compress(self, merged: Tensor, rank: int | None = None, by: Tensor | None = None) -> Compressed:
        """A merged (p, q) matrix as factors in the layer, of at most `rank`; the bases are orthonormal, so cut here."""
        factors, energy = compress_matrix(merged, rank, by)
        factors = factors if self.left is None else factors.to(self.left.device)
        A, B = factors.A, factors.B
        A = A if self.right is None else A @ self.right.mT
        return Compressed(Factors(A, B if self.left is None else self.left @ B), energy)

    def dense(self, stack: Tensor) -> Tensor:
        """(T, p, q) matrices as (T, o, n) ones of the layer, float32."""
        stack = stack if self.left is None else self.left @ stack.to(self.left)
        return (stack if self.right is None else stack @ self.right.mT).float()


def enter(space: str, adapters: Sequence[Factors | None]) -> Layer:
    """One layer's task vectors in a space; an adapter that does not adapt the layer (None) has the task vector 0.

    * `"weight"`: the o×n matrices themselves, float32.
    * `"core"`: (T, p, q) in orthonormal bases of all adapters' columns and rows, p, q ≤ Σ r, float64. The factors are
      balanced first, so the bases do not depend on how an adapter splits its τ into B and A (Core Space, NeurIPS 2025,
      arXiv:2509.17786, has them unbalanced).
    * `"knots"`: (T, p, n) Σ V_tᵀ of the SVD [τ_1 … τ_T] = U Σ [V_1ᵀ … V_Tᵀ], p ≤ Σ r, float64 (KnOTS, ICLR 2025,
      arXiv:2410.19735), from the SVD of the stacked B, by way of Σr × Σr; the o×Tn matrix is never formed.
    At least one adapter must adapt the layer, and all that do must agree on its shape.
    """
    one = next(factors for factors in adapters if factors is not None)
    o, n, new = len(one.B), one.A.shape[1], one.A.new_zeros
    if space == "weight":
        zero = new(o, n, dtype=torch.float32)
        return Layer(torch.stack([zero if factors is None else factors.delta() for factors in adapters]))
    empty = new(o, 0, dtype=torch.float64), new(0, n, dtype=torch.float64)
    pairs = [empty if factors is None else balanced(factors) for factors in adapters]
    if space == "knots":
        norms = [A.norm(dim=1) for _, A in pairs]  # balanced rows of A are orthogonal: same τ τᵀ
        left, parts = column_basis([B * norm for (B, _), norm in zip(pairs, norms, strict=True)])
        stack = new(len(pairs), left.shape[1], n, dtype=torch.float64)
        for into, part, (_, A), norm in zip(stack, parts, pairs, norms, strict=True):
            torch.mm(part, A / norm[:, None], out=into)
        return Layer(stack, left)
    left, columns = column_basis([B for B, _ in pairs])  # (o, p)
    right, rows = column_basis([A.mT for _, A in pairs])  # (n, q)
    return Layer(torch.stack([b @ a.mT for b, a in zip(columns, rows, strict=True)]), left, right)
