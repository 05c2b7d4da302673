"""Ahead-of-time build of the C++ extension; everything declarative is in pyproject.toml.

``SFPK_BUILD``: ``auto`` (default: build when torch and a compiler are there, else install without; with the CUDA
kernels where nvcc and a torch with CUDA are), ``cpu`` or ``cuda`` (build this or fail), ``none`` (never build here; the
extension is compiled at first use).
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def load_build_flags():
    """``sfpk_kernels/_build.py`` by path: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("_sfpk_build", ROOT / "sfpk_kernels" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extension_arguments():
    """``ext_modules`` and ``cmdclass`` for setup(), or nothing when there is nothing to build with."""
    flags = load_build_flags()
    mode = flags.build_mode()
    if mode == "none":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        if mode != "auto":
            raise SystemExit(
                f"SFPK_BUILD={mode} needs torch in the build environment: install torch, then run "
                "pip install --no-build-isolation ."
            ) from error
        print("sfpk_kernels: no torch in the build environment; the extension is compiled at first use")
        return {}
    flags.put_ninja_on_path()

    class TolerantBuild(BuildExtension):
        """With SFPK_BUILD=auto a machine without a working compiler still gets the package."""

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                if mode != "auto":
                    raise
                print(
                    f"sfpk_kernels: the extension was not built ({error}); "
                    "the package works without it, on the reference backend",
                    file=sys.stderr,
                )
                for extension in self.extensions:
                    extension.optional = True

    cuda = flags.wants_cuda()
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", flags.CUDA_ARCHITECTURES)
    extension = (CUDAExtension if cuda else CppExtension)(
        "sfpk_kernels._C",
        [str(path.relative_to(ROOT)) for path in flags.sources(ROOT / "csrc", cuda)],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": flags.cpp_flags(cuda), "nvcc": flags.cuda_flags()},
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": TolerantBuild}}


setup(
    # csrc travels inside the wheel, so that the extension can be compiled at first use.
    packages=[
        "sfpk_kernels",
        "sfpk_kernels.baselines",
        "sfpk_kernels.bench",
        "sfpk_kernels.report",
        "sfpk_kernels.cli",
        "sfpk_kernels.compat",
        "sfpk_kernels.demo",
        "sfpk_kernels.energy",
        "sfpk_kernels.integrations",
        "sfpk_kernels.ops",
        "sfpk_kernels.ops.bits",
        "sfpk_kernels.ops.masking",
        "sfpk_kernels.ops.selection",
        "sfpk_kernels.ops.transition",
        "sfpk_kernels.csrc",
        "sfpk_kernels.csrc.cpu",
        "sfpk_kernels.csrc.cuda",
    ],
    package_dir={"sfpk_kernels.csrc": "csrc"},
    package_data={
        "sfpk_kernels": ["py.typed"],
        "sfpk_kernels.csrc": ["*.h", "*.cpp"],
        "sfpk_kernels.csrc.cpu": ["*.h", "*.cpp"],
        "sfpk_kernels.csrc.cuda": ["*.h", "*.cuh", "*.cpp", "*.cu"],
    },
    **extension_arguments(),
)
