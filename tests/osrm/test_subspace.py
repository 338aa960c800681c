"""What every registered merge method keeps, over every kind of plain LoRA adapter."""

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from osrm_peft import OSRMLoraConfig, collect_features, initialize_osrm_weights
from osrm_peft.features.moments import FeatureMoments
from osrm_peft.models.layers import lora_layers
from osrm_peft.osrm.spectrum import PooledMoment, Spectrum
from osrm_peft.osrm.subspace import choose_directions, procrustes_drift, quietest_directions, reference_directions
from tests.helpers.models import make_base, make_batch
from tests.helpers.subspace import FORMS, form, generator, moments_of, protected, tasks, top


def pooled(others):
    return PooledMoment.of(others).second_moment()


def spectrum_of(others):
    return Spectrum.of(PooledMoment.of(others))


def assert_same_span(A, B, atol=1e-9):
    assert_orthonormal(A)
    basis = torch.linalg.qr(torch.as_tensor(B).T)[0].T
    torch.testing.assert_close(A.T @ A, basis.T @ basis, rtol=0, atol=atol)


def energy(A, S):
    return float(torch.trace(A @ S @ A.T))


def random_frame(r, n, seed):
    return torch.linalg.qr(torch.randn(n, r, generator=generator(seed), dtype=torch.float64))[0].T


def assert_orthonormal(A):
    torch.testing.assert_close(A @ A.T, torch.eye(len(A), dtype=A.dtype), rtol=0, atol=1e-12)


@settings(max_examples=40)
@given(
    T=st.integers(1, 3), k=st.integers(1, 30), n=st.integers(2, 12), share=st.floats(0, 1),
    statistic=st.sampled_from(["mean", "sample", "token"]),
)  # fmt: skip
def test_A_has_the_least_energy_of_all_frames(T, k, n, share, statistic):
    r = 1 + int(share * (n - 1))
    others = tasks(T, k, n, statistic)
    A = choose_directions(spectrum_of(others), r, generator=generator())
    S = pooled(others)
    assert_orthonormal(A)
    least = float(torch.linalg.eigvalsh(S)[:r].sum())
    # second moments are summed in float32: a null space is known to its rounding, relative to the largest eigenvalue
    slack = 1e-6 * float(torch.linalg.matrix_norm(S, 2))
    assert energy(A, S) <= least + slack
    assert all(energy(A, S) <= energy(random_frame(r, n, seed), S) + slack for seed in range(100))


def test_pooling_weighs_every_task_the_same():
    few, many = torch.randn(3, 5), torch.randn(300, 5)
    S = pooled([moments_of(few), moments_of(many)])
    torch.testing.assert_close(S, ((few.T @ few / 3 + many.T @ many / 300) / 2).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("statistic", ["mean", "sample"])
def test_vectors_and_second_moments_choose_the_same_A(statistic):
    """The O(m²n) way without an n×n matrix, and eigh of S, must agree: the null space and the seed fix A."""
    others = tasks(3, 4, 24, statistic)
    from_vectors = quietest_directions(spectrum_of(others), 5, generator(7))
    S = pooled(others)
    count = sum(moments.rank_bound() for moments in others)  # 3 means, or 12 samples
    summed = FeatureMoments("token", 24, count=count, total=torch.zeros(24), second=(count * S).float())
    torch.testing.assert_close(
        quietest_directions(spectrum_of([summed]), 5, generator(7)), from_vectors, rtol=0, atol=1e-4
    )
    assert energy(from_vectors, S) < 1e-14 * float(S.trace())  # evaluated in float64


def test_the_choice_in_a_null_space_is_seeded_and_follows_no_basis():
    others = tasks(2, 1, 16, "mean")
    A, again, other = (quietest_directions(spectrum_of(others), 3, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(A, again)
    assert not torch.allclose(A, other, atol=0.1)


def test_null_space_in_task_takes_the_own_energy_that_is_free():
    others, own = tasks(3, 1, 12, "mean"), tasks(1, 40, 12, seed=5)[0]
    A = choose_directions(spectrum_of(others), 2, own=own, null_space="in_task", generator=generator())
    assert_orthonormal(A)
    S = pooled(others)
    assert energy(A, S) < 1e-14 * float(S.trace())  # still the paper's minimum
    null = torch.linalg.svd(S)[2][3:]  # (9, 12): the others' means span 3 directions
    best = torch.linalg.eigvalsh(null @ own.second_moment() @ null.T)[-2:].sum()
    torch.testing.assert_close(energy(A, own.second_moment()), float(best), rtol=1e-9, atol=0)


@pytest.mark.parametrize("objective", ["least_energy", "ratio"])
def test_own_features_of_low_rank_are_completed_by_quiet_directions(objective):
    others, own = tasks(3, 1, 12, "mean"), tasks(1, 1, 12, "mean", seed=5)[0]
    A = choose_directions(
        spectrum_of(others), 4, own=own, null_space="in_task", objective=objective, generator=generator()
    )
    assert_orthonormal(A)
    S, h = pooled(others), own.mean()
    free = torch.linalg.svd(S)[2][3:]
    if objective == "least_energy":
        assert energy(A, S) < 1e-14 * float(S.trace())
        torch.testing.assert_close(energy(A, torch.outer(h, h)), float((free @ h).square().sum()), rtol=1e-9, atol=0)
    else:
        a = torch.linalg.solve(S + 0.1 * S.trace() / 12 * torch.eye(12, dtype=S.dtype), h)  # the one with κ > 0
        a = a / a.norm()
        torch.testing.assert_close(A.T @ A @ a, a, rtol=0, atol=1e-9)
        # at most 4 of the 12 directions (a and the others' 3 means) carry energy: the other 3 rows find none
        torch.testing.assert_close(energy(A, S), float(a @ S @ a), rtol=1e-9, atol=1e-12)


def test_difference_is_the_top_of_its_matrix_and_the_paper_at_zero():
    others, own = tasks(2, 50, 10), tasks(1, 50, 10, seed=5)[0]
    S, S_own = pooled(others), own.second_moment()
    for beta in (0.3, 1.0):
        A = choose_directions(
            spectrum_of(others), 3, own=own, objective="difference", in_task_weight=beta, generator=generator()
        )
        M = beta * S_own / S_own.trace() - (1 - beta) * S / S.trace()
        assert_orthonormal(A)
        torch.testing.assert_close(energy(A, M), float(torch.linalg.eigvalsh(M)[-3:].sum()), rtol=1e-9, atol=0)
    paper = choose_directions(spectrum_of(others), 3, generator=generator())
    zero = choose_directions(
        spectrum_of(others), 3, own=own, objective="difference", in_task_weight=0, generator=generator()
    )
    assert torch.equal(paper, zero)


def test_ratio_spans_the_top_generalised_eigenvectors():
    others, own = tasks(2, 50, 10), tasks(1, 50, 10, seed=5)[0]
    S, S_own = pooled(others), own.second_moment()
    A = choose_directions(spectrum_of(others), 3, own=own, objective="ratio", ridge=0.1, generator=generator())
    assert_orthonormal(A)
    M = S + 0.1 * S.trace() / 10 * torch.eye(10, dtype=S.dtype)
    values, vectors = torch.linalg.eig(torch.linalg.solve(M, S_own))  # brute force: not symmetric, not whitened
    top = vectors.real[:, values.real.argsort()[-3:]]
    torch.testing.assert_close(top.T @ A.T @ A, top.T, rtol=0, atol=1e-9)  # span(top) lies in span(A)


@pytest.mark.parametrize("statistic", ["token", "sample"])
@pytest.mark.parametrize(
    "options",
    [{}, {"null_space": "in_task"}, {"objective": "ratio"}, {"objective": "difference"}, {"protect_rank": 3}],
    ids=str,
)
def test_features_of_low_rank_choose_the_same_a_whatever_the_batches(options, statistic):
    """Of the others and of the own ones, 6 of 40 directions each: what rounding adds is neither avoided nor sought."""
    chosen = []
    for batch in (7, 13, 100):
        tasks_ = []
        for seed in (0, 1):
            x = torch.randn(100, 6, generator=generator(seed)) @ torch.randn(6, 40, generator=generator(10 + seed))
            tasks_.append(FeatureMoments(statistic, 40))
            for part in x.split(batch):
                tasks_[-1].add_(part if statistic == "token" else part[:, None])
        own = {"own": tasks_[1]} if "protect_rank" not in options else {}
        chosen.append(choose_directions(spectrum_of(tasks_[:1]), 8, generator=generator(1), **own, **options))
        assert_orthonormal(chosen[-1])
    for A in chosen[1:]:
        torch.testing.assert_close(A.T @ A, chosen[0].T @ chosen[0], rtol=0, atol=1e-5)


def test_all_the_own_energy_that_the_others_leave_free_is_taken():
    x = torch.randn(100, 6, generator=generator()) @ torch.randn(6, 40, generator=generator(1))
    others, own = moments_of(x), tasks(1, 100, 40, seed=5)[0]
    A = choose_directions(spectrum_of([others]), 8, own=own, null_space="in_task", generator=generator())
    free = torch.linalg.svd(x.double())[2][6:]
    best = torch.linalg.eigvalsh(free @ own.second_moment() @ free.T)[-8:].sum()
    assert energy(A, own.second_moment()) == pytest.approx(float(best), rel=1e-5)


@settings(max_examples=40)
@given(k=st.integers(1, 12), n=st.integers(3, 14), r=st.integers(1, 5), p=st.integers(0, 8), share=st.booleans())
def test_protect_keeps_a_off_the_strongest_directions(k, n, r, p, share):
    """As far as there is room: of the truncated S, A has the least energy of all frames."""
    r, spectrum = min(r, n), spectrum_of(tasks(2, k, n, "sample"))
    S = pooled(tasks(2, k, n, "sample"))
    strong = top(S, min(p, spectrum.rank))
    # a share that lies between what p − 1 and what p directions hold
    shares = spectrum.energy.cumsum(0) / spectrum.energy.sum()
    protect = float(shares[: len(strong)][-2:].mean()) if share and len(strong) > 1 else p
    A = choose_directions(spectrum, r, **protected(protect), generator=generator())
    assert_orthonormal(A)
    truncated = strong.T @ strong @ S @ strong.T @ strong
    least = float(torch.linalg.eigvalsh(truncated)[:r].sum())
    assert energy(A, truncated) == pytest.approx(least, abs=1e-12 * float(S.trace()))
    if r <= n - len(strong):
        assert (A @ strong.T).norm() < 1e-9


def test_protect_zero_is_a_random_frame_that_no_task_influences():
    first, second = (
        choose_directions(spectrum_of(tasks(2, 9, 7, seed=seed)), 3, protect_rank=0, generator=generator(1))
        for seed in (1, 2)
    )
    assert_orthonormal(first)
    assert torch.equal(first, second)
    assert not torch.allclose(
        first, choose_directions(spectrum_of(tasks(2, 9, 7)), 3, protect_rank=0, generator=generator(2)), atol=0.1
    )


@form
@pytest.mark.parametrize("protect", [0, 2, 5, 0.5, None])
def test_null_space_in_task_takes_the_own_energy_beside_the_protected(form, protect):
    others, own = tasks(2, 4, 12, "sample"), tasks(1, 11, 12, "sample", seed=5)[0]
    spectrum, S_own = spectrum_of(others), own.second_moment()
    A = choose_directions(spectrum, 3, own=form(own), null_space="in_task", **protected(protect), generator=generator())
    shares = spectrum.energy.cumsum(0) / spectrum.energy.sum()
    p = {0.5: 1 + int((shares < 0.5).sum()), None: 8}.get(protect, protect)  # 2 tasks of 4 vectors span 8 directions
    strong = top(pooled(others), p)
    P = torch.eye(12, dtype=torch.float64) - strong.T @ strong
    assert_same_span(A, top(P @ S_own @ P, 3))
    if protect == 0:
        assert_same_span(A, top(S_own, 3))  # the task's own principal directions


@form
@pytest.mark.parametrize("others_form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("k", "ridge", "protect"), [(4, 0.1, None), (4, 2.0, None), (11, 0.1, None), (4, 0.1, 2)])
def test_ratio_is_scipy_s_generalised_eigenvectors_whatever_is_known(form, others_form, k, ridge, protect):
    others, own = tasks(1, k, 12, "sample"), tasks(1, 6, 12, "sample", seed=5)[0]
    A = choose_directions(
        spectrum_of([others_form(task) for task in others]), 3, own=form(own), objective="ratio", ridge=ridge,
        **protected(protect), generator=generator(),
    )  # fmt: skip
    S = pooled(others)
    if protect is not None:
        S = S @ top(S, protect).T @ top(S, protect)
    M = S + ridge * S.trace() / 12 * torch.eye(12, dtype=S.dtype)
    vectors = scipy.linalg.eigh(own.second_moment().numpy(), M.numpy())[1]  # M-orthonormal, the largest last
    assert_same_span(A, vectors[:, -3:].T.copy())


def test_difference_weighs_the_protected_directions_only():
    others, own = tasks(2, 50, 10), tasks(1, 50, 10, seed=5)[0]
    A = choose_directions(
        spectrum_of(others),
        3,
        own=own,
        objective="difference",
        in_task_weight=0.3,
        protect_rank=2,
        generator=generator(),
    )
    S, S_own = pooled(others), own.second_moment()
    S = S @ top(S, 2).T @ top(S, 2)
    assert_same_span(A, top(0.3 * S_own / S_own.trace() - 0.7 * S / S.trace(), 3))


def released_algorithm(model, batches_of_tasks, layer, r):
    """What the released OSRM code does, in this test's own words: features with padding, their mean, a full SVD."""
    means = []
    for batches in batches_of_tasks:
        samples = []
        handle = model.get_submodule(layer).register_forward_hook(
            lambda _, args, __, into=samples: into.extend(args[0].double())
        )
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        handle.remove()
        positions = samples[0].shape[0]
        means.append(sum(sample.sum(0) / positions for sample in samples) / len(samples))
    features = torch.stack(means)  # (tasks, n)
    _, _, Vh = torch.linalg.svd(features, full_matrices=True)
    V = Vh.T
    return V[:, V.shape[1] - r :].T, features


@pytest.mark.parametrize(("number", "r"), [(1, 4), (3, 4), (3, 13)])
def test_reference_is_the_released_algorithm_end_to_end(number, r):
    """From padded batches to the weights of A: its mean is the same of one batch and of many."""
    base = make_base()
    pads = [(0, 2, 3, 1), (4, 0, 5), (6,)]
    batches_of_tasks = [
        [make_batch(len(pad), seed=10 * task + step, pads=pad) for step, pad in enumerate(pads)]
        for task in range(number)
    ]
    options = {"target_modules": ["query", "value"], "statistic": "mean", "reference": True, "progress": False}
    others = [collect_features(base, batches, task=str(i), **options) for i, batches in enumerate(batches_of_tasks)]
    fields = {"r": r, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    model = get_peft_model(make_base(), OSRMLoraConfig(reference=True, statistic="mean", **fields))
    initialize_osrm_weights(model, others)
    for name, layer in lora_layers(model, "default").items():
        A = layer.lora_A["default"].weight.detach().double()
        expected, means = released_algorithm(base, batches_of_tasks, name, r)
        collected = torch.stack([task.layers[name].mean() for task in others])
        torch.testing.assert_close(collected, means, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(A, expected, rtol=0, atol=2e-5)
        assert (means @ A.T).abs().max() < 1e-6 * float(means.norm())
    together = {key: torch.cat([batch[key] for batch in batches_of_tasks[0]]) for key in batches_of_tasks[0][0]}
    for name, moments in collect_features(base, [together], task="t", **options).layers.items():
        assert moments.count == others[0].layers[name].count == 8
        torch.testing.assert_close(moments.mean(), others[0].layers[name].mean(), rtol=1e-5, atol=1e-6)


def test_reference_is_the_last_right_singular_vectors_of_the_task_means():
    others = tasks(3, 5, 12, "mean")
    A = reference_directions(others, 4)
    means = torch.stack([moments.mean() for moments in others])
    torch.testing.assert_close(A, torch.linalg.svd(means)[2].T[:, -4:].T)
    assert (means @ A.T).abs().max() < 1e-12


def test_energy_share_is_one_for_everything_and_zero_for_a_null_space():
    others = tasks(2, 1, 6, "mean")
    assert PooledMoment.of(others).share(torch.eye(6)) == pytest.approx(1)
    assert PooledMoment.of(others).share(quietest_directions(spectrum_of(others), 2, generator())) < 1e-14


def test_drift_ignores_rotations_and_measures_the_rest():
    A = random_frame(3, 8, 0)
    Q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    assert procrustes_drift(Q @ A, A) == pytest.approx(0, abs=1e-7)
    assert procrustes_drift(3 * A, A) == pytest.approx(2)
    B = A + 0.1 * torch.randn(3, 8, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(B @ A.T)  # the optimal Q, written out
    assert procrustes_drift(B, A) == pytest.approx(float((B - U @ Vh @ A).norm() / A.norm()))
    assert procrustes_drift(B, A) <= float((B - A).norm() / A.norm())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 11}, r"rank r=11 must lie in 1 … 10, the layer's input width"),
        ({"r": 0}, r"rank r=0 must be a whole number of at least 1"),
        ({"r": 8.0}, r"rank r=8.0 must be a whole number of at least 1"),  # V[:, -8.0:] would crash
        ({"others": []}, "no out-of-task moments"),
        ({"null_space": "lapack"}, r"unknown null_space 'lapack': choose from random, in_task"),
        ({"objective": "all"}, r"unknown objective 'all': choose from least_energy, difference, ratio"),
        (
            {"objective": "ratio"},
            r"objective='ratio', null_space='random' look at the task's own features: give them",
        ),
        ({"own": "narrow"}, r"different widths \[9, 10\]"),
        ({"protect_rank": True}, r"protect_rank=True must be a whole number of at least 0"),
        ({"protect_energy": 1.5}, r"protect_energy=1.5 must lie in \[0, 1\]"),
    ],
)
def test_bad_input(change, message):
    arguments = {"others": tasks(2, 5, 10), "r": 2, "generator": generator()} | change
    if arguments.get("own") == "narrow":
        arguments["own"] = tasks(1, 5, 9)[0]
    with pytest.raises(ValueError, match=message):
        choose_directions(spectrum_of(arguments.pop("others")), **arguments)
