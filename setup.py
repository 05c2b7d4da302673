"""Ahead-of-time build of the C++ extension; everything declarative is in pyproject.toml.

``SFPK_BUILD``: ``auto`` (default: build what can be built, with the CUDA kernels where nvcc and a torch with CUDA are,
and install in any case; what failed is kept in the package, in a file that is named at the first op), ``cpu`` or
``cuda`` (build this or fail), ``none`` (never build here; the extension is compiled at first use).
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import setup

ROOT = Path(__file__).resolve().parent
KEPT = 60  # last lines of a failed build


def load_build_flags():
    """``sfpk_kernels/_build.py`` by path: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("_sfpk_build", ROOT / "sfpk_kernels" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FLAGS = load_build_flags()


def check_versions():
    """End here, with the reason, where this Python, setuptools or torch is not supported."""
    reasons = [FLAGS.unsupported_python(), FLAGS.too_old("setuptools", setuptools.__version__)]
    try:
        import torch

        reasons.append(FLAGS.too_old("torch", torch.__version__))
    except ImportError:
        pass
    for reason in filter(None, reasons):
        raise SystemExit(f"setup.py: {reason}")


@contextlib.contextmanager
def copied_to(file):
    """What the compilers print, also in a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    own = os.dup(1), os.dup(2)
    with subprocess.Popen(["tee", str(file)], stdin=subprocess.PIPE, stdout=own[1], stderr=subprocess.DEVNULL) as tee:
        os.dup2(tee.stdin.fileno(), 1)
        os.dup2(tee.stdin.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), own):  # noqa: B905 - two each
                os.dup2(original, descriptor)
                os.close(original)


def extension(cuda):
    """The extension with or without CUDA kernels."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    return (CUDAExtension if cuda else CppExtension)(
        "sfpk_kernels._C",
        [str(path.relative_to(ROOT)) for path in FLAGS.sources(ROOT / "csrc", cuda)],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": FLAGS.cpp_flags(cuda), "nvcc": FLAGS.cuda_flags()},
    )


def extension_arguments():
    """``ext_modules`` and ``cmdclass`` for setup(), or nothing when there is nothing to build with."""
    mode = FLAGS.build_mode()
    if mode == "none":
        return {}
    FLAGS.put_ninja_on_path()
    cuda = False
    try:
        cuda = FLAGS.wants_cuda()
        if cuda:
            FLAGS.put_cuda_home()
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        if mode != "auto":
            raise SystemExit(
                f"SFPK_BUILD={mode} needs torch in the build environment: install torch, then run "
                "pip install --no-build-isolation ."
            ) from error
        print("sfpk_kernels: no torch in the build environment; the extension is compiled at first use")
        return {}
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", FLAGS.CUDA_ARCHITECTURES)

    class TolerantBuild(BuildExtension):
        """With SFPK_BUILD=auto a machine without working compilers still gets the package."""

        def build_extensions(self):
            failure = Path(self.get_ext_fullpath("sfpk_kernels._C")).parent / FLAGS.FAILURE_FILE
            failure.unlink(missing_ok=True)
            if mode != "auto":
                super().build_extensions()
                return
            failure.parent.mkdir(parents=True, exist_ok=True)
            told = []
            for with_cuda in [True, False] if cuda else [False]:
                for name, value in vars(extension(with_cuda)).items():
                    if not name.startswith("_"):  # those are setuptools' own notes about it
                        setattr(self.extensions[0], name, value)
                try:
                    with copied_to(failure):
                        super().build_extensions()
                    break
                except Exception as error:
                    lines = failure.read_text(errors="replace").splitlines()[-KEPT:] if failure.exists() else []
                    what = "with CUDA kernels" if with_cuda else "for the CPU"
                    told += [f"the extension {what} was not built: {error}", *(f"  | {line}" for line in lines), ""]
            else:
                for one in self.extensions:
                    one.optional = True
            if told:
                failure.write_text("\n".join(told))
                print("sfpk_kernels: " + "\n".join(told) + "the package works without", file=sys.stderr)
            else:
                failure.unlink(missing_ok=True)

    return {"ext_modules": [extension(cuda)], "cmdclass": {"build_ext": TolerantBuild}}


check_versions()
setup(
    # csrc travels inside the wheel, so that the extension can be compiled at first use.
    packages=[
        *setuptools.find_packages(include=["sfpk_kernels", "sfpk_kernels.*"]),
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
