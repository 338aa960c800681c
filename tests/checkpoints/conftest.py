"""Tiny models in folders, which the tests of whole checkpoints share."""

import pytest

from tests.helpers.checkpoints import noisy


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base model and three others."""
    root = tmp_path_factory.mktemp("trained")
    return {name: noisy(root / name, seed) for seed, name in enumerate(("base", "a", "b", "c"))}


@pytest.fixture
def base(trained):
    return trained["base"]


@pytest.fixture
def three(trained):
    return {name: trained[name] for name in ("a", "b", "c")}
