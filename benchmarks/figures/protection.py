"""What protecting pictures is worth: how much the loss rises, what purifiers leave of it, and how well the pictures are imitated nevertheless."""

import numpy as np
from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.figures.common import TUNERS, Study, number
from benchmarks.harness import RESULTS

FOLDER = RESULTS / "protection"
METHODS = {
    "advdm": ("AdvDM", "#c0392b", "o"),
    "sds": ("SDS", "#2c6fbb", "s"),
    "mist": ("Mist", "#7d8a2e", "^"),
    "textural": ("Mist, textural", "#b7950b", ">"),
    "photoguard": ("PhotoGuard", "#b07aa1", "v"),
    "ace": ("ACE", "#17a589", "D"),
}
SHOWS = {"psnr": ".1f", "lpips": ".4f"}
"""How much of the change shows: figure -> its format."""
SHOWN = 8.0
"""The budget of the tables, in levels of 0..255."""


def main() -> None:
    """Writes the plots and puts the tables into the README."""
    studies = common.read(FOLDER, _rows, ("set", "tuner", "n0", "steps"))
    losses = [study for study in studies if not study.tuner]
    imitations = [study for study in studies if study.tuner]
    parts = [f"![Rise of the held-out loss]({over_budgets(losses)})", loss_table(losses), purifier_table(losses)]
    if imitations:
        parts += [f"![Imitation of protected pictures]({imitation(imitations)})", imitation_table(imitations)]
    common.into_readme("protection", "\n\n".join(parts))


def _rows(rows: list[dict]) -> list[dict]:
    """All but what the attacks cost."""
    return [row for row in rows if row["metric"] not in ("gflops", "seconds")]


def over_budgets(studies: list[Study]) -> str:
    """Rise of the loss beyond noise over the budget, one panel per set."""
    figure = Figure(figsize=(3.1 * len(studies), 2.8), layout="constrained")
    panels = figure.subplots(1, len(studies), squeeze=False, sharey=True)[0]
    for panel, study in zip(panels, studies, strict=True):
        for shift, (method, (name, colour, mark)) in enumerate(METHODS.items()):
            rows = [row for row in study.all("loss_rise", method, purifier="none") if row["low"] is not None]
            x = [row["case"]["budget"] * 1.02 ** (shift - len(METHODS) // 2) for row in rows]
            y = [row["value"] for row in rows]
            error = np.abs(np.array([[row["low"] for row in rows], [row["high"] for row in rows]]) - y)
            panel.errorbar(x, y, error, fmt="-", marker=mark, ms=4, lw=1.2, elinewidth=0.7, color=colour, label=name)
        budgets = sorted({row["case"]["budget"] for row in study.all("loss_rise", "advdm")})
        panel.set_xscale("log")
        panel.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
        panel.minorticks_off()
        panel.axhline(0, color="#999999", linewidth=0.6, linestyle=":")
        panel.grid(axis="y", linewidth=0.3)
        panel.set_title(study.title, fontsize=9)
        panel.set_xlabel("budget, levels of 255", fontsize=8)
    panels[0].set_ylabel("rise of the loss beyond noise")
    panels[0].legend(fontsize=6, frameon=False)
    return common.save(figure, FOLDER / "loss.svg")


def loss_table(studies: list[Study]) -> str:
    """Markdown: at one budget, how much shows, how much the loss rises, its p-value, AdvDM's lead at equal cost, and who notices."""
    head = ["set", "N0", "method", "PSNR, dB", "LPIPS", "rise beyond noise", "p", "AdvDM's lead at equal cost"]
    lines = [[*head, "found as protected, AUC", "found among noised"]]
    for study in studies:
        for method, (name, *_) in METHODS.items():
            at = {"budget": SHOWN, "purifier": "none"}
            rise = study.first("loss_rise", method, **at)
            if rise is None:
                continue
            p_value = study.first("loss_rise_p_value", method, **at)["value"]
            lead = study.first("loss_rise difference", "advdm", against=method, **at)
            found = [_detected(study, method, against) for against in ("clean", "noise")]
            shows = [f"{study.first(name, method, budget=SHOWN)['value']:{form}}" for name, form in SHOWS.items()]
            p_text = f"{p_value:.1e}" if p_value < 0.001 else f"{p_value:.3f}"
            lines.append(
                [study.name, str(study.n0), name, *shows, number(rise), p_text, number(lead, signed=True), *found]
            )
    return common.table(lines)


def _detected(study: Study, method: str, against: str) -> str:
    """AUC of the statistic that tells best over all methods of the study, so that none is chosen for one of them."""
    rows = study.all("detection_AUC", method, budget=SHOWN, against=against)
    everywhere = lambda row: np.mean(
        [
            other["value"]
            for name in METHODS
            for other in study.all("detection_AUC", name, against=against, statistic=row["case"]["statistic"])
        ]
    )
    return number(max(rows, key=everywhere, default=None))


def purifier_table(studies: list[Study]) -> str:
    """Markdown: what is left of the rise beyond noise after each purifier, at one budget; "-" where a method was left out."""
    names = {row["case"]["purifier"]: None for study in studies for row in study.all("loss_rise", "advdm")}
    lines = [["set", "method", *("as saved" if name == "none" else name for name in names)]]
    for study in studies:
        for method, (label, *_) in METHODS.items():
            cells = [
                number(study.first("loss_rise", method, budget=SHOWN, purifier=name), brief=True) for name in names
            ]
            if any(cell != "-" for cell in cells):
                lines.append([study.name, label, *cells])
    return common.table(lines)


def _arms(study: Study, metric: str) -> list[tuple[str, dict]]:
    """(what was fine-tuned on, row) of every arm, as `metric` has them."""
    titles = {"untuned": "no fine-tuning", "artist": "the training pictures themselves", "clean": "clean"}
    arms = []
    for row in study.rows:
        if row["metric"] != metric:
            continue
        case, method = row["case"], row["method"]
        name = titles.get(method) or (METHODS[method][0] if method in METHODS else method)
        if case["budget"]:
            name += f", {case['budget']:g}"
        if case["purifier"] != "none":
            name += f", then {case['purifier']}"
        if 0 < case["coverage"] < 1:
            name += f", {case['coverage']:.0%} of the pictures"
        arms.append((name, row))
    return arms


def imitation(studies: list[Study]) -> str:
    """Imitation after fine-tuning on each kind of pictures, one panel per set and tuner."""
    columns = min(4, len(studies))
    shape = (-(-len(studies) // columns), columns)
    figure = Figure(figsize=(1.6 + 3.0 * shape[1], 2.5 * shape[0]), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False)
    for panel in panels.flat[len(studies) :]:
        panel.set_visible(False)
    for panel, study in zip(panels.flat, studies, strict=False):
        arms = _arms(study, "imitation")
        y = -np.arange(len(arms))
        values = np.array([row["value"] for _, row in arms])
        spans = np.array([[row["low"], row["high"]] for _, row in arms]).T
        panel.errorbar(values, y, xerr=np.abs(spans - values), fmt="o", ms=4, lw=1.2, color="#2c6fbb")
        first = panel in panels[:, 0]
        panel.set_yticks(y, [name for name, _ in arms] if first else [""] * len(arms), fontsize=7)
        panel.grid(axis="x", linewidth=0.3)
        panel.set_title(f"{study.title}, {study.steps[0]} steps", fontsize=8)
        panel.set_xlabel("likeness to hold-outs", fontsize=8)
    return common.save(figure, FOLDER / "imitation.svg")


def imitation_table(studies: list[Study]) -> str:
    """Markdown: each arm's imitation and distance, and how they differ from clean and from noise, paired by seed."""
    head = ["set", "N0", "tuner", "steps", "fine-tuned on", "imitation", "against clean", "against noise"]
    lines = [[*head, "Frechet", "against clean", "against noise"]]
    for study in studies:
        for name, row in _arms(study, "imitation"):
            cells = []
            for metric in ("imitation", "frechet"):
                case = {k: row["case"][k] for k in ("budget", "purifier", "coverage")}
                cells.append(number(study.first(metric, row["method"], **case)))
                for reference in ("clean", "noise"):
                    found = study.first(f"{metric} difference", row["method"], against=reference, **case)
                    cells.append(number(found, signed=True))
            lines.append([study.name, str(study.n0), TUNERS[study.tuner], str(study.steps[0]), name, *cells])
    return common.table(lines)
