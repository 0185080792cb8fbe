"""Proofs before first use: on a CPU that calls itself a GPU, with kernels right and wrong.

The `cuda` backend of the norms is here the Triton kernels on a CPU, with bugs where a test plants
them, so that its proof, its dispatch and its gradients are real.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import backends, extension, measured, proving, user_cache, verdicts
from fastattn.backends import explanation_of
from fastattn.cli import main, proofs
from fastattn.ops.attention.cache import cuda as cache_cuda
from fastattn.ops.attention.cache import interface as decoding
from fastattn.ops.attention.cache import proof as cache_proof
from fastattn.ops.attention.cache import triton as cache_triton
from fastattn.ops.layer_norm import cuda, triton
from fastattn.ops.layer_norm import interface as norms

CPU = torch.device("cpu")
X = torch.linspace(-2, 3, 120).reshape(5, 24)
W = torch.linspace(0.5, 1.5, 24)


class Chip:
    """A CPU with the name of a GPU, and what the kernels of `cuda` do on it.

    Attributes:
        ran: which kernels ran, "cuda" or "triton", in order.
        bug: out -> a wrong out of cuda's forward, None for a right one.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.set = monkeypatch.setattr
        self.folder, self.ran = folder / "fastattn" / "proofs", list[str]()
        self.bug: Callable[[torch.Tensor], torch.Tensor] | None = None
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        monkeypatch.delenv(proving.VARIABLE, raising=False)
        library = folder / "library"
        library.write_bytes(b"kernels")
        self.set(extension, "file", lambda: library)
        self.set(extension, "unavailable", lambda device: None)
        self.set(backends, "triton_unavailable", lambda device: None)
        self.set(backends, "FOR_TESTS", {})
        self.named("a GPU", "sm_80")
        forward = triton.forward

        def planted(*args: Any) -> Any:
            self.ran.append("cuda")
            out, *rest = forward(*args)
            return (out if self.bug is None else self.bug(out)), *rest

        def spied(*args: Any) -> Any:
            self.ran.append("triton")
            return forward(*args)

        self.set(cuda, "forward", planted)
        self.set(cuda, "backward", triton.backward)
        self.set(triton, "forward", spied)

    def named(self, *names: str) -> None:
        self.set(measured, "devices", lambda device: names)
        self.restart()

    def restart(self) -> None:
        """Forget what a process knows."""
        proving._known.clear()
        proving._warned.clear()
        verdicts.environment.cache_clear()
        measured.of_user.cache_clear()
        norms._dispatch.plans.clear()
        decoding._dispatch.plans.clear()

    def call(self, x: torch.Tensor = X, **more: Any) -> list[str]:
        """Which kernels a call runs, those of its proof too."""
        self.ran.clear()
        out = fastattn.layer_norm(x, W, residual=x, **more)[0]
        if self.bug is None:
            torch.testing.assert_close(out, torch.layer_norm(2 * x, (24,), W), rtol=1e-4, atol=1e-4)
        return list(self.ran)

    def reason(self) -> str:
        return explanation_of(fastattn.layer_norm, X, W, residual=X).reasons["cuda"] or "runs"

    def notes(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in self.folder.glob("*.json")]

    def about(self) -> verdicts.Subject:
        problem = backends.problem_of(fastattn.layer_norm, X, W, residual=X)[0]
        found = proving.subject("cuda", problem)
        assert found is not None
        return found


@pytest.fixture
def chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chip]:
    chip = Chip(tmp_path, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield chip
    monkeypatch.undo()
    chip.restart()


def scaled(out: torch.Tensor) -> torch.Tensor:
    return out * 1.001


def last_column(out: torch.Tensor) -> torch.Tensor:
    return torch.cat([out[..., :-1], out[..., :1]], -1)


def nan(out: torch.Tensor) -> torch.Tensor:
    return out.where(torch.arange(out.numel()).view_as(out) != 7, float("nan"))


def no_compile(out: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("ptxas fatal: no such instruction\nmore lines")


# --- a verdict ------------------------------------------------------------------------------------


def test_a_right_kernel_is_chosen_after_one_proof(chip: Chip) -> None:
    assert "the first call proves it" in chip.reason()
    assert chip.ran == []  # explain computes nothing
    assert chip.call() == ["cuda", "cuda"]  # the proof and the call
    assert chip.call() == ["cuda"]
    assert chip.reason() == "runs"
    assert chip.call(torch.cat([X, X])) == ["cuda"]  # another size of the family
    assert chip.call(X.half()) == ["cuda", "cuda"]  # another family
    chip.restart()
    assert chip.call() == ["cuda"]
    assert [note["verdict"] for note in chip.notes()] == ["passed"] * 2
    assert all("plain PyTorch's" in note["told"] for note in chip.notes())


def test_a_later_call_asks_nobody(chip: Chip) -> None:
    chip.call()
    chip.set(backends, "select", lambda *_: pytest.fail("it has a plan"))
    assert chip.call() == ["cuda"]


@pytest.mark.parametrize(
    ("bug", "figures"),
    [
        (scaled, r"out: max error \d\.\d+e-\d+ against float64, above 2 \* "),
        (last_column, r"out: max error .* 1\.8% of 2072 fail"),
        (nan, r"out: 1 of \d+ are NaN"),
        (no_compile, "RuntimeError: ptxas fatal: no such instruction; "),
    ],
)
def test_a_wrong_kernel_is_never_chosen(
    bug: Any, figures: str, chip: Chip, capsys: pytest.CaptureFixture[str]
) -> None:
    chip.bug = bug
    with pytest.warns(RuntimeWarning, match=figures) as told:
        assert chip.call() == ["cuda", "triton"]
    assert len(told) == 1 and "fastattn doctor --prove" in str(told[0].message)
    assert chip.call() == ["triton"]  # and no other warning, which would be an error
    assert chip.call(torch.cat([X, X])) == ["triton"]
    reason = chip.reason()
    assert "its proof failed on a GPU" in reason
    assert main(["doctor"]) == 0
    capsys.readouterr()
    chip.restart()
    with pytest.warns(RuntimeWarning, match=figures):  # the next process says so too
        assert chip.call() == ["triton"]
    assert chip.reason() == reason


@pytest.mark.parametrize("wrong", [False, True])
def test_decoding_too(wrong: bool, chip: Chip, monkeypatch: pytest.MonkeyPatch) -> None:
    """A paged cache: the kernel that reads a key too few is never chosen."""
    sizes = {"CAPACITY": 40, "PAGE": 24, "LENGTHS": (33, 17), "STARTS": (1, 2)}
    for name, size in sizes.items():
        monkeypatch.setattr(cache_proof, name, size)
    ran, forward = list[str](), cache_triton.forward

    def planted(q: Any, extras: Any, settings: Any, call: Any) -> Any:
        ran.append("cuda")
        return forward(q, extras, settings, call._replace(lengths=call.lengths - int(wrong)))

    def spied(*args: Any) -> Any:
        ran.append("triton")
        return forward(*args)

    chip.set(cache_cuda, "forward", planted)
    chip.set(cache_triton, "forward", spied)
    q, cache = torch.randn(1, 1, 2, 16).half(), torch.randn(2, 8, 2, 16).half()
    table, lengths = torch.tensor([[1, 0]]), torch.tensor([11])
    call = q, cache, cache, lengths
    with contextlib.ExitStack() as stack:
        if wrong:
            told = r"attention_with_kv_cache .* paged: its proof failed .*against float64"
            stack.enter_context(pytest.warns(RuntimeWarning, match=told))
        out = fastattn.attention_with_kv_cache(*call, block_table=table)
    assert ran == ["cuda", "cuda", "triton" if wrong else "cuda"]  # the proof has two calls
    keys = cache[[1, 0]].flatten(0, 1)[None, :11]
    torch.testing.assert_close(
        out, fastattn.attention(q, keys, keys, backend="reference"), rtol=2e-3, atol=2e-3
    )
    reasons = explanation_of(fastattn.attention_with_kv_cache, *call, block_table=table).reasons
    assert ("against float64" in str(reasons["cuda"])) == wrong


def test_a_wrong_gradient_is_found(chip: Chip) -> None:
    backward = triton.backward

    def wrong(*args: Any) -> Any:
        dx, *rest = backward(*args)
        return dx * 1.01, *rest

    chip.set(cuda, "backward", wrong)
    with pytest.warns(RuntimeWarning, match=r"dx: max error"):
        assert chip.call() == ["cuda", "triton"]


def test_doctor_names_every_family_that_failed(
    chip: Chip, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of an op and of features that its table of backends does not show."""
    about = chip.about()._replace(op="rotary", backend="triton", family="of a kind\nof its own")
    verdicts.write(verdicts.path_of(about), about, verdicts.FAILED, "q: max error 1.0\x1b[2J")
    of_another = about._replace(family="another", device=torch.device("cpu", 1))
    verdicts.write(verdicts.path_of(of_another), of_another, verdicts.PASSED, "q: 1e-7")
    (chip.folder / "rotary-triton-moved.json").write_text(
        verdicts.path_of(about).read_text()  # type: ignore[union-attr]
    )
    assert main(["doctor"]) == 0
    lines = [line for line in capsys.readouterr().out.split("\n") if "rotary" in line]
    assert lines == [
        "  not used on cpu, its proof failed: triton rotary, of a kind of its own: "
        "q: max error 1.0 [2J"
    ]


def test_doctor_says_it(chip: Chip, capsys: pytest.CaptureFixture[str]) -> None:
    chip.bug = scaled
    x = torch.empty(2, 512, 512)
    with pytest.warns(RuntimeWarning):
        fastattn.rms_norm(torch.randn(2, 512), torch.ones(512), residual=torch.randn(2, 512))
        fastattn.layer_norm(torch.randn(2, 512), torch.ones(512), torch.ones(512), 1e-5)
        norms._dispatch.make(None, norms._problem.describe_rms_norm(x, x[0, 0]), None)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "cuda       its proof failed on a GPU: out: max error" in out
    assert "cuda       not proven on a GPU: the first call proves it" in out  # bfloat16


def test_a_backend_that_the_user_names_is_not_replaced(chip: Chip) -> None:
    chip.bug = scaled
    assert chip.call(backend="cuda") == ["cuda"]
    with fastattn.use_backend("cuda"):
        assert chip.call() == ["cuda"]
    assert chip.notes() == []


def test_proofs_can_be_off(chip: Chip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(proving.VARIABLE, "0")
    assert chip.call() == ["triton"]
    assert "not proven on a GPU, and FASTATTN_PROVE=0" in chip.reason()
    with monkeypatch.context() as later:
        later.setattr(backends, "select", lambda *_: pytest.fail("it has a plan"))
        assert chip.call() == ["triton"]
    monkeypatch.delenv(proving.VARIABLE)
    chip.restart()
    assert chip.call() == ["cuda", "cuda"]
    monkeypatch.setenv(proving.VARIABLE, "0")
    chip.restart()
    assert chip.call() == ["cuda"]  # what is remembered counts


def test_triton_is_out_only_after_a_failed_proof(chip: Chip) -> None:
    chip.named("a GPU", "sm_90")
    assert chip.call() == ["triton"]
    assert chip.notes() == []
    about = chip.about()._replace(backend="triton")
    proving._known[about] = verdicts.Verdict(False, "figures")
    norms._dispatch.plans.clear()
    with pytest.warns(RuntimeWarning, match="figures"):
        assert chip.call() == []


# --- what a verdict depends on --------------------------------------------------------------------


CHANGES: dict[str, Callable[[Chip], Any]] = {
    "device": lambda chip: chip.named("another GPU", "sm_80"),
    "torch": lambda chip: chip.set(torch, "__version__", "9.9"),
    "extension": lambda chip: extension.file().write_bytes(b"others"),  # type: ignore[union-attr]
    "kernels": lambda chip: chip.set(user_cache, "sources", lambda: "others"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_anything_new_is_proven_again(change: str, chip: Chip) -> None:
    chip.call()
    CHANGES[change](chip)
    chip.restart()
    assert chip.call() == ["cuda", "cuda"]
    assert len(chip.notes()) == 2


def test_the_driver_of_a_gpu_counts(chip: Chip) -> None:
    found = []
    for driver in ("1", "2"):
        chip.set(verdicts, "_driver", lambda driver=driver: driver)
        verdicts.environment.cache_clear()
        found.append(verdicts.environment("cuda", torch.device("cuda", 0)))
    assert found[0] != found[1]


def test_the_default_order_by_architecture(chip: Chip) -> None:
    problem = backends.problem_of(fastattn.layer_norm, X, W, residual=X)[0]
    for device, first in (("sm_80", "cuda"), ("sm_90", "gluon"), ("sm_120", "")):
        chip.named("a GPU", device)
        for backend in ("gluon", "cuda"):
            reason = measured.declined(backend, problem)
            assert (reason is None) == (backend == first)
    assert measured.declined("triton", problem) is None


ROW = measured.Key("layer_norm", "cuda", "float32", None, "a GPU")


@pytest.mark.parametrize(
    ("chip_is", "limits", "small", "large"),
    [
        ("sm_80", None, "cuda", "cuda"),
        ("sm_80", (0, 0), "triton", "triton"),
        ("sm_80", (200, None), "triton", "cuda"),
        ("sm_120", None, "triton", "triton"),
        ("sm_120", (0, 200), "cuda", "triton"),
    ],
)
def test_the_users_measurements_choose_among_proven_kernels(
    chip_is: str, limits: Any, small: str, large: str, chip: Chip
) -> None:
    chip.named("a GPU", chip_is)
    if limits is not None:
        measured.write("a GPU", {ROW: measured.Faster("triton", "2026-11-30", *limits)})
    chip.call(), chip.call(torch.cat([X, X]))  # prove it
    chip.restart()
    assert chip.call() == [small]  # of 120 elements
    assert chip.call(torch.cat([X, X])) == [large]
    assert chip.ran[-1] == large


def test_no_measurement_makes_a_wrong_kernel_right(chip: Chip) -> None:
    chip.bug = scaled
    measured.write("a GPU", {ROW: measured.Faster("triton", "2026-11-30")})
    chip.restart()
    with pytest.warns(RuntimeWarning, match="its proof failed"):
        assert chip.call() == ["cuda", "triton"]


def test_features_without_a_proof(chip: Chip) -> None:
    """They are not chosen, but where a row of what was measured says so."""
    q = torch.randn(1, 0, 2, 16, dtype=torch.float16)
    call = {"causal": True}
    reasons = explanation_of(fastattn.attention, q, q, q, **call).reasons
    assert "no proof of such a call" in str(reasons["cuda"])
    problem = backends.problem_of(fastattn.attention, q, q, q, **call)[0]
    chip.set(measured, "found", lambda backend, problem: True)
    assert proving.declined("cuda", problem, prove=False) is None


# --- the cache folder -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"verdict": "good", "told": ""}', '{"verdict": "passed"}', "\0",
        '{"verdict": "failed", "verdict": "passed", "told": ""}', '{"verdict": {}, "told": ""}',
        '{"verdict": "passed", "told": "\\u001b[2J"}', '{"verdict": "passed", "told": NaN}',
        '{"verdict": "passed", "told": ""}' + " " * verdicts.LARGEST,
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_proven_again(text: str, chip: Chip) -> None:
    chip.call()
    (path,) = chip.folder.glob("*.json")
    path.write_text(text)
    chip.restart()
    assert chip.call() == ["cuda", "cuda"]
    assert chip.notes()[0]["verdict"] == "passed"


@pytest.mark.parametrize("place", ["a file", "nowhere"])
def test_no_folder(place: str, chip: Chip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process knows the verdict itself."""
    if place == "a file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        chip.set(os.path, "expanduser", lambda path: path)
        assert user_cache.folder(verdicts.FOLDER) is None
    assert chip.call() == ["cuda", "cuda"]
    assert chip.call(torch.cat([X, X])) == ["cuda"]
    assert chip.notes() == []


def test_the_users_folder(chip: Chip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somebody")
    assert user_cache.folder(verdicts.FOLDER) == Path("/somebody/.cache/fastattn/proofs")


# --- other processes and threads ------------------------------------------------------------------


def test_while_another_process_proves_the_call_goes_elsewhere(chip: Chip) -> None:
    chip.folder.mkdir(parents=True)
    path = verdicts.path_of(chip.about())
    assert path is not None
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert chip.call() == ["triton"]
        assert chip.call() == ["triton"]
        # It ends well: what it wrote counts, without a second proof.
        verdicts.write(path, chip.about(), verdicts.PASSED, "by another process")
    assert chip.call() == ["cuda"]


def test_a_process_that_dies_in_a_proof_leaves_a_failure(chip: Chip) -> None:
    def fault(out: torch.Tensor) -> torch.Tensor:
        os._exit(7)

    chip.bug = fault
    child = os.fork()
    if child == 0:
        chip.call()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert [note["verdict"] for note in chip.notes()] == ["running"]
    with pytest.warns(RuntimeWarning, match="the process ended while it ran"):
        assert chip.call() == ["triton"]
    chip.bug = None
    assert chip.call() == ["triton"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_what_says_nothing_of_the_kernel_is_no_verdict(error: Any, chip: Chip) -> None:
    def stop(out: torch.Tensor) -> torch.Tensor:
        raise error

    chip.bug = stop
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            chip.call()
    else:
        assert chip.call() == ["cuda", "triton"]
    chip.bug = None
    assert chip.call() == ["cuda", "cuda"]


def test_threads(chip: Chip) -> None:
    """One proves, and the other one does not wait for it."""
    inside, on = threading.Event(), threading.Event()

    def slow(out: torch.Tensor) -> torch.Tensor:
        inside.set()
        assert on.wait(60)
        return out

    chip.bug = slow
    thread = threading.Thread(target=chip.call)
    thread.start()
    assert inside.wait(60)
    fastattn.layer_norm(X, W, residual=X)
    assert chip.ran == ["cuda", "triton"]
    on.set()
    thread.join()
    chip.bug = None
    assert chip.call() == ["cuda"]


# --- modes of torch -------------------------------------------------------------------------------


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


def test_no_proof_while_calls_are_watched_or_captured(
    chip: Chip, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Watching():
        assert chip.call() == ["triton"]
    assert chip.notes() == []
    assert chip.call() == ["cuda", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "CUDA graph" in str(proving.impossible(torch.device("cuda", 0)))


def test_a_device_that_fails_has_no_verdicts(chip: Chip) -> None:
    def dead(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    chip.set(torch, "zeros", dead)
    assert chip.call() == ["triton"]
    assert chip.notes() == []


def test_torch_compile_takes_what_is_remembered(chip: Chip) -> None:
    def backend_of(x: torch.Tensor) -> str:
        code: list[str] = []

        def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
            code.append(graph.code)
            return graph.forward

        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x: fastattn.layer_norm(x, W, residual=x)[0], backend=keep, fullgraph=True
        )
        compiled(x)
        return "cuda" if "'cuda'" in code[0] else "triton" if "'triton'" in code[0] else "plain"

    assert backend_of(X) == "triton"
    assert chip.notes() == []
    chip.call()
    assert backend_of(X) == "cuda"
    # A row counts for every size, if it has one.
    for limits, backend in (((10**6, None), "cuda"), ((0, 0), "triton")):
        measured.write("a GPU", {ROW: measured.Faster("triton", "2026-11-30", *limits)})
        assert backend_of(X) == backend


def refuse(x: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a tensor of the proof")


@contextlib.contextmanager
def hooks() -> Iterator[None]:
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        yield


MODES: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device": lambda: torch.device("meta"),  # of tensors that are made without one
    "hooks": hooks,
    "operator": torch._C._AutoDispatchBelowAutograd,  # type: ignore[attr-defined]  # inside of one
}


@pytest.mark.parametrize("mode", [*MODES, "checkpoint"])
def test_a_proof_does_not_depend_on_the_callers_modes(mode: str, chip: Chip) -> None:
    state = torch.get_rng_state()
    if mode == "checkpoint":  # it counts the tensors that the forward saves
        x = X.clone().requires_grad_()
        out = checkpoint(lambda x: fastattn.layer_norm(x, W, residual=x)[0], x, use_reentrant=False)
        out.sum().backward()  # type: ignore[union-attr]
    else:
        with MODES[mode]():
            chip.call()
    assert torch.equal(state, torch.get_rng_state())
    assert [note["verdict"] for note in chip.notes()] == ["passed"]


# --- doctor --prove -------------------------------------------------------------------------------


@pytest.fixture
def few(chip: Chip) -> None:
    """A call for doctor to prove, in two dtypes."""

    def calls(dtype: torch.dtype, device: torch.device) -> Iterator[Any]:
        yield fastattn.layer_norm, (X.to(dtype), W.to(dtype), None, 1e-5, X.to(dtype)), {}

    chip.set(proofs, "DTYPES", (torch.float16, torch.float32))
    chip.set(proofs, "_calls", calls)


@pytest.mark.usefixtures("few")
def test_doctor_proves_all(chip: Chip, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--prove"]) == 0
    out = capsys.readouterr().out
    assert out.count("  passed  ") == 4  # two dtypes, cuda and triton
    assert "cuda layer_norm, x float16, weight float16, residual float16" in out
    chip.restart()
    assert chip.call() == ["cuda"]
    chip.bug = lambda out: 1.1 * out
    assert main(["doctor", "--prove"]) == 1  # whatever is remembered
    out = capsys.readouterr().out
    assert out.count("  FAILED  ") == 2 and out.count("  passed  ") == 2
    assert "its proof failed on a GPU" in chip.reason()
    chip.bug = None
    assert main(["doctor", "--prove"]) == 0
    assert chip.reason() == "runs"


def test_doctor_proves_nothing_where_proofs_are_off(
    chip: Chip, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(proving.VARIABLE, "0")
    assert main(["doctor", "--prove"]) == 1
    out = capsys.readouterr().out
    assert "FASTATTN_PROVE turns them off" in out and "versions" in out
    assert chip.ran == chip.notes() == []


@pytest.mark.usefixtures("few")
def test_doctor_says_how_long_a_first_call_compiles(
    chip: Chip, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = {"rows_kernel": 1.25, "sums_kernel": None}
    chip.set(proofs.launch, "compilations", lambda: contextlib.nullcontext(compiled))
    assert main(["doctor", "--prove"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = "            compiled: rows_kernel 1.2 s, sums_kernel from the cache"
    assert lines.count(told) == 4  # two dtypes, cuda and triton


@pytest.mark.usefixtures("few")
def test_doctor_stops_where_the_device_fails(
    chip: Chip, capsys: pytest.CaptureFixture[str]
) -> None:
    chip.set(proving, "impossible", lambda device: "the device fails")
    assert main(["doctor", "--prove"]) == 1
    assert "stopped: the device fails" in capsys.readouterr().out


def test_doctor_proves_what_has_a_proof(chip: Chip) -> None:
    subjects = [about for about, _ in proofs._families(CPU)]
    assert {about.backend for about in subjects} == {"cuda", "triton"}
    assert {about.op for about in subjects} == proving._proofs.keys()
    assert len(subjects) == len(set(subjects))
    families = [about.family for about in subjects if about.backend == "cuda"]
    for feature in ("dropout", "stored as int8", "stored as float8_e4m3fn", "paged", "bias"):
        assert any(feature in family for family in families)


def test_doctor_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["doctor", "--prove"]) == 0
    assert "no kernel to prove" in capsys.readouterr().out
