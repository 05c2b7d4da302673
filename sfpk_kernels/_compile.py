"""Compiles the extension in a process of its own: ``python -m sfpk_kernels._compile FOLDER cpu|cuda``.

FOLDER is there afterwards, with the library in it, or not at all. What the compilers say goes to the output.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from . import _build


def main(folder: Path, cuda: bool) -> None:
    """Build beside FOLDER, import what was built, and give it its name."""
    if cuda:
        _build.put_cuda_home()
        os.environ["TORCH_CUDA_ARCH_LIST"] = _build.cuda_architectures()
    from torch.utils import cpp_extension

    _build.put_ninja_on_path()
    building = building_folder(folder, os.getpid())
    building.mkdir()
    source = _build.source_dir()
    cpp_extension.load(
        name="_C",
        sources=[str(path) for path in _build.sources(source, cuda)],
        extra_include_paths=[str(source.resolve())],
        extra_cflags=_build.cpp_flags(cuda),
        extra_cuda_cflags=_build.cuda_flags(),
        build_directory=str(building),
        with_cuda=cuda,
        verbose=True,
    )
    try:
        building.rename(folder)
    except OSError:  # where files cannot be locked, another process may have been first
        if not any(folder.glob("*.so")):
            raise
        shutil.rmtree(building, ignore_errors=True)


def building_folder(folder: Path, process: int | str) -> Path:
    """Where a process builds what FOLDER is to become."""
    return folder.with_name(f"{folder.name}.building-{process}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "cuda")
