"""Compiled Triton kernels on a machine without a GPU, up to the driver's launch.

After `install()` kernels are compiled for sm_90 and launched by a driver that does nothing: the
host's side of a launch is left. TRITON_INTERPRET must not be set when Triton is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastattn import chips


class _Utilities:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": chips.shared_memory(90),
            "multiprocessor_count": chips.MULTIPROCESSORS[90],
            "warpSize": 32,
        }

    def fill_tma_descriptor_tiled(self, *facts: Any) -> tuple[Any, ...]:
        return facts  # of which the driver makes 128 bytes

    def unload_module(self, module: int) -> None:
        pass


class _Driver:
    utils = _Utilities()

    def __init__(self, run: Callable[..., None]) -> None:
        self.run = run

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        described, run = getattr(metadata, "tensordesc_meta", None), self.run
        if not described:
            return run
        from triton.backends.nvidia.driver import wrap_handle_tensordesc

        # Triton's own, from 3.8: of a descriptor, what is encoded, its sizes, its strides.
        launch = wrap_handle_tensordesc(
            lambda *given: run(*given[:-1], *given[-1]), source.signature, described
        )
        return lambda *given: launch(*given[:9], given[9:])

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def _nothing(*arguments: Any) -> None:
    pass


def install(run: Callable[..., None] = _nothing) -> None:
    """From here on, every launch of the process calls `run` with what Triton hands to the driver.

    That is the grid (3 numbers), the stream, the function, metadata (2), hooks (2), and then the
    kernel's arguments, in which TMA descriptors are expanded.
    """
    from triton.runtime import driver

    driver.set_active(_Driver(run))
