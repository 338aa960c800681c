"""EMR-Merging: elect one shared task vector; a mask and a scale turn it into each task's own."""

from torch import Tensor

from osrm_peft.merging.methods.registry import register
from osrm_peft.merging.methods.ties import elected


@register(
    "emr",
    paper="EMR-Merging (Huang et al., NeurIPS 2024), arXiv:2405.17461",
    spaces=("weight",),
    per_task=True,
)
def emr(tau: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Elect τ_uni and the masks; the rescalers follow from sums over the whole model.

        γ = sgn(Σ_t w_t τ_t),   τ_uni = γ ⊙ max_{t: sgn(w_t τ_t) = γ} |w_t τ_t|,   M_t = [w_t τ_t ⊙ τ_uni > 0]

    Task t's model is W₀ + λ_t M_t ⊙ τ_uni with λ_t = Σ|w_t τ_t| / Σ|M_t ⊙ τ_uni|, sums over all entries of all layers
    (paper, Algorithm 1).

    Args:
        tau: (T, o, n) task vectors of one layer.
        weights: (T,) one a task (the paper has none).

    Returns:
        (o, n) τ_uni in the dtype of `tau`, (T, o, n) bool masks.
    """
    theta = weights[:, None, None] * tau
    sign = elected(theta)  # (o, n) γ
    unified = (theta * sign).amax(0).clamp_min_(0).mul_(sign)
    return unified, (theta.sign() == unified.sign()) & (unified != 0)
