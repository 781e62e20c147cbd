"""The pictures of the documentation are those that the library draws today."""

import importlib.util
import pathlib

import numpy as np
import pytest
from problems import cpu_kernels_only, needs_kernels

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"

Image = pytest.importorskip("PIL.Image")


def load_pictures():
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pictures = load_pictures()


@needs_kernels
@cpu_kernels_only
@pytest.mark.parametrize("name", pictures.PICTURES)
def test_picture_is_up_to_date(name):
    pattern, lines = pictures.PICTURES[name]
    committed = DOCS / "images" / f"{name}.png"
    assert committed.stat().st_size < 100_000
    with Image.open(committed) as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(pictures.draw(pattern(), lines)))


def test_all_pictures_are_shown_and_all_that_are_shown_exist():
    text = "".join(page.read_text() for page in DOCS.glob("*.md"))
    for name in pictures.PICTURES:
        assert f"(images/{name}.png)" in text
    assert {p.stem for p in (DOCS / "images").glob("*.png")} == set(pictures.PICTURES)
