"""What was extracted, over fine-tuning steps."""

import numpy as np
from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.figures.common import TUNERS, Study, number
from benchmarks.harness import RESULTS

PLOT = RESULTS / "extraction" / "extraction.svg"
METHODS = {
    "finextract": ("FineXtract", "#c0392b", "o"),
    "cfg": ("guidance", "#2c6fbb", "s"),
    "lora-scale": ("extrapolation", "#7d8a2e", "^"),
    "plain": ("plain", "#777777", "D"),
    "carlini": ("plain, large cliques", "#b07aa1", "v"),
}


STAGES = {
    "all samples": {"stage": "all", "clustering": "cliques"},
    "cliques": {"stage": "clustered", "clustering": "cliques"},
    "agglomerative": {"stage": "clustered", "clustering": "agglomerative"},
}
"""Before clustering (with the weights tuned for cliques) and after it."""


def main() -> None:
    """Writes the plot and puts the table into the README."""
    studies = common.read(PLOT.parent, _rows)
    common.into_readme(
        "extraction", f"{findings(studies)}\n\n![AS over fine-tuning steps]({plot(studies)})\n\n{table(studies)}"
    )


def _rows(rows: list[dict]) -> list[dict]:
    """All, unless they are of an earlier form."""
    return rows if any(row["metric"] == "AS difference" for row in rows) else []


def findings(studies: list[Study]) -> str:
    """What the rows say, as a list."""
    leads = {}
    for stage in ("cliques", "agglomerative"):
        for other in ("cfg", "lora-scale"):
            options = {"against": other, "pictures": "training", **STAGES[stage]}
            leads[stage, other] = [
                (study, steps, row)
                for study in studies
                for steps in study.steps
                if (row := study.first("AS difference", "finextract", steps=steps, **options)) is not None
            ]
    told = {stage: [one for one in leads[stage, "cfg"] if one[2]["low"] > 0] for stage in ("cliques", "agglomerative")}
    behind = [one for one in leads["agglomerative", "cfg"] if one[2]["high"] < 0]
    where = "; ".join(
        f"{study.title}, {steps} steps: {row['value']:+.2f}" for study, steps, row in told["agglomerative"]
    )
    every = len(leads["agglomerative", "cfg"])
    most = max(row["value"] for _, _, row in leads["agglomerative", "lora-scale"])
    return "\n".join(
        [
            f"- FineXtract leads classifier-free guidance in {len(told['agglomerative'])} of {every} cases ({where}) and is behind in {len(behind)}.",
            f"- Extrapolating the weights comes within {most:.2f} of it everywhere.",
            f"- After the paper's cliques its lead over guidance is distinguishable from zero in {len(told['cliques'])} of {every} cases.",
        ]
    )


def plot(studies: list[Study]) -> str:
    """AS of training pictures over steps, before clustering (above) and after it (below, each way), one column per study."""
    figure = Figure(figsize=(3.1 * len(studies), 2.6 * len(STAGES)), layout="constrained")
    axes = figure.subplots(len(STAGES), len(studies), squeeze=False, sharey=True)
    for column, study in enumerate(studies):
        for row, (label, stage) in enumerate(STAGES.items()):
            panel = axes[row, column]
            for shift, (method, (name, colour, mark)) in enumerate(METHODS.items()):
                if method == "carlini" and stage["stage"] == "all":
                    continue  # the same samples as plain
                for pictures, line in (("training", "-"), ("holdout", ":")):
                    found = [
                        study.first("AS", method, steps=steps, pictures=pictures, **stage) for steps in study.steps
                    ]
                    points = [
                        (s * 1.015 ** (shift - 2), r)
                        for s, r in zip(study.steps, found, strict=True)
                        if r and r["value"] is not None
                    ]
                    if not points:
                        continue
                    x, y = [s for s, _ in points], [r["value"] for _, r in points]
                    if pictures == "holdout":
                        panel.plot(x, y, line, color=colour, linewidth=0.9)
                        continue
                    # one seed has no interval
                    spans = [(r["value"], r["value"]) if r["low"] is None else (r["low"], r["high"]) for _, r in points]
                    error = np.abs(np.array(spans).T - y)
                    panel.errorbar(
                        x, y, error, fmt=line, marker=mark, ms=4, lw=1.3, color=colour, label=name, capsize=2
                    )
            panel.set_xscale("log")
            panel.set_xticks(study.steps, [str(steps) for steps in study.steps])
            panel.minorticks_off()
            panel.grid(axis="y", linewidth=0.3)
            if row == 0:
                panel.set_title(study.title, fontsize=9)
            if column == 0:
                panel.set_ylabel(f"AS, {label}")
            if row == len(STAGES) - 1:
                panel.set_xlabel("fine-tuning steps (batch 4)")
    axes[-1, 0].legend(fontsize=7, frameon=False)
    return common.save(figure, PLOT)


def table(studies: list[Study]) -> str:
    """Markdown: what FineXtract reaches after agglomerative clustering, and its lead in AS over the others, paired by seed."""
    leads = {
        "guidance, all samples": ("cfg", "all samples"),
        "guidance, cliques": ("cfg", "cliques"),
        "guidance": ("cfg", "agglomerative"),
        "plain": ("plain", "agglomerative"),
        "extrapolation": ("lora-scale", "agglomerative"),
    }
    head = ["set", "N0", "tuner", "steps", "AS", "hold-outs", "A-ESR", "A-ESR of guidance"]
    head += [f"lead over {name}" for name in leads]
    lines = [head]
    last = STAGES["agglomerative"]
    for study in studies:
        for steps in study.steps:
            at = {"steps": steps, "pictures": "training"}
            found = number(study.first("AS", "finextract", **at, **last))
            null = number(study.first("AS", "finextract", steps=steps, pictures="holdout", **last), brief=True)
            rates = [number(study.first("A-ESR@cal", name, **at, **last)) for name in ("finextract", "cfg")]
            ahead = [
                number(study.first("AS difference", "finextract", against=other, **at, **STAGES[stage]), signed=True)
                for other, stage in leads.values()
            ]
            names = [study.name, str(study.n0), TUNERS[study.tuner], str(steps)]
            lines.append([*names, found, null, *rates, *ahead])
    return common.table(lines)
