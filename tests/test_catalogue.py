"""Finding passes and decompositions, and building them by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from plugins import announce

from onnx_lowrank import catalogue
from onnx_lowrank.catalogue import build, discover, split
from onnx_lowrank.cli import run
from onnx_lowrank.decomposition import Decomposition
from onnx_lowrank.errors import InputError
from onnx_lowrank.passes.normalize import DEFAULT_NORMALIZE, FlushDenormals, FuseHardSwish
from onnx_lowrank.plan import PassSpec
from onnx_lowrank.recipe import parse_passes
from onnx_lowrank.transform import Pass


def test_passes_are_built_and_split() -> None:
    passes, decompositions = split(parse_passes("svd,flush_denormals{limit=1e-3},fuse_hard_swish{form=hard_swish}"))
    assert passes == [FlushDenormals(1e-3), FuseHardSwish("hard_swish")]
    assert [item.name for item in decompositions] == ["svd"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (PassSpec("fold_batchnorm"), "did you mean 'fold_batch_norm'?"),
        (PassSpec("xyz"), "list them with `onnx-lowrank passes`"),
        (
            PassSpec("flush_denormals", {"limi": "1"}),
            "got the option 'limi' of pass 'flush_denormals'; expected one of limit; correct the option",
        ),
        (
            PassSpec("remove_identity", {"x": "1"}),
            "got the option 'x' of pass 'remove_identity'; expected no option; correct the option",
        ),
        (
            PassSpec("flush_denormals", {"limit": "tiny"}),
            "got limit=tiny for pass 'flush_denormals'; expected a number; give another value",
        ),
        (
            PassSpec("fold_constants", {"copy_limit": "1.5"}),
            "got copy_limit=1.5 for pass 'fold_constants'; expected a whole number; give another value",
        ),
        (
            PassSpec("fuse_hard_swish", {"form": "relu"}),
            "got form=relu for pass 'fuse_hard_swish'; expected one of hard_sigmoid, hard_swish; give another value",
        ),
    ],
)
def test_passes_that_cannot_be_built(spec: PassSpec, message: str) -> None:
    with pytest.raises(InputError) as caught:
        build(spec)
    assert str(caught.value).endswith(message)


def test_the_catalogue_lists_both_kinds_with_options_and_one_line() -> None:
    entries = {entry.name: entry for entry in catalogue.catalogue()}
    assert {step.name for step in DEFAULT_NORMALIZE} <= entries.keys()
    assert entries["svd"].kind == "decomposition"
    assert entries["flush_denormals"].kind == "graph pass"
    assert entries["flush_denormals"].options == (catalogue.Option("limit", "a number", "1e-20"),)
    assert all(entry.description.endswith(".") for entry in entries.values())
    assert all(build(PassSpec(name)).name == name for name in entries)
    assert list(entries) == sorted(entries, key=lambda name: (entries[name].kind == "decomposition", name))


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from onnx_lowrank.passes.normalize import RemoveIdentity

@dataclass(frozen=True)
class ThirdParty(RemoveIdentity):
    name: ClassVar[str] = "third_party"
    strong: bool = False
    level: int | None = None
"""


@pytest.fixture
def plugin(installed: Path) -> Path:
    """Source file of a third party's package with a graph pass."""
    installed.write_text(PLUGIN)
    return installed


@pytest.mark.usefixtures("plugin")
def test_third_party_passes_come_from_entry_points() -> None:
    def options(**values: object) -> dict[str, object]:
        return vars(build(PassSpec("third_party", values)))

    assert options() == {"strong": False, "level": None}
    assert options(strong="true", level="3") == {"strong": True, "level": 3}
    assert options(strong=False, level=None) == {"strong": False, "level": None}
    with pytest.raises(InputError, match="expected true or false"):
        options(strong="maybe")
    with pytest.raises(InputError, match="expected a whole number or none"):
        options(level="high")


INCOMPLETE = """
from dataclasses import dataclass
from onnx_lowrank.decomposition import Decomposition

@dataclass(frozen=True)
class Half(Decomposition):
    name = "half"
    def refusal(self, shape): ...
    def ranks(self, shape, block): ...
    def chain(self, shape, rank): ...
"""
BARE = PLUGIN.replace("RemoveIdentity", "Pass").replace("passes.normalize", "transform").replace("(frozen=True)", "")
MUTABLE = f"{BARE}    def run(self, graph): ...\n"


@pytest.mark.parametrize(
    ("text", "attribute", "fault"),
    [
        ("import nowhere", "", "which fails with ModuleNotFoundError: No module named 'nowhere'"),
        ("1 / 0", "", "which fails with ZeroDivisionError: division by zero"),
        ("x =", "", "which fails with SyntaxError: invalid syntax ({module}.py, line 1)"),
        ("", "", "in which no pass or decomposition has a name"),
        (INCOMPLETE, "", "whose Half lacks exact_rank, factorize"),
        (MUTABLE, "", "whose ThirdParty is no frozen dataclass"),
        (
            PLUGIN.replace(" = None", "").replace("bool = False", "bool"),
            "",
            "whose ThirdParty has no default for strong, level",
        ),
        (
            PLUGIN.replace(": bool", ': "Bool"'),
            "",
            "whose ThirdParty has an option whose type cannot be read (name 'Bool' is not defined)",
        ),
        (PLUGIN, ":Missing", "which fails with AttributeError: module '{module}' has no attribute 'Missing'"),
        ("Three = 3", ":Three", "whose 3 is neither a pass nor a decomposition"),
        ("class Three: ...", ":Three", "whose Three is neither a pass nor a decomposition"),
        (PLUGIN.replace('= "third_party"', "= 3"), "", "whose ThirdParty has no name"),
    ],
)
def test_a_broken_plugin_ends_the_command_in_one_line(
    plugin: Path, text: str, attribute: str, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    plugin.write_text(text)
    announce(plugin, attribute)
    assert run(["passes"]) == 2
    right = (
        f"error: got the entry point 'mine' ({plugin.stem}{attribute}), {fault.format(module=plugin.stem)}; "
        "expected frozen dataclasses that are passes or decompositions; mend or remove that package\n"
    )
    assert capfd.readouterr() == ("", right)


@pytest.mark.parametrize(
    ("name", "other"), [("remove_identity", "normalize.remove_identity"), ("svd", "decompose.svd")]
)
def test_two_passes_of_one_name_are_refused(
    plugin: Path, name: str, other: str, capfd: pytest.CaptureFixture[str]
) -> None:
    plugin.write_text(PLUGIN.replace("third_party", name))
    assert run(["passes"]) == 2
    right = (
        f"error: got two passes called {name!r}, in onnx_lowrank.passes.{other} and {plugin.stem}; "
        "expected different names; remove one of the packages\n"
    )
    assert capfd.readouterr() == ("", right)


def test_formats_that_take_long_are_tried_only_by_name() -> None:
    tried = {"svd", "svd_input", "spatial_svd", "spatial_svd_reversed", "tucker2", "cp"}
    assert set(catalogue.default_decompositions()) == tried
    for entry in catalogue.catalogue():
        assert bool(entry.on_request) == (entry.kind == "decomposition" and entry.name not in tried)


def test_only_concrete_dataclasses_with_defaults_are_listed() -> None:
    assert all(issubclass(item, Pass | Decomposition) for item in discover().values())
    assert "factor" not in discover()
