"""Synthetic inputs: shapes from the user or guessed and said, values that a model can take."""

from __future__ import annotations

import numpy as np
import pytest
from builders import model, value
from onnx import TensorProto, helper

from onnx_lowrank.errors import InputError
from onnx_lowrank.signature import TensorSpec, index_bounds, signature_of
from onnx_lowrank.synthetic import batch_size, resolve_shapes, synthetic_feeds
from onnx_lowrank.target import InputShapes, Target

IDS = TensorSpec("input_ids", TensorProto.INT64, ("batch", "seq"))
MASK = TensorSpec("attention_mask", TensorProto.INT64, ("batch", "seq"))
IMAGE = TensorSpec("x", TensorProto.FLOAT, ("N", 3, "H", "W"))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("N", 3, "H", "W"), (1, 3, 224, 224)),
        ((None, None, None, None), (1, 3, 224, 224)),
        (("N", 3, 48, "W"), (1, 3, 48, 224)),
        (("N", "H", "W", 3), (1, 224, 224, 3)),
        (("N", 64, "H", "W"), (1, 64, 64, 64)),
        (("N", "T", 80), (1, 64, 80)),
        (("seq", "batch", 80), (64, 1, 80)),
        ((), ()),
        ((2, 5), (2, 5)),
    ],
)
def test_open_dimensions_are_guessed(shape: tuple[int | str | None, ...], expected: tuple[int, ...]) -> None:
    shapes, notes = resolve_shapes([TensorSpec("x", TensorProto.FLOAT, shape)], {})
    assert shapes == {"x": expected}
    assert bool(notes) == any(not isinstance(dim, int) for dim in shape)


def test_the_note_says_what_was_taken_and_how_to_change_it() -> None:
    _, notes = resolve_shapes([IMAGE], {})
    assert notes == ["input 'x' float Nx3xHxW is taken as 1x3x224x224; set it with --shape x=1x3x224x224"]


def test_a_shape_given_binds_the_symbols_of_other_inputs() -> None:
    shapes, notes = resolve_shapes([MASK, IDS], {"input_ids": (2, 128)})
    assert shapes == {"attention_mask": (2, 128), "input_ids": (2, 128)}
    assert notes == []


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"y": (1,)}, "got --shape for unknown input 'y'; expected one of 'x'; name one of these"),
        (
            {"x": (1, 3, 5)},
            "got --shape x=1x3x5 with 3 dimensions; expected 4 as in input 'x' float Nx3xHxW; correct it",
        ),
        (
            {"x": (1, 4, 5, 5)},
            "got --shape x=1x4x5x5; expected a shape that fits input 'x' float Nx3xHxW; "
            "change the open dimensions only",
        ),
    ],
)
def test_shapes_that_do_not_fit(given: dict[str, tuple[int, ...]], text: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_shapes([IMAGE], given)
    assert str(caught.value) == text


def test_inputs_that_are_no_tensors_are_refused() -> None:
    with pytest.raises(
        InputError, match="got input 's', which is no tensor; expected tensor inputs; use another model"
    ):
        resolve_shapes([TensorSpec("s", TensorProto.UNDEFINED, ())], {})


def test_values_fit_what_the_names_say() -> None:
    def ints(name: str, shape: tuple[int, ...] = (1, 6)) -> TensorSpec:
        return TensorSpec(name, TensorProto.INT64, shape)

    specs = [MASK, IDS, ints("token_type_ids"), ints("position_ids"), ints("lengths", (1,)), ints("sr", ())]
    specs.append(TensorSpec("keep", TensorProto.BOOL, (3,)))
    specs.append(TensorSpec("words", TensorProto.STRING, (2,)))
    feeds = synthetic_feeds(specs, None, seed=1, bounds={"input_ids": (100, 110)})
    assert (feeds["attention_mask"] == 1).all()
    assert feeds["input_ids"].min() >= 100
    assert feeds["input_ids"].max() <= 110
    assert set(feeds["token_type_ids"].ravel().tolist()) <= {0, 1}
    assert feeds["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert feeds["lengths"].tolist() == [6]
    assert int(feeds["sr"]) == 16_000
    assert feeds["keep"].dtype == np.bool_
    assert feeds["words"].tolist() == ["text", "text"]
    assert all(feeds[spec.name].dtype == spec.dtype for spec in specs)


@pytest.mark.parametrize(
    "elem_type", [TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16]
)
def test_real_numbers_are_standard_normal_and_seeded(elem_type: int) -> None:
    spec = TensorSpec("x", elem_type, (100, 100))
    first, again, other = (synthetic_feeds([spec], None, seed)["x"] for seed in (3, 3, 4))
    values = first.astype(np.float64)
    assert first.dtype == spec.dtype
    assert abs(values.mean()) < 0.05
    assert abs(values.std() - 1) < 0.05
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_index_bounds_follow_inputs_to_their_tables() -> None:
    nodes = [
        helper.make_node("Cast", ["ids"], ["ids64"], to=TensorProto.INT64),
        helper.make_node("Gather", ["large", "ids64"], ["a"]),
        helper.make_node("Gather", ["small", "ids64"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    tables = {"large": np.ones((50, 4), np.float32), "small": np.ones((7, 4), np.float32)}
    proto = model(nodes, [value("ids", [1, "S"], TensorProto.INT32)], [value("y", [1, "S", 4])], tables)
    assert index_bounds(proto) == {"ids": (0, 6)}


def test_the_signature_leaves_out_inputs_with_a_default() -> None:
    node = helper.make_node("Add", ["x", "w"], ["y"])
    proto = model(
        [node], [value("x", ["N", 2]), value("w", [2])], [value("y", ["N", 2])], {"w": np.ones(2, np.float32)}
    )
    signature = signature_of(proto)
    assert [spec.name for spec in signature.inputs] == ["x"]
    assert str(signature.outputs[0]) == "'y' float Nx2"


def test_the_batch_is_that_of_the_target() -> None:
    assert batch_size([IMAGE], Target(threads=1)) == 1
    assert batch_size([IMAGE], Target(threads=1, shapes=(InputShapes({"x": (8, 3, 4, 4)}),))) == 8
