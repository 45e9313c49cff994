"""Samples from a function of the user's: taken as yielded, and every way it may fail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from onnx import TensorProto
from samples import IMAGE, fed, refusal

from onnx_lowrank.data import read_samples
from onnx_lowrank.signature import TensorSpec


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """Writes the module `source_of_mine` into the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "source_of_mine", raising=False)
    return lambda body: Path("source_of_mine.py").write_text(f"import numpy as np\n{body}\n")


FEEDS = "source_of_mine:feeds"


def test_a_function_yields_feeds(module: Callable[[str], object]) -> None:
    module(
        "def feeds():\n"
        "    for n, size in ((2, 4), (1, 6), (3, 4)):\n"
        "        yield {'x': np.full((n, 3, size, size), size, np.float32), 'label': [size] * n}"
    )
    data = read_samples(FEEDS, [IMAGE])
    assert [array.shape[2] for array in fed(data)] == [4] * 5 + [6]
    assert data.labels is not None
    assert data.labels.tolist() == [4] * 5 + [6]
    assert (data.sources, data.origin) == (None, FEEDS)


def test_an_endless_function_is_asked_for_what_is_needed_only(module: Callable[[str], object]) -> None:
    module(
        "asked = []\n"
        "def feeds():\n"
        "    while True:\n"
        "        asked.append(1)\n"
        "        yield {'x': np.ones((2, 3, 1, 1), np.float32)}"
    )
    assert len(read_samples(FEEDS, [IMAGE], limit=5)) == 5
    assert len(sys.modules["source_of_mine"].asked) == 3


def test_feeds_without_a_common_axis_are_samples(module: Callable[[str], object]) -> None:
    specs = [TensorSpec("x", TensorProto.FLOAT, ("T", 2)), TensorSpec("rate", TensorProto.INT64, ())]
    module(
        "def feeds():\n"
        "    for length in (3, 5, 3):\n"
        "        yield {'x': np.ones((length, 2), np.float32), 'rate': 8000, 'label': 'yes', 'source': [length]}"
    )
    data = read_samples(FEEDS, specs)
    assert [(f["x"].shape, f["rate"].shape) for f in data.feeds(4)] == [((3, 2), ()), ((3, 2), ()), ((5, 2), ())]
    assert data.labels is not None
    assert data.sources is not None
    assert (data.labels.tolist(), data.sources.tolist()) == (["yes"] * 3, ["3", "3", "5"])


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (
            "feeds = 3",
            f"{FEEDS} of type int; expected a function; name another one",
        ),
        (
            "other = 3",
            f"{FEEDS}, which module 'source_of_mine' lacks; expected a function of it; correct the name",
        ),
        (
            "1 / 0",
            f"{FEEDS}, whose import failed (ZeroDivisionError: division by zero); "
            "expected a module that can be imported from the current folder; mend it",
        ),
        (
            "def feeds(): return 3",
            f"{FEEDS}, which failed (TypeError: 'int' object is not iterable); "
            "expected a function without arguments that yields feeds; mend it",
        ),
        (
            "def feeds():\n    yield {'x': np.ones((1, 3, 2, 2), np.float32)}\n    raise KeyError('z')",
            f"{FEEDS}, which failed (KeyError: 'z'); expected a function without arguments that yields feeds; mend it",
        ),
        ("def feeds(): return []", f"no samples in {FEEDS}; expected at least one; add samples"),
        (
            "def feeds(): yield [1]",
            f"feed 0 of {FEEDS} of type list; expected a dict of arrays by input name; yield dicts",
        ),
        (
            "def feeds(): yield {'x': np.ones((3, 2, 2), np.float32)}",
            f"'x' with 3 axes in feed 0 of {FEEDS}; expected the input 'x' float Nx3xHxW; yield what it takes",
        ),
        (
            "def feeds(): yield {'y': np.ones(2)}",
            f"no array 'x' in feed 0 of {FEEDS}; expected one per input: 'x'; add the missing",
        ),
        (
            "def feeds(): yield {'x': np.full((1, 3, 2, 2), np.nan, np.float32)}",
            f"12 NaN or infinite values in array 'x' of feed 0 of {FEEDS}; expected finite values; clean the data",
        ),
    ],
)
def test_functions_that_are_refused(module: Callable[[str], object], body: str, text: str) -> None:
    module(body)
    assert refusal(FEEDS) == text


def test_a_module_that_is_not_there() -> None:
    assert refusal("no_such_module:feeds") == (
        "no_such_module:feeds, whose import failed (ModuleNotFoundError: No module named 'no_such_module'); "
        "expected a module that can be imported from the current folder; mend it"
    )
