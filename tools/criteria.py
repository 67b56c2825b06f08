"""What the project wants of its weights, and the paper's order of methods, held against a result.

    python tools/criteria.py outputs/published/evaluation.json

writes the criteria into that file (`aims`), and both tables behind the text beside it.

Two lines of a result are compared on the seeds that both have (the same prompts, the same noise),
all their clips together, extrapolated to endless samples, with the jackknife's interval over seeds.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lmd.evaluation.metrics import Interval, jackknife
from lmd.evaluation.plan import BY_EULER, FEW_STEPS
from lmd.evaluation.report import format_interval, name_of, table, write_result
from lmd.pretrained import PLAYED_BEST

Line = Mapping[str, Any]  # of a result
Lines = Mapping[tuple[str, int, bool], Line]  # by method, steps, whether primed
Criterion = dict[str, Any]  # `aim`, `found`, `met`: None where too little was measured
SOLVERS = {"": "DPM-Solver++", BY_EULER: "Euler's method"}  # by the end of a method's name
SHIPPED = ("BC+AF", PLAYED_BEST["arc"]["n_steps"])  # what an instrument plays when it is opened

# FD-OpenL3 of arXiv 2605.22717, Table 1 (47 s clips, Song Describer), by method, steps, primed.
PAPER_FD = (
    (("ED+AF", 8, False), ("ED", 50, False), (35.88, 61.06)),
    (("BC+AF", 2, False), ("BC", 50, False), (47.26, 64.87)),
    (("ED+AF", 8, True), ("ED", 50, True), (29.00, 35.35)),
    (("BC+AF", 2, True), ("BC", 50, True), (35.45, 47.13)),
    (("ED", 50, True), ("ED", 50, False), (35.35, 61.06)),
    (("BC", 50, True), ("BC", 50, False), (47.13, 64.87)),
    (("ED", 50, False), ("BC", 50, False), (61.06, 64.87)),
    (("ED+AF", 8, False), ("BC+AF", 2, False), (35.88, 47.26)),
)


def read_result(path: Path) -> dict[str, Any]:
    """What `lmd evaluate` wrote, nan for what was not finite."""

    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: known(each) for name, each in value.items()}
        if isinstance(value, list):
            return [known(each) for each in value]
        return math.nan if value is None else value

    return known(json.loads(path.read_text()))


def lines_of(result: Mapping[str, Any]) -> Lines:
    """A result's lines by what they are."""
    return {(row["method"], row["n_steps"], row["primed"]): row for row in result["rows"]}


def difference(first: Line, second: Line, times: float = 1.0) -> Interval:
    """By how much the second line's FD∞ is larger than `times` the first's."""
    shared = min(line["fd"]["n"] for line in (first, second))
    if shared < 2:  # of which one distance is known
        known = second["fd"]["mean"] - times * first["fd"]["mean"]
        return Interval(known, -math.inf, math.inf, shared)
    near, far = (line["pooled"][str(shared)] for line in (first, second))
    without = [b - times * a for a, b in zip(near["without"], far["without"], strict=True)]
    return jackknife(far["all"] - times * near["all"], without)


def criteria(result: Mapping[str, Any]) -> list[Criterion]:
    """Each criterion, what was found and whether it is met.

    Streamed methods are those that start from silence and are not the naive one; the best of them
    is sought among those that were repeated most.
    """
    lines, anchors = lines_of(result), result["anchors"]
    streamed = [row for (name, _, primed), row in lines.items() if name != "naive" and not primed]
    by_euler = any(row["method"].endswith(BY_EULER) for row in streamed)
    solvers, regimes = (BY_EULER, "") if by_euler else ("",), ("ED", "BC")
    found = [_forcing_helps(lines, regime, solver) for solver in solvers for regime in regimes]
    looked_at: dict[str, Line] = {}
    if streamed:
        most = max(row["fd"]["n"] for row in streamed)
        often = [row for row in streamed if row["fd"]["n"] == most]
        best = min(often, key=lambda row: row["fd_infinite"]["mean"])
        looked_at = {"the lowest FD∞": best}
        if (shipped := lines.get((*SHIPPED, False))) in often:
            looked_at["as shipped"] = shipped
        found += _near_the_floor(best, anchors["codec"], result["tagger"]["embedding"])
    for which, row in looked_at.items():
        found += [_family(row, which, anchors["real"]), _in_key(row, which, anchors["real"])]
    found += [_no_drift(row) for row in result["drift"] if row["method"].endswith("+AF")]
    found += [_tempo(row, which, anchors) for which, row in looked_at.items()]
    return found + [_key_is_kept(lines, regime) for regime in regimes]


def _before_and_after(
    lines: Lines, regime: str, solver: str = ""
) -> Iterator[tuple[int, Line, Line]]:
    """Steps up to `FEW_STEPS`, fewest first, and a regime's lines without and with ARC-Forcing."""
    for n_steps in sorted({n for _, n, _ in lines if n <= FEW_STEPS}):
        before = lines.get((f"{regime}{solver}", n_steps, False))
        after = lines.get((f"{regime}+AF{solver}", n_steps, False))
        if before is not None and after is not None:
            yield n_steps, before, after


def _ends(low: float, high: float, form: str = ".3g") -> str:
    return f"({low:{form}} – {high:{form}})"


def _share(interval: Mapping[str, float]) -> str:
    """A share with its interval, cut to what is possible."""
    ends = _ends(max(0.0, interval["low"]), min(1.0, interval["high"]), ".1%")
    return f"{interval['mean']:.1%} {ends}"


def _all(found: Iterable[tuple[str, bool]]) -> dict[str, Any]:
    """Several findings as one, met if all are."""
    texts = dict(found)
    return {"found": "; ".join(texts) or "–", "met": all(texts.values()) if texts else None}


def _forcing_helps(lines: Lines, regime: str, solver: str) -> Criterion:
    """Whether ARC-Forced weights have a lower FD∞ at all steps up to `FEW_STEPS`."""
    found = []
    for n_steps, before, after in _before_and_after(lines, regime, solver):
        change = difference(before, after)
        text = f"{n_steps} steps {change.mean:+.3g} {_ends(change.low, change.high)}"
        found.append((text, change.high < 0))
    aim = f"distillation and ARC-Forcing lower FD∞ (95 %) at up to {FEW_STEPS} steps, {regime}"
    return {"aim": f"{aim}, both with {SOLVERS[solver]}", **_all(found)}


def _key_is_kept(lines: Lines, regime: str) -> Criterion:
    """Whether ARC-Forced weights play as many notes in the key: intervals that do not part."""
    found = []
    for n_steps, *rows in _before_and_after(lines, regime):
        before, after = (row["key_share"] for row in rows)
        text = f"{n_steps} steps {before['mean']:.1%} → {after['mean']:.1%}"
        found.append((text, after["high"] >= before["low"]))
    aim = "distillation and ARC-Forcing keep the share of notes in the key (95 %)"
    return {"aim": f"{aim}, {regime}", **_all(found)}


def _near_the_floor(best: Line, codec: Line, embedding: int) -> list[Criterion]:
    """Twice: at the size of this sample, and extrapolated, where the floor itself is lower."""
    n_seeds = best["fd"]["n"]
    enough = n_seeds > 1 and best["windows"] * n_seeds >= 2 * embedding
    ours, floor = (x["pooled"].get(str(n_seeds), {"all": math.nan})["all"] for x in (best, codec))
    which = f"({name_of(best)})" + ("" if enough else ", of too few windows to say")
    endless = (x["fd_infinite"] for x in (best, codec))
    texts = [f"{x['mean']:.3g} {_ends(x['low'], x['high'])}" for x in endless]
    beyond = difference(codec, best, times=2)
    more = f"{beyond.mean:+.3g} {_ends(beyond.low, beyond.high)} beyond twice"
    aim = "of the best streamed method within twice the codec floor's"
    return [
        {
            "aim": f"FD {aim}, all seeds' clips together",
            "found": f"{ours:.3g} against {floor:.3g} {which}",
            "met": ours <= 2 * floor if enough else None,
        },
        {
            "aim": f"FD∞ {aim}",
            "found": f"{texts[0]} against {texts[1]}: {more} {which}",
            "met": beyond.mean <= 0 if enough else None,
        },
    ]


def _family(row: Line, which: str, real: Line) -> Criterion:
    found = f"{_share(row['family'])} with {name_of(row)}"
    return {
        "aim": f"its prompts' instrument family recognised in at least 90 %: {which}",
        "found": f"{found} (real music: {real['family']['mean']:.1%})",
        "met": row["family"]["mean"] >= 0.9,
    }


def _in_key(row: Line, which: str, real: Line) -> Criterion:
    share = row["key_share"]["mean"] / real["key_share"]["mean"]
    return {
        "aim": f"its share of notes in the key at least 90 % of real music's: {which}",
        "found": f"{share:.0%} with {name_of(row)}",
        "met": share >= 0.9,
    }


def _tempo(row: Line, which: str, anchors: Mapping[str, Line]) -> Criterion:
    share, real, chance = row["tempo"], anchors["real"], anchors["other prompts"]["tempo"]["mean"]
    beside = f"(real music: {real['tempo']['mean']:.1%}, by other prompts {chance:.1%})"
    return {
        "aim": f"its prompts' tempo recognised more often than other prompts' (95 %): {which}",
        "found": f"{_share(share)} with {name_of(row)} {beside}",
        "met": None if math.isnan(share["mean"] + chance) else share["low"] > chance,
    }


def _no_drift(row: Line) -> Criterion:
    """Whether the distance's slope is compatible with none; and the most that the interval allows.

    A slope that is not different from zero is no proof of none: the width says what could hide.
    """
    change = row["distance"]["slope_per_minute"]
    seconds = row["times_s"][-1] + row["times_s"][0]
    most = max(abs(change["low"]), abs(change["high"])) * seconds / 60
    level = row["distance"]["level"]["mean"]
    slope = f"{change['mean']:+.3g} {_ends(change['low'], change['high'])} a minute"
    return {
        "aim": f"{row['method']}, {row['n_steps']} steps: no drift of the distance found (95 %)",
        "found": f"{slope}: at most {most:.2g} over {seconds:.0f} s; the distance is {level:.3g}",
        "met": change["low"] <= 0 <= change["high"],
    }


def paper_order(result: Mapping[str, Any]) -> Iterator[tuple[Line, Line, str, Interval, str]]:
    """Which of two is closer to real music, in the paper and here; pairs that were measured.

    Yields:
        The lines that the paper has nearer and farther, its two distances, by how much they differ
        here, and whether the order is the same: "yes", "no" or "undecided".
    """
    lines = lines_of(result)
    for first, second, theirs in PAPER_FD:
        nearer, farther = (_at_most(lines, *each) for each in (first, second))
        if nearer is None or farther is None:
            continue
        distances = f"{theirs[0]:.3g} against {theirs[1]:.3g}"
        if (first[1], second[1]) != (nearer["n_steps"], farther["n_steps"]):
            distances += f" (with {first[1]} and {second[1]} steps)"
        more = difference(nearer, farther)
        same = "yes" if (more.mean > 0) == (theirs[1] > theirs[0]) else "no"
        yield nearer, farther, distances, more, same if more.excludes_zero else "undecided"


def _at_most(lines: Lines, method: str, n_steps: int, primed: bool) -> Line | None:
    """The line of a method with the most steps up to `n_steps`."""
    there = [n for name, n, p in lines if (name, p) == (method, primed) and n <= n_steps]
    return lines[method, max(there), primed] if there else None


def tables(result: Mapping[str, Any]) -> str:
    """Both tables as Markdown; of the paper's order only what was measured."""
    met = {True: "yes", False: "no", None: "not measured"}
    order = [
        {
            "closer to real music? (FD)": f"{name_of(nearer)} than {name_of(farther)}",
            "in the paper": distances,
            "here, on the seeds that both have": f"nearer by {format_interval(asdict(more))}",
            "the same order": same,
        }
        for nearer, farther, distances, more, same in paper_order(result)
    ]
    wanted = table([{**each, "met": met[each["met"]]} for each in criteria(result)])
    return f"{wanted}\n\n{table(order)}\n" if order else f"{wanted}\n"


def main(path: Path) -> None:
    """Write the criteria into a result, the tables behind its text."""
    result = read_result(path)
    write_result(path, {**result, "aims": criteria(result)})
    text = path.with_suffix(".md")
    before = text.read_text().partition("\n| aim ")[0].rstrip()
    text.write_text(f"{before}\n\n{tables(result)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
