"""Installs a wheel into a fresh environment and tries it there: `make wheel` runs this.

    python tests/house/fresh_install.py dist/fastattn-*.whl

torch and the other dependencies, which are large and not tested here, are those of the interpreter
that runs this; fastattn comes only from the wheel.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

# Runs in the fresh environment.
TRY = """
import sys, torch, fastattn
from fastattn import extension

assert fastattn.__file__.startswith(sys.prefix), fastattn.__file__
x = torch.randn(3, 8)
expected = torch.nn.functional.layer_norm(x, (8,))
assert torch.allclose(fastattn.layer_norm(x), expected)
if "abi3" in sys.argv[1]:
    extension.load()
    print("ops of the extension:", *extension.registered())
if torch.cuda.is_available() and "abi3" in sys.argv[1]:
    x = x.cuda().half()
    ours = fastattn.layer_norm(x, backend="cuda")
    assert torch.allclose(ours, torch.nn.functional.layer_norm(x, (8,)), atol=1e-2)
"""


def try_wheel(wheel: Path, folder: Path) -> None:
    """Raises CalledProcessError if something there fails."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = Path(
        sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    )
    # A folder named in a .pth comes after the environment's own, and its own .pth files (editable
    # installs) are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True)
    subprocess.run([python, "-c", TRY, wheel.name], cwd=folder, check=True)
    subprocess.run([folder / "bin" / "fastattn", "doctor"], cwd=folder, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel.resolve()
    with tempfile.TemporaryDirectory() as folder:
        try:
            try_wheel(wheel, Path(folder))
        except subprocess.CalledProcessError as error:
            sys.exit(f"{wheel.name} fails in a fresh environment: {error}")
    print(f"{wheel.name} holds in a fresh environment")
