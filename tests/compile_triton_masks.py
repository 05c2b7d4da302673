"""Compiles the Triton kernels of selection, masked weights and averages of gradients for a GPU that need not be there.

    python -m tests.compile_triton_masks 90 --jobs 4

Prints one JSON list: registers, spilled bytes and shared memory of each kernel and variant.
"""

import argparse
import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sfpk_kernels.ops.averaging import triton_kernels as averaging
from sfpk_kernels.ops.codes import MaskKind, Score
from sfpk_kernels.ops.masking import triton_kernels as masking
from sfpk_kernels.ops.selection import triton_kernels as selection

from .compile_triton import in_processes, resources

POINTERS = {
    "values": "*fp32", "saliency": "*fp32", "excluded": "*u8", "always": "*u8", "state": "*i64", "bins": "*i64",
    "ties": "*i64", "k": "*i64", "candidates": "*i64", "threshold": "*fp32", "tie_end": "*i64", "weights": "*fp32",
    "grads": "*fp32", "averages": "*fp32", "sums": "*fp64",
}  # fmt: skip
RANK = {"SCORE": Score.MEAN_ABS_SALIENCY.value, "EXCLUDES": True, "BLOCK": 1024, "TILES": 16}
APPLY = {"SCORE": Score.ABS_SALIENCY.value, "SINGLE": False, "PART": True, "BITS": 8, "BLOCK": 1024}
RESULTS = ((False, "*fp32"), (True, "*fp64"))  # written, or added to
VARIANTS = [
    *((selection.count_digits, {**RANK, "SHIFT": shift}, {}) for shift in (24, 0)),
    (selection.choose_digit, {}, {}),
    (selection.count_ties, RANK, {}),
    (selection.find_chunk, {"BLOCK": 1024}, {}),
    (selection.find_tie, RANK, {}),
    *(
        (
            selection.write_mask,
            {"SCORE": Score.ABS_SALIENCY.value, "EXCLUDES": True, "ALWAYS": True, "UNIT": unit, "BLOCK": 1024},
            {"out": out},
        )
        for unit, out in ((1, "*u8"), (8, "*u8"), (32, "*i32"))
    ),
    *(
        (masking.apply, {**APPLY, "KIND": kind.value}, {"mask": mask, "out": out})
        for kind, mask, out in (
            (MaskKind.BOOL, "*u8", "*fp32"),
            (MaskKind.PACKED, "*u8", "*fp16"),
            (MaskKind.FACTORS, "*bf16", "*bf16"),
            (MaskKind.CUT, "*fp32", "*fp32"),
        )
    ),
    *((masking.products, {"ADDS": adds, "BLOCK": 1024}, {"out": out}) for adds, out in RESULTS),
    *((masking.group_sums, {"ADDS": adds, "G": 4, "WIDE": 256}, {"out": out}) for adds, out in RESULTS),
    *(
        (
            averaging.average,
            {"AVERAGES": averages, "WRITES": averages, "FAR": True, "BLOCK": 1024, "TILES": 8},
            {"grads": kind, "averages": kind},
        )
        for averages, kind in ((False, "*fp32"), (True, "*fp32"), (True, "*bf16"), (True, "*fp16"))
    ),
]


def compile_kernel(kernel, constants, pointers, capability):
    signature = {}
    for name in kernel.arg_names:
        default = (
            "fp32"
            if name in ("scale", "share")
            else "i64"
            if name in ("begin", "end", "first", "low", "high", "d")
            else "i32"
        )
        kind = {**POINTERS, **pointers}.get(name, default)
        signature[name] = "constexpr" if name in constants else kind
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*"}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


def row_of(index, capability):
    kernel, constants, pointers = VARIANTS[index]
    row = {"triton": triton.__version__, "kernel": kernel.fn.__name__, "constants": constants, "pointers": pointers}
    return {**row, **resources(compile_kernel(kernel, constants, pointers, capability))}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    tasks = [(index, given.capability) for index in range(len(VARIANTS))]
    print(json.dumps(in_processes(row_of, tasks, given.jobs)))


if __name__ == "__main__":
    main()
