"""Samples in memory: choices across shapes, and parts that share no source."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lowrank.calibration.samples import divided
from onnx_lowrank.data import Dataset, Part


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
    assert bool({*rest.sources} & {*held.sources}) == bool(rest.notes)
    counts = Counter(sources).values()
    if len(counts) >= 2 and max(counts) == min(counts) and 0.2 < fraction < 0.8:
        assert not rest.notes
    larger = max(rest, held, key=len)
    assert min(map(len, larger.split(0.5, seed))) >= 1


def test_sources_of_one_size_are_held_out_in_the_share_asked_for() -> None:
    sources = np.repeat(np.arange(20).astype(str), 5)
    rest, held = Dataset((Part({"x": np.zeros((100, 1))}, None, sources),), frozenset(), None).split(0.25, 0)
    assert (len(rest), len(held)) == (75, 25)


def of_sizes(*sizes: int) -> Dataset:
    """Samples of sources a, b, c, ... of these sizes."""
    sources = np.repeat(np.array(list("abcdefgh"[: len(sizes)])), sizes)
    return Dataset((Part({"x": np.arange(float(sum(sizes)))[:, None]}, None, sources),), frozenset(), None)


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ((900, 50, 50), (900, 50, 50)),
        ((400, 300, 300), (400, 300, 300)),
        ((450, 450, 50, 50), (900, 50, 50)),
        ((250, 250, 250, 250), (500, 250, 250)),
        ((125,) * 8, (750, 125, 125)),
    ],
)
def test_fit_judge_and_held_out_have_sources_of_their_own(sizes: tuple[int, ...], found: tuple[int, ...]) -> None:
    samples, held_out = divided(of_sizes(*sizes), 0)
    parts = (samples.fit, samples.judge, held_out)
    assert (len(parts[0]), *sorted(map(len, parts[1:]), reverse=True)) == found
    names = [{*part.sources.tolist()} for part in parts if part.sources is not None]
    assert sum(map(len, names)) == len(set.union(*names)) == len(sizes)
    assert held_out.notes == ()


@pytest.mark.parametrize(
    ("sizes", "sources"),
    [
        ((1000,), "1 source, too few"),
        ((500, 500), "2 sources, too few or too unequal"),
        ((500, 490, 10), "3 sources, too few or too unequal"),
    ],
)
def test_sources_that_cannot_be_kept_apart_are_told(sizes: tuple[int, ...], sources: str) -> None:
    samples, held_out = divided(of_sizes(*sizes), 0)
    assert (len(samples.fit), len(samples.judge), len(held_out)) == (750, 125, 125)
    wanted = f"1000 samples of {sources} for 3 parts: samples of one source are on both sides of the split"
    assert held_out.notes == (wanted,)


def test_sources_too_unequal_for_whole_batches() -> None:
    part = Part({"x": np.arange(8.0)[:, None]}, None, np.array(["a"] * 7 + ["b"]))
    rest, held = Dataset((part,), frozenset(), 4).split(0.5, 0)
    assert (len(rest), len(held)) == (4, 4)
    assert held.notes[0].startswith("8 samples of 2 sources, too few or too unequal for 2 parts")


def everything(data: Dataset, batch: int = 7) -> list[list[float]]:
    """What is fed, batch by batch."""
    return [feeds["x"].ravel().tolist() for feeds in data.feeds(batch)]


@pytest.mark.parametrize("sources", [False, True])
def test_the_order_of_samples_makes_no_difference(sources: bool) -> None:
    rng = np.random.default_rng(0)
    parts = tuple(
        Part(
            {"x": rng.standard_normal((40, n))}, np.arange(40), rng.integers(0, 9, 40).astype(str) if sources else None
        )
        for n in (2, 1)
    )
    data = Dataset(parts, frozenset(), None)
    turned = Dataset(tuple(part.take(rng.permutation(40)) for part in parts[::-1]), frozenset(), None)
    (first, first_held), (second, second_held) = divided(data, 0), divided(turned, 0)
    for one, other in ((first.fit, second.fit), (first.judge, second.judge), (first_held, second_held)):
        assert everything(one) == everything(other)
        assert one.labels is not None
        assert other.labels is not None
        assert one.labels.tolist() == other.labels.tolist()
    assert sorted(everything(data.thinned(9), 1)) == sorted(everything(turned.thinned(9), 1))
    fixed, fixed_turned = (replace(one, batch=16).in_whole_batches() for one in (data, turned))
    assert {len(fixed), len(fixed_turned)} == {64}
    assert fixed.by_content().sha256 == fixed_turned.by_content().sha256


def test_texts_have_fingerprints_of_what_they_say() -> None:
    texts = ["one", "two", "three"]
    data, again = (
        Dataset((Part({"t": np.array(["".join(list(text)) for text in texts], dtype=object)}),), frozenset(), None)
        for _ in range(2)
    )
    assert data.fingerprints.tolist() == again.fingerprints.tolist()
    assert len(set(data.fingerprints)) == 3
    assert data.sha256 == again.sha256


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
