"""Python, Triton and C++ give one thing one number."""

import re
from pathlib import Path

import pytest

from minegan_fast.ops._op import DTYPE_CODES
from minegan_fast.ops._row_table import CHUNK, WORDS
from minegan_fast.ops.mmd import KERNELS
from minegan_fast.ops.row_score import KINDS
from minegan_fast.ops.row_update import RULES

CSRC = Path(__file__).parents[2] / "csrc"
DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPE_CODES)
HEADERS = (CSRC / "common.h").read_text() + (CSRC / "ops.h").read_text()


def fields(struct: str) -> list[str]:
    (body,) = re.findall(rf"struct {struct} {{(.*?)\n}};", HEADERS, re.DOTALL)
    return re.findall(r"(\w+)[,;]", re.sub(r"//.*", "", body))


@pytest.mark.parametrize(("name", "codes"), {"DType": DTYPES, "Rule": RULES, "Kind": KINDS, "Kernel": KERNELS}.items())
def test_a_code_is_the_place_in_the_enum(name, codes):
    (body,) = re.findall(rf"enum class {name} : int {{(.*?)}}", HEADERS)
    assert tuple(body.replace(" ", "").split(",")) == codes


def test_dtype_codes_count_up():
    assert [*DTYPE_CODES.values()] == [*range(len(DTYPE_CODES))]


def test_a_row_of_the_table_is_the_struct():
    assert fields("RowTensor") == [*WORDS]


def test_triton_reads_the_words_of_the_table():
    kernels = pytest.importorskip("minegan_fast.kernels.row_update")
    assert [getattr(kernels, word.upper()).value for word in (*WORDS, "words")] == [*range(len(WORDS) + 1)]


def test_items_are_of_one_size():
    assert f"kChunk = {CHUNK};" in (CSRC / "row_update.cu").read_text()
    assert pytest.importorskip("minegan_fast.kernels.row_update").CHUNK == CHUNK
