"""The pass manager's contract, finding and building passes by name, recipes and bisection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from builders import model, value
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, helper

from onnx_lowrank.errors import InvalidResultError, PassError
from onnx_lowrank.graph import Graph, make_tensor
from onnx_lowrank.pass_manager import PassManager, bisect
from onnx_lowrank.passes.normalize import FlushDenormals, RemoveIdentity
from onnx_lowrank.transform import Note, Pass, PassResult


def two_nodes() -> ModelProto:
    nodes = [helper.make_node("Identity", ["x"], ["t"], name="id"), helper.make_node("Relu", ["t"], ["y"], name="relu")]
    return model(nodes, [value("x", (2, 3))], [value("y", (2, 3))], {"spare": np.zeros(3, np.float32)})


@dataclass(frozen=True)
class Scripted(Pass):
    """Does what the test says."""

    edit: Callable[[Graph], None]
    claim: bool = True
    name: ClassVar[str] = "scripted"

    def run(self, graph: Graph) -> PassResult:
        """Run the script."""
        self.edit(graph)
        return PassResult(self.claim, (Note("relu", "edited"),))


def nothing(graph: Graph) -> None:
    """Leave the graph alone."""


def drop_relu(graph: Graph) -> None:
    graph.main.remove(graph.main.nodes[-1])


def rename_output(graph: Graph) -> None:
    graph.main.proto.output[0].name = graph.main.nodes[-1].output[0] = "z"


def replace_weight(graph: Graph) -> None:
    graph.main.initializers["spare"] = make_tensor("spare", np.ones(3, np.float32))


def crash(graph: Graph) -> None:
    drop_relu(graph)
    raise ZeroDivisionError("division by zero")


def interrupt(graph: Graph) -> None:
    drop_relu(graph)
    raise KeyboardInterrupt


def test_records_say_what_was_done_in_order() -> None:
    graph = Graph(two_nodes())
    records = PassManager([FlushDenormals(limit=1e-10), RemoveIdentity()]).run(graph)
    assert [(record.name, record.modified, record.options) for record in records] == [
        ("flush_denormals", False, {"limit": 1e-10}),
        ("remove_identity", True, {}),
    ]
    assert records[1].notes == (Note("id", "Identity id removed: it does nothing"),)
    assert all(record.seconds >= 0 for record in records)


REPORT = "leave the pass out with --passes, and report it"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            Scripted(nothing),
            f"got modified=True for a graph that is the same in pass 'scripted'; expected an honest report; {REPORT}",
        ),
        (
            Scripted(replace_weight, claim=False),
            f"got modified=False for a graph that changed in pass 'scripted'; expected an honest report; {REPORT}",
        ),
        (
            Scripted(rename_output),
            f"got changed inputs or outputs in pass 'scripted'; expected the same signature; {REPORT}",
        ),
        (
            Scripted(crash),
            f"got ZeroDivisionError: division by zero in pass 'scripted'; expected a pass that runs through; {REPORT}",
        ),
    ],
)
def test_a_bad_pass_is_named_and_the_last_valid_model_kept(step: Pass, message: str) -> None:
    graph = Graph(two_nodes())
    with pytest.raises(PassError) as caught:
        PassManager([RemoveIdentity(), step]).run(graph)
    assert str(caught.value) == message
    assert [node.name for node in graph.main.nodes] == ["relu"]
    assert graph.main.outputs == ["y"]


def test_an_invalid_result_is_undone() -> None:
    graph = Graph(two_nodes())
    with pytest.raises(PassError, match=r"an invalid graph: .* in pass 'scripted'") as caught:
        PassManager([Scripted(drop_relu)]).run(graph)
    assert isinstance(caught.value.__cause__, InvalidResultError)
    assert graph.to_proto() == two_nodes()


def test_an_interrupt_passes_through_and_is_undone() -> None:
    graph = Graph(two_nodes())
    with pytest.raises(KeyboardInterrupt):
        PassManager([Scripted(interrupt)]).run(graph)
    assert graph.to_proto() == two_nodes()


def test_an_invalid_model_is_refused_before_the_first_pass() -> None:
    graph = Graph(two_nodes())
    drop_relu(graph)
    with pytest.raises(InvalidResultError):
        PassManager([]).run(graph)


def test_an_error_in_a_rule_names_the_node() -> None:
    graph = Graph(two_nodes())
    del graph.main.nodes[0].input[:]
    with pytest.raises(PassError) as caught:
        PassManager([RemoveIdentity()], checker=nothing).run(graph)
    assert (caught.value.pass_name, caught.value.node) == ("remove_identity", "id")


@given(count=st.integers(1, 200), data=st.data())
def test_bisection_finds_the_first_bad_rewrite(count: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, count))
    asked: list[int] = []

    def differs(k: int) -> bool:
        asked.append(k)
        return k >= first

    assert bisect(count, differs) == first
    assert len(asked) <= count.bit_length() + 2


@given(st.lists(st.booleans(), min_size=1))
def test_bisection_without_monotony_returns_a_place_where_the_answer_changes(bad: list[bool]) -> None:
    states = [False, *bad]
    found = bisect(len(bad), lambda k: states[k])
    if not bad[-1]:
        assert found is None
    else:
        assert found is not None
        assert states[found]
        assert not states[found - 1]


def test_bisection_of_models_that_differ_from_the_start() -> None:
    assert bisect(3, lambda _: True) == 0
