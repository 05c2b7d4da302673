"""Compiles stages of the Triton transition for a GPU that need not be there; prints registers, spills, shared memory.

    python -m tests.compile_triton 90 '[[10, "", []], [6, "theta gram", ["reduce", "update"]]]' --jobs 4

Prints one JSON list, a row per stage; an empty list asks for all stages. --jobs: so many processes compile at once.

Options of a case, separated by blanks: sized, weighted, theta, gram (the reduce pass sums Gram matrices), grads16 (fp16
gradients), masks16 and masksbf16 (particles), eps, squared.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sfpk_kernels.ops.transition import triton_backend, triton_kernels

STAGES = ("prepare", "reduce", "plan", "update", "measure", "plan rescale", "rescale", "finish", "distances", "whole")
VECTORS = ("weights", "saliency", "sizes", "mix", "guess", "moves")
INTEGERS = (
    "mask_stride", "residual_stride", "grad_stride", "n", "d", "chunk", "hop", "key_low", "key_high", "only",
    "first_column",
)  # fmt: skip
ALIGNED = ("mask_stride", "residual_stride", "grad_stride", "d", "hop")  # divisible by 16, as for most models


def constants_of(stage, n, options):
    tile = triton_backend.tiling(n, "sized" in options, "masksbf16" in options)
    grams = "gram" in options
    if grams:
        assert triton_backend.sums_gram_matrices(n, "sized" in options, "weighted" in options)
    matrices = (6 if "sized" in options else 3) if grams else 0
    size = max(8 * tile.n + matrices * tile.n**2, 4 * tile.n + tile.n**2)
    return {
        "STAGE": stage, "SIZE": size, "N": tile.n, "B": tile.columns, "PART": tile.part,
        "FLUSH": tile.flush // tile.columns, "WEIGHTED": "weighted" in options, "SQUARED": "squared" in options,
        "RETRACT": True, "REPEL": n > 1 and stage != "rescale", "PULL": n > 1, "GRAMS": grams,
        "HAS_EPS": "eps" in options, "BY_ANGLE": "angle" in options, "SKIP": False, "DISTANCES": tile.distances,
        "ROWS": n if tile.by_columns else 0,
    }, tile  # fmt: skip


def signature_of(constants, options):
    masks = "fp16" if "masks16" in options else "bf16" if "masksbf16" in options else "fp32"
    fixed = {"masks": f"*{masks}", "grads": "*fp16" if "grads16" in options else "*fp32", "residual": "*bf16"}
    signature = {}
    for name in triton_kernels.transition.arg_names:
        floats = name.endswith(("_high", "_low")) and name not in INTEGERS
        default = "constexpr" if name in constants else "i32" if name in INTEGERS else "fp32" if floats else "*fp64"
        signature[name] = fixed.get(name, "*fp32" if name in VECTORS else default)
    absent = [] if masks == "bf16" else ["residual"]
    absent += [] if "sized" in options else ["sizes", "total_of_sizes"]
    absent += [] if "theta" in options else ["weights"]
    for name in absent:
        signature[name], constants[name] = "constexpr", None
    return signature


def compile_stage(stage, n, options, capability):
    constants, tile = constants_of(stage, n, options)
    signature = signature_of(constants, options)
    names = triton_kernels.transition.arg_names
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in ALIGNED or signature[name][0] == "*"
    }
    source = ASTSource(triton_kernels.transition, signature, constants, aligned)
    launch = {"num_warps": tile.warps, "num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)


def resources(compiled):
    """Registers and bytes of local memory per thread, as the assembler counted them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK", "LOCAL")}
    return {"registers": found["REG"], "local": found["STACK"] + found["LOCAL"], "shared": compiled.metadata.shared}


def stages_of(n, options):
    tile = triton_backend.tiling(n, "sized" in options, "masksbf16" in options)
    for stage in STAGES:
        if stage == "distances" and tile.distances:
            continue
        if stage == "whole" and not (tile.distances and "gram" in options):
            continue
        yield stage


def in_processes(function, tasks, jobs):
    """[function(*task) for task in tasks], by so many processes."""
    if jobs == 1:
        return [function(*task) for task in tasks]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(pool.map(function, *zip(*tasks, strict=True)))


def row_of(n, text, stage, capability):
    row = {"triton": triton.__version__, "n": n, "options": text, "stage": stage}
    return {**row, **resources(compile_stage(stage, n, text.split(), capability))}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int)
    parser.add_argument("cases", type=json.loads)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    tasks = [
        (n, text, stage, given.capability)
        for n, text, stages in given.cases
        for stage in stages or stages_of(n, text.split())
    ]
    print(json.dumps(in_processes(row_of, tasks, given.jobs)))


if __name__ == "__main__":
    main()
