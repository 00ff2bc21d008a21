"""Benchmark: draw time and memory of internalizing against frames, from the JSON that internalize.py writes.

python benchmarks/plot_internalize.py benchmarks/results/internalize.json -o docs/internalize.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Times and memory of the published implementation, measured on the same kind of GPU: frames, ms, GB.
PUBLISHED = {
    "500M": [(12, 82, 0.74), (64, 141, 3.78), (128, 276, 7.51), (256, 560, 14.97), (512, 1199, 29.90),
             (1024, 2785, 59.75)],
    "2.2B": [(12, 62, 1.49), (128, 560, 14.84), (512, 2574, 59.00)],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    document = json.loads(options.results.read_text())
    sizes = list(dict.fromkeys(row["size"] for row in document["rows"]))
    figure, axes = plt.subplots(2, len(sizes), figsize=(5 * len(sizes), 7), sharex=True, squeeze=False)
    for column, size in enumerate(sizes):
        rows = sorted(
            (r for r in document["rows"] if r["size"] == size and r["videos"] == 1), key=lambda r: r["frames"]
        )
        frames = [row["frames"] for row in rows]
        for line, (unit, title) in enumerate((("ms", "milliseconds"), ("GB", "GB beside the weights"))):
            axis = axes[line, column]
            axis.plot(
                frames,
                [row[f"prefill_{unit}"] for row in rows],
                "s--",
                color="#999999",
                label="reading alone (prefill)",
            )
            axis.plot(frames, [row[f"internalize_{unit}"] for row in rows], "o-", color="#0072B2", label="internalize")
            known = PUBLISHED.get(size, [])
            axis.plot(
                [n for n, *_ in known], [row[1 + line] for row in known], "^:", color="#D55E00", label="published code"
            )
            axis.set(
                xscale="log", yscale="log", title=size if line == 0 else None, ylabel=title if column == 0 else None
            )
            axis.set_xticks(frames, labels=[f"{n:,}" for n in frames])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=9)
    figure.supxlabel("frames of one video", y=0.03)
    figure.text(0.5, 0.005, document["versions"], ha="center", fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(options.output, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()
