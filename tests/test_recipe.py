"""What a user writes down: pass lists and recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.plan import PassSpec
from onnx_lowrank.recipe import Recipe, parse_passes, read_recipe


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("a", [PassSpec("a")]),
        (" a , b{x=1} ", [PassSpec("a"), PassSpec("b", {"x": "1"})]),
        ("a{x=1,some-name=true},b{}", [PassSpec("a", {"x": "1", "some_name": "true"}), PassSpec("b")]),
    ],
)
def test_passes_are_read(text: str, specs: list[PassSpec]) -> None:
    assert parse_passes(text) == specs


FORM = "expected name or name{option=value,...}, separated by commas; write it like that"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"got --passes '' with an empty name; {FORM}"),
        ("a,", f"got --passes 'a,' with an empty name; {FORM}"),
        ("a,,b", f"got --passes 'a,,b', unreadable at ',b'; {FORM}"),
        ("a{x=1", f"got --passes 'a{{x=1', unreadable at 'a{{x=1'; {FORM}"),
        ("a{x}", "got --passes 'a{x}' with the option 'x'; expected option=value; write it like that"),
    ],
)
def test_passes_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_passes(text)
    assert str(caught.value) == message


def test_a_recipe_is_read(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(
        'speedup = 2\npasses = ["fold_batch_norm", "svd", "flush_denormals{limit=1e-9}"]\n'
        'calibration = "data.npz"\nonly = ["conv*"]\nbisect = true\nthreads = 1\n'
    )
    assert read_recipe(file) == Recipe(
        speedup=2.0,
        passes=(PassSpec("fold_batch_norm"), PassSpec("svd"), PassSpec("flush_denormals", {"limit": "1e-9"})),
        calibration=tmp_path / "data.npz",
        only=("conv*",),
        bisect=True,
        threads=1,
    )


def test_functions_of_the_users_are_no_paths(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('calibration = "data:feeds"\neval = "photos"\nrefit = false\nsamples = 64\nmetric = "data:score"\n')
    expected = Recipe(calibration="data:feeds", eval=tmp_path / "photos", refit=False, samples=64, metric="data:score")
    assert read_recipe(file) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed-up = 2", "write 'speedup'"),
        ("xyzzy = 2", "leave it out"),
        ("threads = 1.5", "expected a whole number; give another value"),
        ("threads = true", "expected a whole number; give another value"),
        ('speedup = "fast"', "expected a number; give another value"),
        ('only = "conv"', 'expected a list of texts; write only = ["conv"]'),
        ('passes = "svd,tucker2"', 'expected a list of texts; write passes = ["svd,tucker2"]'),
        ("no-refit = true", "write refit = false"),
        ("passes = [1]", "expected a list of texts; give another value"),
        ("bisect = 1", "expected true or false; give another value"),
        ("calibration = 3", "expected a path; give another value"),
        ("= 3", "expected a recipe in TOML; mend the line named"),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_recipe(file)
    assert str(caught.value).endswith(message)
    assert str(file) in str(caught.value)


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a readable recipe; check the path"):
        read_recipe(tmp_path / "none.toml")
