"""Builds the optional CUDA extension when it can; else installs pure Python and says why.

The extension is one shared library on torch's stable C ABI: it is compiled against torch's headers
once and runs with every torch from TORCH_FLOOR on. pip shows these lines with -v.

FASTATTN_CUDA_ARCHS: what nvcc compiles for, "80+PTX;90a" unless given; empty builds no extension.
CUDA_HOME:           the CUDA toolkit, before the nvcc on PATH and /usr/local/cuda.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_FLOOR = (2, 10)
DEFAULT_ARCHS = "80+PTX;90a"


def say(line):
    print(f"fastattn: {line}", flush=True)


def skipped(reason):
    say(f"extension skipped, the package is pure Python: {reason}")


def find_sources(root):
    """What goes into the library, relative to root; csrc/emulator serves the tests alone."""
    found = (path.relative_to(root) for path in root.glob("csrc/**/*"))
    return sorted(
        str(path)
        for path in found
        if path.suffix in (".cu", ".cpp") and "emulator" not in path.parts
    )


def find_nvcc():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [f"{home}/bin" for home in homes] + [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def find_torch():
    """(folder, (major, minor)) of the installed torch, which is never imported, or None.

    pip's isolated build hides the environment's packages from sys.path, but headers are all that
    is needed and they lie where the interpreter says.
    """
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for torch in importlib.metadata.distributions(name="torch", path=places):
        major, minor = re.match(r"(\d+)\.(\d+)", torch.version).groups()
        return Path(torch.locate_file("torch")), (int(major), int(minor))
    return None


def skip_reason(sources, archs, nvcc, torch):
    """Why no extension will be built, or None when all that it takes is there."""
    if not sources:
        return "csrc/ holds no sources"
    if not archs.strip():
        return "FASTATTN_CUDA_ARCHS is empty"
    if nvcc is None:
        return "nvcc was not found (looked in CUDA_HOME, PATH and /usr/local/cuda)"
    if torch is None:
        return "torch is not installed in this environment, and its headers are needed"
    if torch[1] < TORCH_FLOOR:
        floor, given = (".".join(map(str, version)) for version in (TORCH_FLOOR, torch[1]))
        return f"torch {given} is installed and its stable ABI needs torch >= {floor}"
    return None


def gencode_flags(archs):
    flags = []
    for entry in filter(None, (entry.strip() for entry in archs.split(";"))):
        arch = entry.removesuffix("+PTX")
        codes = [f"sm_{arch}"] + ([f"compute_{arch}"] if arch != entry else [])
        flags += [f"-gencode=arch=compute_{arch},code={code}" for code in codes]
    return flags


def nvcc_command(sources, output, archs, nvcc, torch_folder):
    major, minor = TORCH_FLOOR
    return [
        nvcc,
        *("-shared", "-O3", "-std=c++17", "--threads", os.environ.get("MAX_JOBS", "0")),
        *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
        *("-DUSE_CUDA", f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"),
        *("-I", "csrc", "-isystem", str(torch_folder / "include")),
        *gencode_flags(archs),
        *sources,
        *("-o", output, "-L", str(torch_folder / "lib")),
        *("-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"),
    ]


class BuildExtension(build_ext):
    """One nvcc command, and no failure of it fails the install."""

    def run(self):
        try:
            super().run()
        except (OSError, subprocess.CalledProcessError) as error:
            failed = isinstance(error, subprocess.CalledProcessError)
            skipped(f"nvcc exited with {error.returncode}, see above" if failed else error)
            self.extensions = self.distribution.ext_modules = []
            # The wheel's tag was chosen when there was an extension to come.
            self.distribution.get_command_obj("bdist_wheel").root_is_pure = True

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        archs = os.environ.get("FASTATTN_CUDA_ARCHS", DEFAULT_ARCHS)
        command = nvcc_command(ext.sources, str(output), archs, find_nvcc(), find_torch()[0])
        say("building the extension: " + " ".join(command))
        subprocess.run(command, check=True)


def main():
    sources = find_sources(ROOT)
    archs = os.environ.get("FASTATTN_CUDA_ARCHS", DEFAULT_ARCHS)
    reason = skip_reason(sources, archs, find_nvcc(), find_torch())
    if reason is not None:
        skipped(reason)
        setup()
        return
    setup(
        ext_modules=[Extension("fastattn._C", sources, py_limited_api=True)],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
