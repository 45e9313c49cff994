"""Decompositions of third parties are held to the protocol, in one line that says whose fault it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from roads import network, save
from tables import conv_layer

from onnx_lowrank.candidates import candidate
from onnx_lowrank.catalogue import build
from onnx_lowrank.cli import run
from onnx_lowrank.decomposition import Decomposition
from onnx_lowrank.errors import InputError, PassError
from onnx_lowrank.layer import LayerShape
from onnx_lowrank.plan import Choice, PassSpec, Plan
from onnx_lowrank.third_party import ThirdParty

SHAPE = LayerShape(1, 12, 8, (3, 3))
MINE = '''
from dataclasses import dataclass

import numpy as np

from onnx_lowrank.chain import Chain, Stage
from onnx_lowrank.decomposition import Factorization
from onnx_lowrank.errors import InputError
from onnx_lowrank.passes.decompose.svd import Svd


class Made(Factorization):
    def __init__(self, made):
        self.made = made

    def error(self, rank):
        return self.made.error(rank)

    def spectral_error(self, rank):
        return self.made.spectral_error(rank)

    def factors(self, rank):
        return self.made.factors(rank)

{made}

@dataclass(frozen=True)
class Mine(Svd):
    """Somebody's."""

    name = "mine"
    level: int = 1

    def factorize(self, weight, gram=None, *, most=None):
        return Made(super().factorize(weight))

{mine}
'''
REMEDY = "mend or remove that package, or leave it out with --passes"


def mine(source: Path, *, made: str = "", method: str = "", **options: object) -> Decomposition:
    """The installed method with other methods in its classes."""
    source.write_text(MINE.format(made=f"    {made}", mine=f"    {method}"))
    found = build(PassSpec("mine", options))
    assert isinstance(found, Decomposition)
    return found


def used(method: Decomposition) -> None:
    """All that the tool asks of a method."""
    weight = np.random.default_rng(0).standard_normal(SHAPE.weight).astype(np.float32)
    assert method.refusal(SHAPE) is None
    rank = method.ranks(SHAPE, 4)[0]
    method.exact_rank(SHAPE)
    method.misfit(SHAPE, rank)
    method.chain(SHAPE, rank)
    made = method.factorize(weight)
    made.error(rank)
    made.spectral_error(rank)
    made.factors(rank)
    made.data_free(rank)


def test_options_are_those_of_the_method(installed: Path) -> None:
    method = mine(installed, level=3)
    assert isinstance(method, ThirdParty)
    assert (method.name, method.options, method.whole_rows) == ("mine", {"level": 3}, True)
    used(method)


def test_numbers_of_numpy_become_pythons(installed: Path) -> None:
    text = "def error(self, rank): return np.float32(0.5)\n    spectral_error = error"
    method = mine(installed, made=text, method="def ranks(self, shape, block): return [(r,) for r in np.arange(1, 4)]")
    layer = conv_layer("l", np.ones(SHAPE.weight, np.float32))
    rank = method.ranks(SHAPE, 1)[1]
    made = method.factorize(layer.read())
    one = candidate(layer, method, made, rank, 1)
    choice = Choice("l", "l", one.method, one.rank, one.error)
    assert json.loads(Plan("0" * 64, (choice,)).to_json())["layers"][0]["rank"] == [2]
    assert [type(number) for number in (one.error, made.spectral_error(rank))] == [float, float]


@pytest.mark.parametrize(
    "text",
    [
        "def refusal(self, shape): return 1 / 0",
        "def ranks(self, shape, block): return 1 / 0",
        "def exact_rank(self, shape): return 1 / 0",
        "def misfit(self, shape, rank): return 1 / 0",
        "def chain(self, shape, rank): return 1 / 0",
        "def factorize(self, weight, gram=None, *, most=None): return 1 / 0",
        "made: def error(self, rank): return 1 / 0",
        "made: def spectral_error(self, rank): return 1 / 0",
        "made: def factors(self, rank): return 1 / 0",
        "made: def data_free(self, rank): return 1 / 0",
    ],
)
def test_exceptions_name_the_method_and_the_line(installed: Path, text: str) -> None:
    parts = {"made": text[6:]} if text.startswith("made: ") else {"method": text}
    method = mine(installed, **parts)
    line = installed.read_text().partition("1 / 0")[0].count("\n") + 1
    with pytest.raises(PassError) as caught:
        used(method)
    assert str(caught.value) == (
        f"got ZeroDivisionError: division by zero ({installed.name}, line {line}) for 8->12 3x3 in pass 'mine'; "
        f"expected a decomposition that runs through; {REMEDY}; -v shows the traceback"
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("made", "method", "got", "expected"),
    [
        ("", "def refusal(self, shape): return ''", "the refusal ''", "a sentence, or None"),
        ("", "def refusal(self, shape): return False", "the refusal False", "a sentence, or None"),
        ("", "def misfit(self, shape, rank): return 3", "the misfit 3", "a sentence, or None"),
        ("", "def factorize(self, weight, gram=None, *, most=None): ...", "NoneType from factorize", "a Factorization"),
        (
            "",
            "def chain(self, shape, rank): return Chain('mine', (Stage(1, 12, 8, (1, 1)),), 'gscxy->gscxy')",
            "a chain that gives (1, 12, 8, 1, 1) at rank (1,)",
            "(1, 12, 8, 3, 3)",
        ),
        (
            "",
            "def chain(self, shape, rank): return super().chain(shape, tuple(np.array(rank)))",
            "sizes of stages that are no int at rank (1,)",
            "Python's whole numbers",
        ),
        (
            "def error(self, rank): return float('nan')",
            "",
            "error nan at rank (1,)",
            "a finite number, not negative",
        ),
        ("def error(self, rank): return -0.5", "", "error -0.5 at rank (1,)", "a finite number, not negative"),
        (
            "def spectral_error(self, rank): return np.inf",
            "",
            "spectral error inf at rank (1,)",
            "a finite number, not negative",
        ),
        (
            "def factors(self, rank): return self.made.factors(rank)[:1]",
            "",
            "factors of shapes [(1, 1, 8, 3, 3)] at rank (1,)",
            "[(1, 1, 8, 3, 3), (1, 12, 1, 1, 1)]",
        ),
        (
            "def factors(self, rank): return [np.nan * array for array in self.made.factors(rank)]",
            "",
            "factors that are not all finite at rank (1,)",
            "finite floats",
        ),
    ],
)
def test_what_does_not_keep_to_the_protocol(installed: Path, made: str, method: str, got: str, expected: str) -> None:
    with pytest.raises(PassError) as caught:
        used(mine(installed, made=made, method=method))
    assert str(caught.value) == f"got {got} for 8->12 3x3 in pass 'mine'; expected {expected}; {REMEDY}"


def test_errors_raised_on_purpose_are_its_own(installed: Path) -> None:
    method = mine(installed, method="def ranks(self, shape, block): raise InputError('a', 'b', 'c')")
    with pytest.raises(InputError, match=r"^got a; expected b; c$"):
        used(method)


def test_options_that_do_not_fit_together(installed: Path) -> None:
    text = "def __post_init__(self):\n        if self.level < 1: raise ValueError('level is counted from 1')"
    with pytest.raises(InputError) as caught:
        mine(installed, method=text, level=0)
    assert str(caught.value) == (
        "got level=0 for pass 'mine' (level is counted from 1); expected options it takes; give other values"
    )


def test_an_exception_while_it_is_built(installed: Path) -> None:
    with pytest.raises(PassError) as caught:
        mine(installed, method="def __post_init__(self): 1 / 0")
    assert str(caught.value).startswith(f"got ZeroDivisionError: division by zero ({installed.name}, line ")


@pytest.mark.usefixtures("quick")
def test_a_command_ends_in_one_line_and_writes_nothing(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    save(network(), folder)
    mine(installed, made="def error(self, rank): return 1 / 0")
    line = installed.read_text().partition("1 / 0")[0].count("\n") + 1
    command = ["optimize", "model.onnx", "-o", "out.onnx", "--threads", "1", "--keep-macs", "0.5"]
    assert run(command) == 4
    said = capfd.readouterr().err
    told = f"error: got ZeroDivisionError: division by zero ({installed.name}, line {line}) for "
    assert said.splitlines()[-1].startswith(told)
    assert "Traceback" not in said
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]
    assert run(["-v", *command]) == 4
    assert "Traceback" in capfd.readouterr().err
