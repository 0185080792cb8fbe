"""The table that a report prints."""

from __future__ import annotations

from fastattn.integrations import Entry, Report


def test_repeated_layers_share_a_line() -> None:
    swapped = tuple(
        Entry(f"h.{layer}.{name}", cls, backend="torch")
        for layer in range(12)
        for name, cls in (("ln_1", "LayerNorm"), ("mlp", "MLP"), ("ln_2", "LayerNorm"))
    )
    left = (
        Entry("h.3.attn", "Attention", reason="it has hooks"),
        Entry("wte", "Embedding", reason="nothing for this class"),
        Entry("wpe", "Embedding", reason="nothing for this class"),
    )
    assert str(Report(swapped, left)) == "\n".join(
        [
            "fastattn: 36 modules swapped, 3 left alone",
            "  swapped  LayerNorm  24  torch  h.*.ln_1, h.*.ln_2",
            "  swapped  MLP        12  torch  h.*.mlp",
            "  left     Attention  1          h.3.attn: it has hooks",
            "  left     Embedding  2          wte, wpe: nothing for this class",
        ]
    )


def test_an_empty_report() -> None:
    assert str(Report((), ())) == "fastattn: nothing swapped, 0 modules left alone"
