"""The emulator of csrc/emulator: it finds planted bugs, and its primitives do what the GPU's do."""

from __future__ import annotations

import ctypes
import json

import numpy as np
import pytest
import torch
from emulator.library import build_programs

from fastattn.ops.common import dropout

PROGRAMS = [f"tests/emulator/programs/{name}.cu" for name in ("bugs", "primitives")]

# A program of programs/bugs.cu, and words that its report must have.
BUGS = {
    # The threads that wait, for what, and who ended.
    "missing_barrier": ["deadlock", "threads 0-31: at sync_block (32 of 64 threads", "threads 32-63: ended"],
    "crossed_barriers": ["deadlock", "block: (0, 0, 0)", "threads 0-31: at named barrier 1", "threads 32-63: at named barrier 2"],
    "missing_arrival": ["deadlock", "threads 0-63: at named barrier 3 (64 of 96 threads", "threads 64-95: ended"],
    "counts_differ": ["named barrier 1: thread counts differ", "32", "64"],
    "arrives_twice": ["named barrier 1: a warp arrives twice"],
    "number_of_barrier": ["named barrier 16", "numbers 1 to 15"],
    "odd_count": ["named barrier 1 with 48 threads", "multiple of 32"],
    "count_beyond_block": ["named barrier 1: waits for 96 threads, the block has 64"],
    "read_beyond": ["out of bounds in global memory", "thread: 63", "read of 4 bytes at byte 256 of an input of 256 bytes"],
    "read_before": ["out of bounds in global memory", "thread: 0 ", "at byte -4 of an input of 256 bytes"],
    "vector_beyond": ["out of bounds in global memory", "write of 16 bytes at byte 256 of an output of 256 bytes"],
    "shared_beyond": ["out of bounds in shared memory", "write of 4 bytes at shared byte 256", "bounds: 256 bytes"],
    "shared_before": ["out of bounds in shared memory", "at shared byte -4"],
    "copy_beyond": ["out of bounds in global memory", "read of 16 bytes at byte 256 of an input"],
    "matrix_beyond": ["out of bounds in shared memory", "thread: 16", "read of 16 bytes at shared byte 256"],
    "null_place": ["no tensor gave", "read of 4 bytes"],
    "write_of_padding": ["write outside the tensor's elements", "of an output of 120 bytes (shape (4, 6), strides (8, 1)"],
    "unwritten_shared": ["read of uninitialised shared memory", "thread: 37", "shared byte 20"],
    "unwritten_global": ["read of uninitialised global memory", "thread: 5", "byte 20 of an output"],
    "unwritten_partial": ["read of uninitialised global memory", "of an input of 256 bytes"],
    "half_written_matrix": ["read of uninitialised shared memory", "read of 16 bytes at shared byte 240"],
    "read_after_write": ["race on shared memory", "read of ", "write of ", "before: "],
    "write_after_read": ["race on shared memory", "read of ", "write of ", "before: "],
    "write_after_write": ["race on shared memory", "write of 4 bytes", "before: write of thread"],
    "ring": ["race on shared memory", "before: "],
    "arrival_is_no_wait": ["race on shared memory", "before: write of thread"],
    "chain": ["race on shared memory", "before: "],
    "within_warp": ["race on shared memory", "read of ", "write of ", "before: "],
    "between_blocks": ["race on global memory", "before: write of thread", "of block ("],
    "between_bytes": ["race on shared memory", "write of 2 bytes"],
    "global_without_barrier": ["race on global memory", "before: "],
    "atomic_and_plain": ["race on global memory", "before: "],
    "no_commit": ["read under an asynchronous copy that is not waited for", "before: write of thread"],
    "no_wait": ["read under an asynchronous copy that is not waited for"],
    "wait_of_one": ["read under an asynchronous copy that is not waited for"],
    "store_under_copy": ["write under an asynchronous copy that is not waited for"],
    "wait_without_barrier": ["shared memory"],  # not begun, under way, or a race
    "copy_after_read": ["shared memory", "before: "],
    "misaligned_vector": ["misaligned access to global memory", "to 4 bytes, must be to 16"],
    "misaligned_pair": ["misaligned access to shared memory", "to 4 bytes, must be to 8"],
    "misaligned_scalar": ["misaligned access to shared memory", "to 2 bytes, must be to 4"],
    "misaligned_copy": ["misaligned access to shared memory", "to 8 bytes, must be to 16"],
    "misaligned_matrix": ["misaligned access to shared memory", "thread: 9 ", "must be to 16"],
    "half_of_a_warp": ["divergence", "shuffle"],
    "two_primitives": ["divergence", "different primitives", "shuffle", "ballot"],
    "two_lines": ["divergence", "different primitives", "shuffle"],
    "barrier_of_lanes": ["divergence", "sync_block", "ended"],
    "loop_of_lanes": ["divergence", "sync_warp"],
    "product_of_lanes": ["divergence", "mma_16x8x16"],
    "barriers_of_lanes": ["divergence", "lanes of a warp name different barriers"],
    "threads_beyond_bound": ["illegal launch", "96 threads", "bound (FA_KERNEL) is 64"],
    "threads_beyond_block": ["illegal launch", "not 1056"],
    "threads_odd": ["illegal launch", "not 48"],
    "threads_none": ["illegal launch", "not 0"],
    "shared_too_large": ["illegal launch", "232449 bytes of shared memory", "at most 232448"],
    "grid_too_high": ["illegal launch", "grid y is 65536"],
}  # fmt: skip
FOUND_FAST = [
    "deadlock",
    "no tensor gave",
    "out of bounds",
    "divergence",
    "illegal launch",
    "misaligned",
    "named barrier",
]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build_programs(PROGRAMS, "programs")))
    library.run_program.restype = ctypes.c_char_p
    library.run_program.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_uint64]
    library.fastattn_emulator_counts_json.restype = ctypes.c_char_p
    library.fastattn_emulator_set_seed.argtypes = [ctypes.c_uint64]
    library.draw_words.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int]
    for name in ["narrow", "widen", "exponentials"]:
        getattr(library, name).argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int,
        ]
    return library


def report(library: ctypes.CDLL, name: str, bug: bool, seed: int) -> str:
    text: bytes = library.run_program(name.encode(), bug, seed)
    return text.decode()


def at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def counts(library: ctypes.CDLL) -> dict[str, dict[str, int]]:
    return json.loads(library.fastattn_emulator_counts_json())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", BUGS)
def test_bug_is_found(library: ctypes.CDLL, name: str) -> None:
    for seed in range(8):
        text = report(library, name, True, seed)
        for words in [*BUGS[name], f"kernel: {name}", f"seed: {seed}"]:
            assert words in text
        # Programs without an illegal launch say where.
        assert "illegal launch" in text or "programs/bugs.cu:" in text
        assert text == report(library, name, True, seed), "a seed repeats the run"


@pytest.mark.parametrize("name", BUGS)
def test_right_twin_passes(library: ctypes.CDLL, name: str) -> None:
    for seed in range(20):
        assert report(library, name, False, seed) == ""


def test_every_program_has_words(library: ctypes.CDLL) -> None:
    assert "no program nonsense" in report(library, "nonsense", True, 0)


def test_fast_checks(library: ctypes.CDLL) -> None:
    library.fastattn_emulator_check_level(0)
    try:
        for name, words in BUGS.items():
            text = report(library, name, True, 0)
            found = any(start in words[0] for start in FOUND_FAST)
            assert (words[0] in text) if found else text == "", name
    finally:
        library.fastattn_emulator_check_level(1)
    assert "race" in report(library, "write_after_write", True, 0)


# --- numbers ---


def patterns(bfloat16: bool) -> tuple[np.ndarray, torch.Tensor]:
    bits = np.arange(65536, dtype=np.uint16)
    dtype = torch.bfloat16 if bfloat16 else torch.float16
    return bits, torch.from_numpy(bits.view(np.int16)).view(dtype).float()


@pytest.mark.parametrize("bfloat16", [False, True])
def test_widening_of_all_patterns(library: ctypes.CDLL, bfloat16: bool) -> None:
    bits, expected = patterns(bfloat16)
    wide = np.empty(65536, np.float32)
    library.widen(at(bits), at(wide), 65536, bfloat16)
    assert torch.equal(torch.from_numpy(wide).nan_to_num(7.0), expected.nan_to_num(7.0))
    assert np.array_equal(np.signbit(wide), np.signbit(expected.numpy()))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_rounding_around_all_patterns(library: ctypes.CDLL, bfloat16: bool) -> None:
    # Every number, the middle to its neighbour, and the float32 numbers on both sides of that.
    _, wide = patterns(bfloat16)
    here = wide.double()
    middles = ((here[:-1] + here[1:]) / 2).float()
    beside = [middles.nextafter(torch.tensor(sign * float("inf"))) for sign in (-1, 1)]
    random = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    values = torch.cat([wide, middles, *beside, random.int().view(torch.float32)]).contiguous()
    narrow = np.empty(values.numel(), np.uint16)
    library.narrow(at(values.numpy()), at(narrow), values.numel(), bfloat16)
    expected = values.to(torch.bfloat16 if bfloat16 else torch.float16)
    actual = torch.from_numpy(narrow.view(np.int16)).view(expected.dtype)
    numbers = ~values.isnan()
    assert torch.equal(actual[numbers].view(torch.int16), expected[numbers].view(torch.int16))
    assert (narrow[~numbers.numpy()] == 0x7FFF).all()


def test_exponential_and_logarithm(library: ctypes.CDLL) -> None:
    x = np.array(
        [0, 1, -1, 0.5, 127.9, 128, -126, -126.5, -149, np.inf, -np.inf, np.nan], np.float32
    )
    y = np.empty_like(x)
    library.exponentials(at(x), at(y), x.size, 0)
    with np.errstate(over="ignore"):
        expected = np.exp2(x)
    expected[[7, 8]] = 0  # subnormal
    np.testing.assert_allclose(y, expected, rtol=2.4e-7)
    x = np.array([1, 2, 0.1, 0, -0.0, 1e-40, np.inf, -1, np.nan], np.float32)
    y = np.empty_like(x)
    library.exponentials(at(x), at(y), x.size, 1)
    expected = np.array([0, 1, np.log2(np.float32(0.1)), *[-np.inf] * 3, np.inf, np.nan, np.nan])
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_product(library: ctypes.CDLL, bfloat16: bool) -> None:
    dtype = torch.bfloat16 if bfloat16 else torch.float16
    for seed in range(5):
        torch.manual_seed(seed)
        a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
        c = torch.randn(16, 8)
        elements = torch.cat([a.flatten(), b.flatten()]).view(torch.int16).numpy()
        d = np.empty((16, 8), np.float32)
        library.multiply(at(elements), at(c.numpy()), at(d), bfloat16)
        expected = c.double() + a.double() @ b.double()
        torch.testing.assert_close(torch.from_numpy(d).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_layout(library: ctypes.CDLL, transposed: bool) -> None:
    matrices = np.random.default_rng(0).integers(0, 65536, (4, 8, 8), dtype=np.uint16)
    registers = np.empty((32, 4), np.uint32)
    library.read_matrices(at(matrices), at(registers), transposed)
    for lane in range(32):
        for m in range(4):
            matrix = matrices[m].T if transposed else matrices[m]
            first, second = matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2].tolist()
            assert registers[lane, m] == first | second << 16


def butterfly(values: np.ndarray, lanes: int) -> np.ndarray:
    mask = lanes // 2
    while mask:
        values = values + values[np.arange(values.size) ^ mask]
        mask //= 2
    return values


def test_reductions(library: ctypes.CDLL) -> None:
    values = np.random.default_rng(0).standard_normal(128).astype(np.float32)
    results = np.empty((5, 128), np.float32)
    for seed in range(5):
        library.fastattn_emulator_set_seed(seed)
        library.reduce(at(values), at(results))
        warps = butterfly(values, 32)
        total = ((warps[0] + warps[32]) + warps[64]) + warps[96]
        assert np.array_equal(results[0], butterfly(values, 4))
        assert np.array_equal(results[1], warps)
        assert np.array_equal(results[2], values.reshape(-1, 8).max(1).repeat(8))
        assert np.array_equal(results[3], values.reshape(-1, 32).max(1).repeat(32))
        assert np.array_equal(results[4], np.full(128, total))


def test_lanes_to_each_other(library: ctypes.CDLL) -> None:
    results = np.empty((4, 32), np.uint32)
    library.exchange_lanes(at(results))
    lane = np.arange(32)
    ballot = sum(1 << i for i in range(0, 32, 3))
    assert np.array_equal(results, [lane ^ 5, lane * 0 + 7, lane // 2, lane * 0 + ballot])


def test_philox_is_the_rule_of_dropout(library: ctypes.CDLL) -> None:
    key = 0x123456789ABCDEF
    words = np.empty((6, 32, 16), np.uint32)
    library.draw_words(key, at(words), 6)
    for p in [0.1, 0.5]:
        kept = dropout.keep(torch.tensor([key]), p, 2, 3, 32, 16).reshape(6, 32, 16).numpy()
        assert np.array_equal(words.view(np.int32) >= dropout.threshold(p), kept)


def test_copies_and_hand_over(library: ctypes.CDLL) -> None:
    values = np.random.default_rng(0).integers(0, 99, (8, 64)).astype(np.float32)
    for seed in range(20):
        library.fastattn_emulator_set_seed(seed)
        sums = np.empty(64, np.float32)
        library.sum_tiles(at(values), at(sums))
        assert np.array_equal(sums, values.sum(0))
        library.hand_tiles_over(at(values), at(sums))
        assert np.array_equal(sums, np.tile(values.reshape(-1)[:256].reshape(8, 32).sum(0), 2))


def test_atomics(library: ctypes.CDLL) -> None:
    for seed in range(5):
        library.fastattn_emulator_set_seed(seed)
        words, total = np.zeros(257, np.uint32), np.zeros(1, np.float32)
        library.draw_tickets(at(words), at(total))
        assert words[0] == 256 and (words[1:] == 1).all() and total[0] == 128


# --- counts ---


@pytest.mark.parametrize(
    ("variant", "conflicts"),
    [(0, 0), (1, 1), (2, 31), (3, 0), (4, 0), (5, 0), (6, 28), (7, 2)],
)
def test_bank_conflicts(library: ctypes.CDLL, variant: int, conflicts: int) -> None:
    library.fastattn_emulator_reset_counts()
    library.touch_banks(variant)
    result = counts(library)["banks"]
    assert (result["shared_accesses"], result["bank_conflicts"]) == (1, conflicts)


def test_bank_conflicts_of_matrices(library: ctypes.CDLL) -> None:
    # 8 rows of a matrix in the same 4 banks; with a pad of 16 bytes, in all 32. The stores of 2
    # bytes before it touch one bank with 32 rows, and 8 banks with 4 rows each.
    for variant, conflicts in [(8, 8 * 31 + 28), (9, 8 * 3)]:
        library.fastattn_emulator_reset_counts()
        library.touch_banks(variant)
        result = counts(library)["banks"]
        assert (result["shared_accesses"], result["bank_conflicts"]) == (9, conflicts)


@pytest.mark.parametrize(("variant", "accesses", "sectors"), [(0, 1, 4), (1, 1, 32), (2, 2, 5)])
def test_sectors(library: ctypes.CDLL, variant: int, accesses: int, sectors: int) -> None:
    library.fastattn_emulator_reset_counts()
    library.touch_sectors(variant)
    result = counts(library)["sectors"]
    assert (result["global_accesses"], result["global_sectors"]) == (accesses, sectors)


def test_counts(library: ctypes.CDLL) -> None:
    library.fastattn_emulator_reset_counts()
    values, sums = np.zeros((8, 64), np.float32), np.empty(64, np.float32)
    library.sum_tiles(at(values), at(sums))
    library.sum_tiles(at(values), at(sums))
    result = counts(library)["pipeline"]
    expected = {
        "launches": 2,
        "blocks": 2,
        "global_bytes_read": 2 * 8 * 256,
        "global_bytes_written": 2 * 256,
        "shared_bytes_written": 2 * 10 * 256,
        "shared_bytes_read": 2 * 8 * 256,
        "async_copies": 2 * 10 * 16,
        "block_syncs": 2 * 8 * 2,
        "mma": 0,
    }
    assert {name: result[name] for name in expected} == expected
