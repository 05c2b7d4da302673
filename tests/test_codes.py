"""Codes and numbers that Python, C++ and CUDA share: the two places agree, and there is no third."""

import ast
import re
from enum import EnumMeta
from pathlib import Path

import pytest

from sfpk_kernels import _extension
from sfpk_kernels.ops import codes

ROOT = Path(__file__).resolve().parents[1]
CSRC = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))
PACKAGE = sorted((ROOT / "sfpk_kernels").rglob("*.py"))
OPS = [path for path in PACKAGE if "ops" in path.parts]
ENUM = r"enum (?:class )?(\w+) \{([^}]*)\}"


def code_of(path):
    """C++ without comments."""
    return re.sub(r"//.*", "", path.read_text())


def named(found):
    return sorted(str(path.relative_to(ROOT)) for path in found)


def plain(name):
    """kMeanAbsSaliency and MEAN_ABS_SALIENCY alike."""
    return name.removeprefix("k").replace("_", "").lower()


@pytest.fixture(scope="module")
def handed_out():
    return _extension.load().codes()


def test_python_and_cpp_agree(handed_out):
    ours = {
        name: {entry.name: entry.value for entry in value} if isinstance(value, EnumMeta) else value
        for name, value in vars(codes).items()
        if isinstance(value, int | float) or (isinstance(value, EnumMeta) and value.__module__ == codes.__name__)
    }
    theirs = {name: value for name, value in handed_out.items() if name != "FloatKind"}  # the kernels' own
    assert ours == theirs


def test_the_extension_hands_out_all_there_is(handed_out):
    """Whoever adds a code to the headers has to add it to codes(), and so to Python."""
    headers = code_of(ROOT / "csrc" / "codes.h") + code_of(ROOT / "csrc" / "cuda" / "selection_workspace.h")
    enums = dict(re.findall(ENUM, headers))
    assert set(enums) == {name for name, value in handed_out.items() if isinstance(value, dict)}
    for name, entries in enums.items():
        values, following = {}, 0
        for entry in entries.split(","):
            word, _, value = entry.partition("=")
            following = int(value) if value else following
            values[plain(word.strip())] = following
            following += 1
        assert values == {plain(word): value for word, value in handed_out[name].items()}, name
    declared = re.findall(r"^constexpr \w+ (k\w+ = [^;]*);", headers, re.MULTILINE)
    numbers = [part.split("=")[0].strip() for line in declared for part in line.split(",")]
    exposed = [plain(name) for name, value in handed_out.items() if not isinstance(value, dict)]
    assert len(numbers) == len(exposed)
    assert all(any(name.endswith(plain(number)) for name in exposed) for number in numbers), numbers


def test_no_code_is_defined_again_in_cpp():
    """Enumerators stand without their enum where it is defined, and nowhere else."""
    codes_h = ROOT / "csrc" / "codes.h"
    entries = {word.split("=")[0].strip() for _, body in re.findall(ENUM, code_of(codes_h)) for word in body.split(",")}
    assert {"kFloat", "kMeanAbsSaliency", "kCut", "kInt32"} <= entries
    again = re.compile(rf"(?<!::)\b({'|'.join(entries)})\b")
    assert named(path for path in CSRC if again.search(code_of(path))) == ["csrc/codes.h"]


@pytest.mark.parametrize(
    ("what", "where"),
    [
        (r"^(?:\w+ )*int64_t ceil_div\(", "csrc/integers.h"),
        (r"\+ [\w.]+ - 1\) /", "csrc/integers.h"),  # ceil_div written out
        (r"^(?:\w+ )*FloatKind kind_of\(", "csrc/received.h"),
        (r"ScalarType::BFloat16 *\?", "csrc/received.h"),  # kind_of written out
        (r"^(?:\w+ )*int64_t (?:bytes|size)_of\(FloatKind", "csrc/codes.h"),
        (r"\? 4u? : 2", "csrc/codes.h"),  # bytes_of written out
        (r"\b1e-0?6\b", "csrc/codes.h"),  # the tangent tolerance
        (r"\b65'?535\b", "csrc/codes.h"),
        (r"0x(?:7feb352d|846ca68b|9e3779b9|85ebca6b)u?\b", "csrc/codes.h"),
        (r"\bkGuessMargin =", "csrc/selection_keys.h"),
    ],
)
def test_helpers_stand_once_in_cpp(what, where):
    assert named(path for path in CSRC if re.search(what, code_of(path), re.MULTILINE)) == [where]


def numbers(path):
    """Numbers that the code of a module writes out."""
    return {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}


def test_numbers_stand_once_in_the_ops():
    random = (codes.MIX_FIRST, codes.MIX_SECOND, codes.ROW_STRIDE, codes.HIGH_STRIDE)
    for number in (codes.TANGENT_TOLERANCE, codes.MOST_ROWS, *random):
        assert named(path for path in OPS if number in numbers(path)) == ["sfpk_kernels/ops/codes.py"], number


def test_kernels_compare_with_names():
    """A Triton kernel asks for KIND == FACTORS, not for KIND == 2."""
    bare = re.compile(r"\b(KIND|SCORE|kind|score) *(==|!=|[<>]=?) *\d")
    assert named(path for path in OPS if bare.search(path.read_text())) == []
    assert named(path for path in CSRC if bare.search(code_of(path))) == []


def literals(path):
    """Lists, tuples, sets and keys of dicts that are written out, as sets of words."""
    for node in ast.walk(ast.parse(path.read_text())):
        parts = getattr(node, "elts", None) or getattr(node, "keys", None)
        if isinstance(parts, list):
            yield {part.value for part in parts if isinstance(part, ast.Constant)}


def test_scores_and_packings_are_listed_once():
    lists = [("value", "abs", "abs_saliency"), ("bool", "uint8", "int32")]
    again = [path for path in OPS for found in literals(path) if any(found.issuperset(words) for words in lists)]
    assert named(again) == []


def test_who_spells_a_choice_that_holds_where_present():
    """Only _dispatch.py knows the mark behind a backend's name."""
    spelled = [
        path
        for path in PACKAGE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr)
        and len(node.values) == 2
        and isinstance(node.values[1], ast.Constant)
        and node.values[1].value == "?"
    ]
    assert named(spelled) == []
