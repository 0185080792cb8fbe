"""Builds the optional CUDA extension when it can; else installs pure Python and says why.

Whoever asks for the extension, by FASTATTN_CUDA_ARCHS or by build_ext, gets it or an error.

The extension is one shared library on torch's stable C ABI: it is compiled against torch's headers
once and runs with every torch from TORCH_FLOOR on. pip shows these lines with -v.

FASTATTN_CUDA_ARCHS: architectures for nvcc, "80+PTX;90a" unless given; empty builds no extension.
CUDA_HOME:           the CUDA toolkit, before the nvcc on PATH and /usr/local/cuda.
MAX_JOBS:            how many files are compiled at once, as many as there are cores unless given.
"""

import importlib.metadata
import os
import re
import shutil
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "cuda"  # of the objects

sys.path.append(str(ROOT / "csrc"))

import builder  # noqa: E402

TORCH_FLOOR = (2, 10)
DEFAULT_ARCHS = "80+PTX;90a"


def say(line):
    print(f"fastattn: {line}", flush=True)


def asked():
    """Whether the extension was asked for: to be without it is an error then."""
    return bool(entries_of(os.environ.get("FASTATTN_CUDA_ARCHS", ""))) or "build_ext" in sys.argv


def go_without(reason):
    if asked():
        sys.exit(f"fastattn: the extension was asked for and cannot be built: {reason}")
    say(f"extension skipped, the package is pure Python: {reason}")


def find_sources(root):
    """The library's sources, relative to root; csrc/emulator is only for the tests."""
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
    if not entries_of(archs):
        return "FASTATTN_CUDA_ARCHS is empty"
    for entry in entries_of(archs):
        number = re.fullmatch(r"(\d{2,3})[af]?(\+PTX)?", entry)
        if number is None:
            return (
                f"FASTATTN_CUDA_ARCHS has the entry {entry!r}; it is a list such as "
                f"{DEFAULT_ARCHS!r}, of compute capabilities without a dot"
            )
        if int(number[1]) < 80:
            return f"FASTATTN_CUDA_ARCHS has the entry {entry!r}; the kernels need 80 or later"
    if nvcc is None:
        return "nvcc was not found (looked in CUDA_HOME, PATH and /usr/local/cuda)"
    if torch is None:
        return "torch is not installed in this environment, and its headers are needed"
    if torch[1] < TORCH_FLOOR:
        floor, given = (".".join(map(str, version)) for version in (TORCH_FLOOR, torch[1]))
        return f"torch {given} is installed and its stable ABI needs torch >= {floor}"
    return None


def entries_of(archs):
    return list(filter(None, archs.replace(" ", "").split(";")))


def gencode_flags(archs):
    flags = []
    for entry in entries_of(archs):
        arch = entry.removesuffix("+PTX")
        codes = [f"sm_{arch}"] + ([f"compute_{arch}"] if arch != entry else [])
        flags += [f"-gencode=arch=compute_{arch},code={code}" for code in codes]
    return flags


def torch_version_flag():
    major, minor = TORCH_FLOOR
    return f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"


def compile_command(archs, nvcc, torch_folder):
    """builder.py adds a source and an output to it."""
    return [
        *(nvcc, "-x", "cu", "-std=c++17", "-O3", *gencode_flags(archs)),
        *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"),
        *("-DUSE_CUDA", torch_version_flag(), "-I", "csrc", "-isystem", f"{torch_folder}/include"),
        *(f'-DFASTATTN_ARCHS="{archs}"', "-DFASTATTN_TOOLKIT=CUDART_VERSION"),
    ]


def link_command(nvcc, torch_folder):
    """The CUDA runtime is linked statically, as nvcc does of itself, and its symbols are hidden."""
    return [
        *(nvcc, "-shared", "-L", f"{torch_folder}/lib"),
        *("-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu"),
        *("-Xlinker", "--exclude-libs=ALL", "-Xlinker", "-z", "-Xlinker", "defs"),
    ]


def manylinux(library):
    """The oldest manylinux whose systems have the symbols that a library wants.

    By the versions in its string table, as auditwheel does. 2_28 is that of torch's own wheels;
    those of libstdc++ came with the glibc of these releases (auditwheel's manylinux-policy.json);
    of a later one it is only known that this system has it.
    """
    of_cxx = {24: 28, 28: 31, 29: 34, 30: 35, 33: 39}
    glibc = [28]
    for name, release in re.findall(rb"(?<=\0)(GLIBC_2|GLIBCXX_3\.4)\.(\d+)", library):
        if name == b"GLIBC_2":
            glibc.append(int(release))
        else:
            known = (g for cxx, g in of_cxx.items() if int(release) <= cxx)
            glibc.append(next(known, None) or int(os.confstr("CS_GNU_LIBC_VERSION").split(".")[1]))
    return f"manylinux_2_{max(glibc)}"


class BuildExtension(build_ext):
    """Runs nvcc; its failure fails only an install that asked for the extension."""

    def run(self):
        try:
            super().run()
        except (OSError, builder.BuildError) as error:
            go_without(str(error).splitlines()[0])
            self.extensions = self.distribution.ext_modules = []
            # The wheel's tag was chosen when there was an extension to come.
            self.distribution.get_command_obj("bdist_wheel").root_is_pure = True

    def build_extension(self, ext):
        archs = ";".join(entries_of(os.environ.get("FASTATTN_CUDA_ARCHS", DEFAULT_ARCHS)))
        max_jobs = os.environ.get("MAX_JOBS", "")
        jobs = int(max_jobs) if max_jobs.isdecimal() else builder.cores()
        nvcc, (torch_folder, _) = find_nvcc(), find_torch()
        compiler = compile_command(archs, nvcc, torch_folder)
        say(f"building the extension for {archs}, {jobs} processes: " + " ".join(compiler))
        began = time.monotonic()
        builder.build(
            compiler, ext.sources, ROOT, BUILD,
            linker=link_command(nvcc, torch_folder), library="_C.so", jobs=jobs,
            version=str(os.stat(nvcc).st_mtime_ns), say=say,
        )  # fmt: skip
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(BUILD / "_C.so", output)
        say(f"built the extension for {archs} in {time.monotonic() - began:.0f} s: {output.name}")


class TaggedWheel(bdist_wheel):
    """Says of a wheel with the extension which systems it runs on."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        for library in Path(self.bdist_dir).glob("fastattn/_C.*"):
            platform = platform.replace("linux", manylinux(library.read_bytes()), 1)
        return python, abi, platform


def main():
    sources = find_sources(ROOT)
    archs = os.environ.get("FASTATTN_CUDA_ARCHS", DEFAULT_ARCHS)
    reason = skip_reason(sources, archs, find_nvcc(), find_torch())
    if reason is not None:
        go_without(reason)
        setup()
        return
    setup(
        ext_modules=[Extension("fastattn._C", sources, py_limited_api=True)],
        cmdclass={"build_ext": BuildExtension, "bdist_wheel": TaggedWheel},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
