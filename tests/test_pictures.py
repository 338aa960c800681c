"""The pictures of the documentation show what their captions say."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PICTURES = runpy.run_path(str(ROOT / "docs/pictures.py"))
PLAIN, DEFAULT, PAPER = PICTURES["KINDS"]


def test_in_each_layer_osrms_a_lets_less_through_than_a_random_one(tmp_path):
    features = PICTURES["packaged_features"](["questions", "sms_spam", "tweets"], num_samples=16)
    choice = PICTURES["choice_of_a"](features, "tweets", block=2)
    assert choice.energy == sorted(choice.energy, reverse=True) and len(choice.energy) == 384
    assert sum(choice.energy) == pytest.approx(1, rel=1e-9)
    assert sum(choice.energy[: choice.protected - 1]) < 0.9 <= sum(choice.energy[: choice.protected])
    layers = list(choice.passed[PLAIN])
    assert len(layers) == 6 and all(list(shares) == layers for shares in choice.passed.values())
    for layer in layers:
        random, ours, paper = (choice.passed[kind][layer] for kind in (PLAIN, DEFAULT, PAPER))
        assert 0 <= paper < ours < random < 1, layer
        assert random == pytest.approx(8 / 384, rel=0.5)  # r of n directions, at random
    PICTURES["plot_choice"](choice, "block 2", tmp_path / "choice.png")
    assert (tmp_path / "choice.png").read_bytes().startswith(b"\x89PNG")


def test_each_picture_is_small_and_shown():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    pictures = list((ROOT / "docs/pictures").iterdir())
    assert len(pictures) == 3
    for picture in pictures:
        assert picture.stat().st_size < 150_000 and f"](../pictures/{picture.name})" in pages, picture
