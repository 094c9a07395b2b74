"""The tables of `inspect_checkpoint.py`: its facts as text. Imports no TensorFlow."""

from collections.abc import Sequence
from typing import Any

from deit import checkpoint

_SHOWN = 10  # differing tensors in the table; --json has all


def inspection(facts: dict) -> str:
    """Return the tables of what `inspect_checkpoint.inspect` found."""
    header = ("checkpoint", "step", "size", "created", checkpoint.BEST, "kept as", "state_sha256", "status")
    rows = [
        (
            row["name"],
            _or_dash(row["step"]),
            _size(row["bytes"]),
            _or_dash(row["created"]),
            _or_dash(row[checkpoint.BEST], ".4f"),
            ", ".join(row["kept"] or []) or "-",
            (row["state_sha256"] or "-")[:12],
            row["status"],
        )
        for row in facts["checkpoints"]
    ]
    parts = [_table(header, rows)]
    if "groups" in facts:
        header = ("tensors", "number", "elements", "size", "min", "max", "finite")
        rows = []
        for name, group in facts["groups"].items():
            finite = "yes" if not group["not_finite"] else f"{group['not_finite']} are not"
            low, high = (_or_dash(group[end], ".4g") for end in ("min", "max"))
            numbers = (f"{group['tensors']:,}", f"{group['elements']:,}", _size(group["bytes"]))
            rows.append((name, *numbers, low, high, finite))
        parts.append(_table(header, rows))
        parts.append(
            "counters: " + ", ".join(f"{name} {_or_dash(value, 'g')}" for name, value in facts["counters"].items())
        )
        parts.append("versions: " + ", ".join(f"{name} {value or '-'}" for name, value in facts["versions"].items()))
    if "source" in facts:
        parts.append("converted from: " + ", ".join(f"{name} {value}" for name, value in facts["source"].items()))
    return "\n\n".join(parts)


def comparison(facts: dict) -> str:
    """Return the text of what `inspect_checkpoint.compare` found."""
    ours, theirs = facts["checkpoint"], facts["against"]
    if facts["equal"]:
        lines = [f"equal: all {facts['tensors']} tensors of step {facts['steps'][0]} are the same bits"]
        lines.append(f"state_sha256 {facts['state_sha256'][0]}")
    else:
        lines = [f"different: {len(facts['differ'])} of {facts['tensors']} tensors that both have"]
        for path, step, digest in zip((ours, theirs), facts["steps"], facts["state_sha256"]):
            lines.append(f"  {path}: step {step}, state_sha256 {digest[:12]}")
    for names, path in ((facts["only_ours"], ours), (facts["only_theirs"], theirs)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"only in {path}: {', '.join(names[:3])}{more}")
    lines += [f"other form: {row['tensor']} is {row['ours']}, not {row['theirs']}" for row in facts["other_form"]]
    if facts["differ"]:
        rows = [
            (row["tensor"], _or_dash(row["largest"], ".3g"), _or_dash(row["relative"], ".3g"), f"{row['elements']:,}")
            for row in facts["differ"][:_SHOWN]
        ]
        lines += ["", _table(("largest differences", "absolute", "of the maximum", "elements"), rows)]
    if facts["config"]:
        rows = [
            (
                row["field"],
                str(row["ours"]) or "-",
                str(row["theirs"]) or "-",
                {True: "yes", False: "no", None: "?"}[row["result"]],
            )
            for row in facts["config"]
        ]
        lines += ["", _table(("configuration", "ours", "theirs", "changes the result"), rows)]
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} B"


def _or_dash(value: Any, form: str = "") -> str:
    return "-" if value is None else format(value, form)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cells[i]) for cells in (header, *rows)) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(cells, widths)).rstrip() for cells in (header, *rows))
