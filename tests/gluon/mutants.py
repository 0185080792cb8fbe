"""Wrong copies of a kernel's source: those written by hand, and mechanical ones.

A mechanical mutant deletes, delays, or edits one statement of synchronisation. Some are right: a
wait that another one makes needless, a release that comes later.
"""

from __future__ import annotations

import ast
import linecache
import re
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

from .errors import GluonError
from .subjects import Subject

SYNCHRONISES = re.compile(
    r"mbarrier\.(wait|expect|arrive|init)|fence_async|store_wait|warpgroup_mma_wait|\^= 1"
    r"|async_(load|store|atomic)|gl\.atomic"
)
PRODUCT = "warpgroup_mma("
# Of a statement of synchronisation, or a product: the first match is replaced.
EDITS = [
    (r"mma_wait\(0", "mma_wait(1"), (r"mma_wait\(1", "mma_wait(2"), (r"store_wait\(0", "store_wait(1"),
    (r"count=2", "count=1"), (r"count=1", "count=2"), (r"index\(slot\)", "index(0)"),
    (r"index\(old\)", "index(slot)"), (r"\bold_phase\b", "phase"), (r"\bphase\)", "phase ^ 1)"),
    (r"turn \^ 1", "turn"), (r"turn\)", "turn ^ 1)"), (r"is_async=True", "is_async=False"),
    (r"q_full", "do_full"), (r"k_full", "v_full"), (r"k_empty", "v_empty"),
    (r"\* 2\b", "* 4"), (r"WHICH", "0"), (r'sem="(release|acquire)"', 'sem="relaxed"'),
]  # fmt: skip


def planted(subject: Subject) -> dict[str, str]:
    """The sources with a bug of the subject's table, by its name."""
    source = subject.path.read_text()
    for name, (old, _) in subject.bugs.items():
        found = source.count(old)
        assert found == 1, f"{name}: the text is {found} times in {subject.path.name}"
    return {name: source.replace(old, new) for name, (old, new) in subject.bugs.items()}


def mechanical(source: str) -> dict[str, str]:
    """Mutants of every statement of synchronisation, by what was done to which line."""
    found: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for function, block in _blocks(ast.parse(source)):
        for i, statement in enumerate(block):
            text = _text(source, statement)
            where = f"{function}: {' '.join(text.split())[:70]}"
            seen[where] += 1
            where += f" ({seen[where]})" if seen[where] > 1 else ""
            if SYNCHRONISES.search(text):
                found[f"delete, {where}"] = _moved(source, block, i, None)
                for later in (1, 2):
                    if i + later < len(block):
                        found[f"delay by {later}, {where}"] = _moved(source, block, i, i + later)
            elif PRODUCT not in text:
                continue
            for old, new in EDITS:
                if re.search(old, text):
                    edited = re.sub(old, new, text, count=1)
                    found[f"{new}, {where}"] = _replaced(source, statement, edited)
    return {name: mutant for name, mutant in found.items() if mutant != source}


def _blocks(tree: ast.AST) -> Iterator[tuple[str, list[ast.stmt]]]:
    """The lists of statements of every kernel, with its name."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.decorator_list:
            for node in ast.walk(function):
                for field in ("body", "orelse"):
                    block = getattr(node, field, None)
                    if isinstance(block, list) and block:
                        yield function.name, [x for x in block if isinstance(x, ast.stmt)]


def _simple(statement: ast.stmt) -> bool:
    return isinstance(statement, (ast.Expr, ast.Assign, ast.AugAssign))


def _text(source: str, statement: ast.stmt) -> str:
    """The statement, where it has no block of its own."""
    return ast.get_source_segment(source, statement) or "" if _simple(statement) else ""


def _lines(statement: ast.stmt) -> slice:
    assert statement.end_lineno is not None
    return slice(statement.lineno - 1, statement.end_lineno)


def _moved(source: str, block: list[ast.stmt], at: int, after: int | None) -> str:
    """The source without statement `at` of a block, or with it after another one."""
    lines = source.split("\n")
    mine = _lines(block[at])
    text = lines[mine]
    if after is None:
        return "\n".join([*lines[: mine.start], " " * block[at].col_offset + "pass", *lines[mine.stop :]])  # fmt: skip
    end = _lines(block[after]).stop
    return "\n".join([*lines[: mine.start], *lines[mine.stop : end], *text, *lines[end:]])


def _replaced(source: str, statement: ast.stmt, text: str) -> str:
    lines, mine = source.split("\n"), _lines(statement)
    return "\n".join([*lines[: mine.start], " " * statement.col_offset + text, *lines[mine.stop :]])


def module(source: str, name: str) -> ModuleType:
    """A module of that source, which no file has; tracebacks and Triton find its lines."""
    made = ModuleType(re.sub(r"\W+", "_", name))
    file = f"<{made.__name__}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    made.__file__ = file
    sys.modules[made.__name__] = made
    try:
        exec(compile(source, file, "exec"), made.__dict__)
    finally:
        del sys.modules[made.__name__]
    return made


def found(subject: Subject, source: str, seed: int, **options: bool) -> str | None:
    """How a mutant shows with a seed: the kind of its GluonError, `numbers`, or None."""
    try:
        subject.run(module(source, f"mutant_of_{subject.path.stem}"), seed, **options)
    except GluonError as error:
        return error.kind
    except AssertionError:
        return "numbers"
    return None


def first_seed(subject: Subject, source: str, seeds: int, **options: bool) -> int | None:
    """The first of seeds 0, 1, ... that finds a mutant."""
    return next((x for x in range(seeds) if found(subject, source, x, **options)), None)
