"""Tables of several runs."""

import statistics


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: means over seeds, and for the overall score the range."""
    columns = list(next(iter(rows.values()))[0])
    lines = ["| | " + " | ".join(c.replace("_", " ") for c in columns) + " |", "| --- |" + " --- |" * len(columns)]
    for name, runs in rows.items():
        cells = []
        for column in columns:
            values = [each[column] for each in runs]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if column == "strict" and len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
