"""Samples in memory: choices across shapes, and parts that share no source."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lowrank.data import Dataset, Part
from onnx_lowrank.errors import InputError


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), min_size=3, max_size=30),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_no_source_falls_into_two_parts(samples: list[tuple[int, int]], fraction: float, seed: int) -> None:
    sources, lengths = zip(*sorted(samples, key=lambda sample: sample[1]), strict=True)
    parts = tuple(
        Part({"x": np.zeros((lengths.count(n), n))}, None, np.array([str(s) for s, m in samples if m == n]))
        for n in sorted(set(lengths))
    )
    data = Dataset(parts, frozenset(), None)
    rest, held = data.split(fraction, seed)
    assert len(rest) + len(held) == len(samples)
    assert min(len(rest), len(held)) >= 1
    assert rest.sources is not None
    assert held.sources is not None
    if len(set(sources)) > 1:
        assert not {*rest.sources} & {*held.sources}
    larger = max(rest, held, key=len)
    assert min(map(len, larger.split(0.5, seed))) >= 1


def test_sources_of_one_size_are_held_out_in_the_share_asked_for() -> None:
    sources = np.repeat(np.arange(20).astype(str), 5)
    rest, held = Dataset((Part({"x": np.zeros((100, 1))}, None, sources),), frozenset(), None).split(0.25, 0)
    assert (len(rest), len(held)) == (75, 25)


def test_sources_too_unequal_for_whole_batches() -> None:
    part = Part({"x": np.zeros((8, 1))}, None, np.array(["a"] * 7 + ["b"]))
    with pytest.raises(InputError) as caught:
        Dataset((part,), frozenset(), 4).split(0.5, 0)
    assert str(caught.value) == (
        "got 8 samples of 2 sources, too unequal for batches of 4; expected sources for two parts of whole batches; "
        "give samples of more sources"
    )


def test_sources_are_part_of_the_hash() -> None:
    arrays = {"x": np.zeros((4, 1))}
    hashes = {
        Dataset((Part(arrays, None, sources),), frozenset(), None).sha256
        for sources in (None, np.array(list("aabb")), np.array(list("abab")))
    }
    assert len(hashes) == 3


def test_choices_across_shapes() -> None:
    parts = tuple(
        Part({"x": np.arange(start, start + count)[:, None] * np.ones((1, width))}, np.arange(start, start + count))
        for start, count, width in ((0, 3, 2), (3, 4, 5))
    )
    data = Dataset(parts, frozenset(), None)
    chosen = data.take([6, 1, 3, 0])
    assert chosen.labels is not None
    assert chosen.labels.tolist() == [1, 0, 6, 3]
    assert [batch.rows.tolist() for batch in data.batches(2, [6, 1, 3, 0, 5])] == [[1, 0], [6, 3], [5]]
    assert len(data.take(slice(3)).parts) == 1


def test_labels_of_different_shapes() -> None:
    parts = tuple(Part({"x": np.zeros((2, n))}, np.full((2, n), n)) for n in (2, 3))
    labels = Dataset(parts, frozenset(), None).labels
    assert labels is not None
    assert [label.tolist() for label in labels] == [[2, 2], [2, 2], [3, 3, 3], [3, 3, 3]]
