"""Exact algebra on products B·A without forming them: balancing, bases, recompression. All in float64."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from osrm_peft.adapters.factors import Factors
from osrm_peft.features.moments import FeatureMoments

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

_EPS = torch.finfo(torch.float64).eps
_WIDE = 1024
_TALL = 256
_SAFE = 1e-6  # of the largest eigenvalue of a Gram matrix, the least
SMALL = 256  # up to this width a decomposition is the CPU's work
SERVING = (8, 16, 32, 64, 128, 256, 320, 512)  # the ranks that vLLM makes room for


def svd_errors() -> tuple[type[Exception], ...]:
    """What an SVD raises that does not converge, for `except`: torch's error and ARPACK's, imported when one is due."""
    from scipy.sparse.linalg import ArpackError

    return torch.linalg.LinAlgError, ArpackError


class Compressed(NamedTuple):
    """A product as factors of least rank, and the share of its squared Frobenius norm that they keep."""

    factors: Factors
    energy_kept: float


def balanced(factors: Factors) -> tuple[Tensor, Tensor]:
    """(o, k), (k, n) with the product s·B·A: U √Σ and √Σ Vᵀ of its SVD, whatever the split into B and A was."""
    U, S, Vh = _thin_svd(factors.s * factors.B.double(), factors.A.double())
    return U * S.sqrt(), S.sqrt()[:, None] * Vh


def compress(B: Tensor, A: Tensor, rank: int | None = None) -> Compressed:
    """The best approximation of B·A of at most `rank` (None: exact, at its numerical rank), balanced.

    Args:
        B: (o, p). A: (p, n), any p. The cost is at most that of QR of each and an SVD of p×p.

    Returns:
        Factors with s = 1 and BᵀB = AAᵀ diagonal, float64.
    """
    return _cut(*_thin_svd(B.double(), A.double()), rank)


def compress_outputs(factors: Factors, moments: Sequence[FeatureMoments], rank: int) -> Compressed:
    """The approximation X of s·B·A of at most `rank` that loses least of the outputs, Σ_t E‖(s·B·A − X) h_t‖².

    It is U Uᵀ s·B·A with the first left singular vectors U of s·B·A S^½, S = mean over tasks of E h_t h_tᵀ (Eckart and
    Young): features say which directions the inputs use, the singular values of the product do not. S has a ridge of
    10⁻⁸ of its mean diagonal, so that these choose among directions that no feature uses.

    Args:
        moments: of the layer's inputs, one a task.
    """
    B, A = balanced(factors)
    S = torch.stack([one.second_moment() for one in moments]).mean(0).to(B.device)
    S.diagonal().add_(1e-8 * float(S.trace()) / len(S) or 1.0)
    values, V = torch.linalg.eigh(A @ S @ A.mT)  # = C Cᵀ, and B C has the left singular vectors of B A S^½
    U = thin_svd(B @ (V * values.clamp_min(0).sqrt()))[0][:, :rank]
    cut = compress(U, (U.mT @ B) @ A)
    whole, kept = (float((b.mT @ b * (a @ a.mT)).sum()) for b, a in ((B, A), (cut.factors.B, cut.factors.A)))
    return cut._replace(energy_kept=kept / whole if whole else 1.0)


def compress_matrix(X: Tensor, rank: int | None = None, by: Tensor | None = None) -> Compressed:
    """The same of a matrix (o, n) that is there, whose full SVD takes minutes where it is wide.

    Above a width of 1,024 a small `rank` is found by Lanczos iterations to rounding (ARPACK), and without `rank` X is
    returned as it is, X·I, at full rank.

    Args:
        by: (o, n) with the singular vectors of X, whose singular values say which of them a lower `rank` keeps: where
            those of X are equal, X alone does not say.
    """
    if by is not None and rank is not None:
        kept = compress_matrix(by, rank).factors
        U, V = torch.linalg.qr(kept.B).Q, torch.linalg.qr(kept.A.mT).Q
        inner = U.mT @ X.double() @ V
        energy = float(inner.square().sum() / X.double().square().sum()) if X.any() else 1.0
        return compress(U @ inner, V.mT)._replace(energy_kept=energy)
    X, narrow = X.double(), min(X.shape)
    square = float(X.square().sum())
    if square == 0:
        return Compressed(Factors(X[:0], X[:, :0]), 1.0)
    if narrow <= _WIDE or (rank is not None and rank > narrow // 8):
        U, S, Vh = _long_svd(X)
        k = _exact_rank(S, X.shape)
        return _cut(U[:, :k], S[:k], Vh[:k], rank)
    if rank is None:
        half = 2.0 ** round(math.log2(float(X.abs().max())) / 2)  # both factors alike, for float16
        eye, X = half * torch.eye(narrow, dtype=X.dtype, device=X.device), X / half
        return Compressed(Factors(eye, X) if X.shape[1] == narrow else Factors(X, eye), 1.0)
    from scipy.sparse.linalg import svds

    start = torch.linspace(1, 2, narrow, dtype=X.dtype).numpy()  # fixed: ARPACK would draw one
    found = svds(X.numpy() if X.device.type == "cpu" else _products_on_device(X), k=rank, v0=start)
    U, S, Vh = (torch.from_numpy(one.copy()).to(X.device) for one in found)
    U, S, Vh = U.flip(1), S.flip(0), Vh.flip(0)  # the largest first
    cut = _cut(U, S, Vh, rank)
    return cut._replace(energy_kept=float(S.square().sum()) / square)


def _products_on_device(X: Tensor) -> "LinearOperator":
    """X for ARPACK, which runs on the CPU and asks for products with vectors."""
    from scipy.sparse.linalg import LinearOperator

    def product(matrix: Tensor) -> Callable[[Any], Any]:
        return lambda x: (matrix @ torch.from_numpy(np.ascontiguousarray(x)).to(X.device, X.dtype)).cpu().numpy()

    there, back = product(X), product(X.mT)
    return LinearOperator(X.shape, matvec=there, rmatvec=back, matmat=there, rmatmat=back, dtype=np.float64)


def least_energy(found: Iterable[Compressed], ranks: Sequence[int]) -> dict[int, float]:
    """{rank: share of its squared norm that the layer keeps which would lose most by it}."""
    least = dict.fromkeys(ranks, 1.0)
    for factors, kept in found:
        energy = _thin_svd(factors.s * factors.B.double(), factors.A.double())[1].square()
        if energy.any():
            least = {rank: min(one, kept * float(energy[:rank].sum() / energy.sum())) for rank, one in least.items()}
    return least


def squared_values(factors: Factors) -> Tensor | None:
    """(k,) squared singular values of balanced factors, the largest first; None for those that are not balanced.

    `compress` and `compress_matrix` return balanced ones, but for a wide matrix at full rank.
    """
    B, A = factors.B.double(), factors.A.double()
    if len(A) > _WIDE:
        return None
    gram = B.mT @ B
    if not torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-4 * float(gram.abs().max())):
        return None
    return (factors.s**2 * gram.diagonal() * A.square().sum(1)).sort(descending=True).values


def column_basis(parts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Orthonormal basis of the columns of all `parts` (o, k_t), left singular vectors of the stack; the parts in it.

    Returns:
        (o, p) the basis; (p, k_t) the coordinates of each part.
    """
    stack = torch.cat(parts, dim=1)
    U, S, Vh = _tall_svd(stack)
    k = _exact_rank(S, stack.shape)
    coordinates = S[:k, None] * Vh[:k]
    return U[:, :k], list(coordinates.split([part.shape[1] for part in parts], dim=1))


def product_bases(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """(o, k), (n, k) orthonormal bases of the columns and of the rows of B·A, at its numerical rank k."""
    U, S, Vh = _thin_svd(B.double(), A.double())
    k = numerical_rank(S)
    return U[:, :k], Vh[:k].mT


def cross_energies(products: list[tuple[Tensor, Tensor]], moments: FeatureMoments) -> Tensor:
    """(P, P) E⟨X_j h, X_k h⟩ = tr(X_j S X_kᵀ) of P products X = B·A, without forming one.

    Args:
        products: (B (o, r_j), A (r_j, n)), any ranks.
        moments: of the layer's inputs h; S = E hhᵀ (n, n).

    Returns:
        float64, symmetric and positive semidefinite; the diagonal holds E‖X_j h‖².
    """
    return _cross_energies(products, moments)[0]


def sure_energies(products: list[tuple[Tensor, Tensor]], moments: FeatureMoments) -> Tensor:
    """The same, with 0 in the rows and columns of a product whose own energy may be rounding of S or of itself."""
    energies, rounding = _cross_energies(products, moments)
    sure = energies.diagonal() > rounding
    return torch.where(sure & sure[:, None], energies, 0)


def _cross_energies(products: list[tuple[Tensor, Tensor]], moments: FeatureMoments) -> tuple[Tensor, Tensor]:
    """(P, P) the energies, (P,) how much of the diagonal may be rounding."""
    B = torch.cat([B.double() for B, _ in products], dim=1)  # (o, R)
    A = torch.cat([A.double() for _, A in products])  # (R, n)
    root = moments.root()
    reads = A @ moments.second_moment() @ A.mT if root is None else (A @ root.mT) @ (root @ A.mT)  # (R, R) A S Aᵀ
    owner = torch.repeat_interleave(torch.tensor([len(A) for _, A in products])).to(A.device)  # (R,)

    def blocks(terms: Tensor) -> Tensor:  # (R, R) → (P, P) sums over each pair of products
        rows = terms.new_zeros(len(products), len(A)).index_add_(0, owner, terms)
        return terms.new_zeros(len(products), len(products)).index_add_(1, owner, rows)

    inner = B.mT @ B
    sums = blocks(inner * ((A * moments.rounding()) @ A.mT)).diagonal()  # Σ_i ε_i ‖X_j e_i‖²
    norms = inner.diagonal().sqrt() * reads.diagonal().clamp_min(0).sqrt()  # (R,): what terms may cancel to rounding
    return blocks(inner * reads), sums + len(A.mT) * _EPS * blocks(norms * norms[:, None]).diagonal()


def thin_svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (o, k), S (k,), Vh (k, n) with k = min(o, n); of a small matrix by the CPU, for which a GPU takes longer."""
    if X.device.type == "cpu" or min(X.shape) > SMALL:
        return torch.linalg.svd(X, full_matrices=False)
    U, S, Vh = (found.to(X.device) for found in torch.linalg.svd(X.cpu(), full_matrices=False))
    return U, S, Vh


def symmetric_eigh(X: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (p,), ascending, and eigenvectors (p, p) of a symmetric X; of a small one by the CPU."""
    if X.device.type == "cpu" or len(X) > SMALL:
        return torch.linalg.eigh(X)
    values, V = torch.linalg.eigh(X.cpu())
    return values.to(X.device), V.to(X.device)


def numerical_rank(S: Tensor) -> int:
    """How many singular values (descending) are more than rounding: above 10⁻⁶ of the largest.

    A float32 o×n product of rank r has rounding of about 2⁻²⁴ √(r/n) of the largest, so both spaces agree.
    """
    return int((1e-6 * S[0] < S).sum()) if len(S) else 0


def _cut(U: Tensor, S: Tensor, Vh: Tensor, rank: int | None) -> Compressed:
    kept = S[:rank]
    energy = float(kept.square().sum() / S.square().sum()) if len(S) else 1.0
    root = kept.sqrt()
    return Compressed(Factors(root[:, None] * Vh[: len(kept)], U[:, : len(kept)] * root), energy)


def _thin_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of B·A, cut at its numerical rank: U (o, k), S (k,), Vh (k, n)."""
    (Q_B, R_B), (Q_A, R_A) = _orthonormal(B), _orthonormal(A.mT)
    U, S, Vh = thin_svd(R_B @ R_A.mT)
    k = _exact_rank(S, (len(B), A.shape[1]))
    return Q_B @ U[:, :k], S[:k], Vh[:k] @ Q_A.mT


def _long_svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`thin_svd`, of a matrix with a long side by way of the short one."""
    o, n = X.shape
    if n >= 4 * o:
        V, S, Uh = _tall_svd(X.mT)
        return Uh.mT, S, V.mT
    return _tall_svd(X) if o >= 4 * n else thin_svd(X)


def _tall_svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of a tall X (m, p): U (m, p), S (p,), Vh (p, p)."""
    found = _by_gram(X)
    if found is not None:
        return found
    Q, R = torch.linalg.qr(X)  # first, so that the SVD is of a small matrix
    U, S, Vh = thin_svd(R)
    return Q @ U, S, Vh


def _orthonormal(X: Tensor) -> tuple[Tensor, Tensor]:
    """X (m, p) = Q R with orthonormal columns of Q (m, min(m, p)); R need not be triangular."""
    found = _by_gram(X)
    if found is None:
        return torch.linalg.qr(X)
    U, S, Vh = found
    return U, S[:, None] * Vh


def _by_gram(X: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The SVD of a tall X (m, p) from the eigenvectors of XᵀX: matrix products, several times faster than a QR.

    Squares cost digits: None where X is not tall (or small, so that nothing is won), or where its condition is above
    10³, so that U is orthonormal to 10⁻⁹ at worst.
    """
    m, p = X.shape
    if not 0 < 4 * p <= m or m < _TALL or X.dtype != torch.float64:
        return None
    values, V = symmetric_eigh(X.mT @ X)
    if not float(values[0]) > _SAFE * float(values[-1]):  # zero, NaN, too
        return None
    S, V = values.flip(0).sqrt(), V.flip(1)
    return X @ (V / S), S, V.mT


def _exact_rank(S: Tensor, shape: torch.Size | tuple[int, ...]) -> int:
    """How many singular values of a matrix of this shape are above float64's rounding."""
    return int((max(shape) * _EPS * S.max() < S).sum()) if len(S) else 0
