"""Plans: JSON round trip, digest, and the text of every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lowrank.errors import InputError
from onnx_lowrank.plan import KEEP, Choice, PassSpec, Plan

NUMBERS = st.floats(0, 1e6, allow_nan=False)
TEXT = st.text(max_size=12)
CHOICES = st.builds(
    Choice,
    key=TEXT,
    node=TEXT,
    method=st.sampled_from([KEEP, "svd", "tucker2"]),
    rank=st.lists(st.integers(1, 999), max_size=3).map(tuple),
    predicted_error=NUMBERS,
    predicted_ms=st.none() | NUMBERS,
)
SPECS = st.builds(PassSpec, TEXT, st.dictionaries(TEXT, st.integers() | st.booleans() | TEXT, max_size=2))
PLANS = st.builds(
    Plan,
    model_sha256=TEXT,
    layers=st.lists(CHOICES, max_size=4, unique_by=lambda choice: choice.key).map(tuple),
    passes=st.lists(SPECS, max_size=3).map(tuple),
    data_sha256=st.none() | TEXT,
    versions=st.dictionaries(TEXT, TEXT, max_size=2),
    memory_limit=st.integers(1, 1 << 40),
)


def small() -> Plan:
    return Plan("ab" * 32, (Choice("conv", "conv", "svd", (8,), 0.1, 1.5),), (PassSpec("fold_constants"),))


@settings(deadline=None, max_examples=60)
@given(PLANS)
def test_round_trip(plan: Plan) -> None:
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text
    assert Plan.from_json(text).digest == plan.digest


def test_a_file_round_trip_keeps_unicode(tmp_path: Path) -> None:
    plan = Plan("0" * 64, (Choice("schicht/größe", "größe", "svd", (4,)),))
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json(), encoding="utf-8")
    assert Plan.read(path) == plan


def test_digest_changes_with_what_decides_the_model_and_nothing_else() -> None:
    plan = small()
    conv = plan.layers[0]

    def with_choice(**changes: Any) -> Plan:
        return Plan(plan.model_sha256, (Choice(**{**vars(conv), **changes}),), plan.passes)

    same = [with_choice(predicted_ms=None), Plan(plan.model_sha256, plan.layers, plan.passes, "data")]
    other = [
        with_choice(rank=(9,)),
        with_choice(method="tucker2"),
        with_choice(key="other"),
        Plan("cd" * 32, plan.layers, plan.passes),
        Plan(plan.model_sha256, plan.layers, (PassSpec("fold_constants", {"limit": 1}),)),
        Plan(plan.model_sha256, (), plan.passes),
    ]
    assert {p.digest for p in same} == {plan.digest}
    assert len({p.digest for p in [plan, *other]}) == 1 + len(other)


def test_choice_by_key() -> None:
    plan = Plan("", (Choice("a", "a", KEEP), Choice("b", "b", "svd", (2,))))
    assert plan.choice("b") is plan.layers[1]
    assert plan.choice("c") is None
    assert [choice.keeps for choice in plan.layers] == [True, False]


def test_pass_spec_reads_as_it_is_written() -> None:
    assert str(PassSpec("fold_constants")) == "fold_constants"
    assert str(PassSpec("fold_constants", {"limit": 3, "deep": True})) == "fold_constants{limit=3,deep=True}"


def edited(edit: Callable[[dict[str, Any]], object]) -> str:
    raw = json.loads(small().to_json())
    edit(raw)
    return json.dumps(raw)


MEND = "expected a plan file; compare with a fresh one"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{",
            "got plan that is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); "
            "expected a plan file; make it with `plan`",
        ),
        (edited(lambda p: p.update(schema=2)), "got schema 2 in plan; expected schema 1; make the plan again"),
        (edited(lambda p: p.pop("schema")), f"got plan with a bad field (KeyError: 'schema'); {MEND}"),
        (edited(lambda p: p.pop("layers")), f"got plan with a bad field (KeyError: 'layers'); {MEND}"),
        (edited(lambda p: p["layers"][0].pop("method")), f"got plan with a bad field (KeyError: 'method'); {MEND}"),
        (
            edited(lambda p: p["layers"][0].update(rank=[0])),
            f"got plan with a bad field (ValueError: rank [0] of layer conv); {MEND}",
        ),
        (
            edited(lambda p: p["layers"][0].update(rank=[8.0])),
            f"got plan with a bad field (ValueError: rank [8.0] of layer conv); {MEND}",
        ),
        (
            edited(lambda p: p["layers"][0].update(rank=[True])),
            f"got plan with a bad field (ValueError: rank [True] of layer conv); {MEND}",
        ),
        (
            edited(lambda p: p["layers"][0].update(rank=8)),
            f"got plan with a bad field (TypeError: 'int' object is not iterable); {MEND}",
        ),
        (
            edited(lambda p: p["layers"][0].update(predicted_ms="fast")),
            f"got plan with a bad field (ValueError: could not convert string to float: 'fast'); {MEND}",
        ),
        (
            edited(lambda p: p.update(versions=[])),
            f"got plan with a bad field (AttributeError: 'list' object has no attribute 'items'); {MEND}",
        ),
        (
            edited(lambda p: p.update(memory_limit=0)),
            f"got plan with a bad field (ValueError: memory_limit 0); {MEND}",
        ),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Plan.from_json(text)
    assert str(caught.value) == message


@pytest.mark.parametrize("text", ["[]", "1", "null", '"plan"', '{"schema": 1, "layers": [3]}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^got plan with a bad field \("):
        Plan.from_json(text)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    missing, binary = tmp_path / "none.json", tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError) as caught:
        Plan.read(missing)
    assert str(caught.value) == (
        f"got {missing} ([Errno 2] No such file or directory: '{missing}'); expected a readable plan file; "
        "check the path"
    )
    with pytest.raises(InputError, match=r"binary\.json .*expected a readable plan file; check the path$"):
        Plan.read(binary)
