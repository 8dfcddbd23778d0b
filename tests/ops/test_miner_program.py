"""The tasks as numbers: what C++ and Triton read is what Python wrote."""

import re
from pathlib import Path

import pytest

from minegan_fast.ops import _miner_program as program
from minegan_fast.ops._miner_passes import planned
from minegan_fast.ops._miner_program import Shape

OPS = (Path(__file__).parents[2] / "csrc" / "ops.h").read_text()
SHAPE = Shape(2, 3, True, (4, 5, 6), "tanh", "affine", True, (7,), ((0.5, 0.25, 1.5),), 0)


def members(struct: str) -> list[str]:
    (body,) = re.findall(rf"struct {struct} {{(.*?)\n}};", OPS, re.DOTALL)
    return re.findall(r"(\w+)(?:\[\w+\])?[,;]", body)


@pytest.mark.parametrize(
    ("name", "codes"),
    {"MinerKind": program.KINDS, "MinerActivation": program.ACTIVATIONS, "MinerEpilogue": program.EPILOGUES}.items(),
)
def test_a_code_is_the_place_in_the_enum(name, codes):
    (body,) = re.findall(rf"enum class {name} : int {{(.*?)}}", OPS)
    assert tuple(body.replace(" ", "").split(",")) == codes


def test_a_task_is_the_struct():
    assert members("MinerRows") == [*program.Rows._fields]
    names = members("MinerTask")
    assert names[: len(program.HEADER)] == [*program.HEADER]
    operands = ["out", "raw", "copy", "h", "p", "q", "add", "matrix", "source"]
    assert names[len(program.HEADER) :] == ["depth", *operands, "gain", "add_scale", "scale"]
    assert f"sizeof(MinerTask) == {program.WORDS} * 8" in OPS
    assert f"kMinerTerms = {program.TERMS}, kMinerAdds = {program.ADDS}" in OPS


def test_triton_reads_the_words():
    kernels = pytest.importorskip("minegan_fast.kernels.miner")
    assert kernels._WORDS.value == program.WORDS
    assert kernels._FLOATS.value == 1 + program.ADDS + program.TERMS
    assert kernels._START.value == program.HEADER.index("scratch")
    assert kernels._DEPTHS.value == len(program.HEADER)
    assert kernels._OPERANDS.value == len(program.HEADER) + program.TERMS
    assert kernels._MATRICES.value == 6 + program.ADDS
    assert kernels._SOURCES.value == 6 + program.ADDS + program.TERMS
    assert (kernels._SCRATCH.value, kernels._NOTHING.value) == (program.SCRATCH, program.NOTHING)
    assert (kernels._SLOPE.value, kernels._EPSILON.value) == (program.SLOPE, program.EPSILON)


def test_the_words_of_a_task():
    plan = planned("forward", (SHAPE,), True)
    assert len(plan.words) == program.WORDS * len(plan.program.tasks)
    row = plan.words[: program.WORDS]
    assert dict(zip(program.HEADER, row, strict=False)) == {
        "kind": 0, "step": 0, "chain": 0, "miners": 2, "rows": 5, "columns": 3, "terms": 1, "adds": 1, "activation": 3,
        "epilogue": 0, "scratch": 0, "scratch_rows": plan.program.scratch[0],
    }  # fmt: skip
    assert memoryview(row).cast("B").cast("d")[-7:].tolist() == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
