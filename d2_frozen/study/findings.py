"""Which findings of the paper hold in the runs of a study? Each is one or more differences that should be above 0.

In: the folder of a study (``--output``/SCALE): ``tableN/TASK/CELL/seedK/result.json``, and ``cka/*.json`` of its runs.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from d2_frozen.files import write_text
from d2_frozen.study.contrasts import CONFIDENCE, NOT_RUN, Difference, difference, together
from d2_frozen.study.jobs import compared_options, read_json
from d2_frozen.study.tables import METRICS

Weights = dict[str, float]
# Metric -> cell -> seed -> score.
Scores = dict[str, dict[str, dict[int, float]]]


@dataclass(frozen=True)
class Claim:
    """A sentence, and the differences of cells that should be above 0 if it is true.

    Args:
        measures: what is compared -> label of a difference -> weights of cells. A measure holds if its differences do.
    """

    number: str
    text: str
    table: int
    tasks: tuple[str, ...]
    measures: dict[str, dict[str, Weights]]


class Line(NamedTuple):
    """A difference of a claim."""

    number: str
    measure: str
    label: str
    difference: Difference


@dataclass
class Finding:
    """A claim and what became of it: a verdict per measure, and all differences."""

    number: str
    text: str
    verdicts: dict[str, str] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)

    def add(self, measure: str, differences: dict[str, Difference]) -> None:
        self.verdicts[measure] = together([d.verdict for d in differences.values()])
        self.lines += [Line(self.number, measure, label, d) for label, d in differences.items()]

    @property
    def verdict(self) -> str:
        """One verdict if all measures have the same, else which have which."""
        if not self.verdicts:
            return NOT_RUN
        counts = Counter(self.verdicts.values())
        if len(counts) == 1:
            return next(iter(counts))
        return "; ".join(
            f"{verdict}: {', '.join(m for m, v in self.verdicts.items() if v == verdict)}"
            for verdict in counts
        )


def claims_of(scale: str) -> list[Claim]:
    """The paper's findings that compare scores, by the names of the cells at that scale."""
    all_tasks = ("detection", "segmentation", "video")
    full = scale == "full"
    masked = "simmim_1k" if full else "masked"
    others = ("esvit_1k", "supervised_1k", "supervised_22k") if full else ("contrastive", "supervised")
    more_data = (
        {"SwinV2-B, 22K": ("swinv2_base_1k", "swinv2_base_22k")}
        if full
        else {f"{size}, 4000 scenes": (f"{size}_500", f"{size}_4000") for size in ("pico", "nano")}
    )
    low_head, encoder, decoder = "encoder_1_decoder_3", "encoder_6_decoder_3", "encoder_1_decoder_9"
    return [
        Claim(
            "i",
            "Masked image modelling is the worst pretraining for a frozen backbone",
            1,
            all_tasks,
            {
                "frozen": {
                    f"{other} - {masked}": {f"{other}_frozen": 1, f"{masked}_frozen": -1} for other in others
                }
            },
        ),
        Claim(
            "ii",
            "A BiFPN narrows the frozen gap more than a cascade",
            2,
            ("detection",),
            {
                "gap": {
                    "narrowed by the BiFPN": _minus(_gap("fpn_mask"), _gap("bifpn_mask")),
                    "more than by the cascade": _minus(_gap("fpn_cascade"), _gap("bifpn_mask")),
                }
            },
        ),
        Claim(
            "iii",
            "Layers of the pixel decoder help the frozen backbone more than layers of the transformer decoder",
            3,
            ("segmentation",),
            {
                "gap": {
                    "narrowed by the pixel decoder": _minus(_gap(low_head), _gap(encoder)),
                    "more than by the transformer decoder": _minus(_gap(decoder), _gap(encoder)),
                },
                "frozen": {
                    "raised by the pixel decoder": {f"{encoder}_frozen": 1, f"{low_head}_frozen": -1},
                    "more than by the transformer decoder": {f"{encoder}_frozen": 1, f"{decoder}_frozen": -1},
                },
            },
        ),
        Claim(
            "iv",
            "Global attention is better than temporal, and temporal than a linear head, on a frozen backbone",
            4,
            ("video",),
            {
                "frozen": {
                    "global - temporal": {"global_frozen": 1, "temporal_frozen": -1},
                    "temporal - linear": {"temporal_frozen": 1, "linear_frozen": -1},
                }
            },
        ),
        Claim(
            "v",
            "More pretraining data narrows the frozen gap",
            5,
            all_tasks,
            {
                "gap": {
                    f"narrowed ({label})": _minus(_gap(less), _gap(more))
                    for label, (less, more) in more_data.items()
                }
            },
        ),
        Claim(
            "vi",
            "With 1 % of the labels, frozen is better than full fine-tuning",
            6,
            ("detection",),
            {"1 %": {"frozen - full": {"percent_1_frozen": 1, "percent_1_full": -1}}},
        ),
    ]


def _gap(row: str) -> Weights:
    """How far full fine-tuning is ahead."""
    return {f"{row}_full": 1, f"{row}_frozen": -1}


def _minus(a: Weights, b: Weights) -> Weights:
    return {**a, **{cell: -weight for cell, weight in b.items()}}


def findings(root: str | Path, scale: str) -> list[Finding]:
    """All of the paper's, in its order; those without runs say so.

    Raises:
        FileNotFoundError: nothing has run in ``root``.
    """
    root = Path(root)
    scores = {
        (table, task): _scores(root, table, task)
        for table in range(1, 7)
        for task in METRICS
        if (root / f"table{table}" / task).is_dir()
    }
    found = [_judge(claim, scores) for claim in claims_of(scale)]
    found.append(_similarity(root))
    if not any(sum(line.difference.runs) for finding in found for line in finding.lines):
        raise FileNotFoundError(
            f"{root} holds no finished run of a table; `study table N --scale {scale}` makes them."
        )
    return found


def _judge(claim: Claim, scores: dict[tuple[int, str], Scores]) -> Finding:
    finding = Finding(claim.number, claim.text)
    for task in claim.tasks:
        for heading in METRICS[task].values():
            values = scores.get((claim.table, task), {}).get(heading, {})
            for measure, differences in claim.measures.items():
                finding.add(
                    f"{task} {heading}" + (f", {measure}" if len(claim.measures) > 1 else ""),
                    {label: difference(weights, values) for label, weights in differences.items()},
                )
    return finding


def _scores(root: Path, table: int, task: str) -> Scores:
    """Of the finished runs of a table."""
    scores: Scores = defaultdict(lambda: defaultdict(dict))
    for path in (root / f"table{table}" / task).glob("*/seed*/result.json"):
        run = read_json(path)
        if run is None:
            continue
        for (kind, metric), heading in METRICS[task].items():
            value = run["metrics"].get(kind, {}).get(metric, math.nan)
            if not math.isnan(value):
                scores[heading][path.parent.parent.name][run["seed"]] = float(value)
    return scores


def unlike(root: Path) -> list[str]:
    """A sentence per table and task whose runs had different options, so that they may not be comparable."""
    said = []
    for folder in sorted(root.glob("table[0-9]/*")):
        options = set()
        for path in folder.glob("*/seed*/result.json"):
            if (run := read_json(path)) is not None:
                options.add(" ".join(compared_options(run)) or "none")
        if len(options) > 1:
            said.append(
                f"Careful: runs of {folder.parent.name}, {folder.name} had different options: "
                f"{'; '.join(sorted(options))}."
            )
    return said


def _similarity(root: Path) -> Finding:
    """Frozen detectors that have both, BiFPN and cascade, in ``cka/bifpn.json`` and ``cka/cascade.json``.

    A model without stages has ``cka/cascade.json`` too: of its one head, which is no cascade.
    """
    finding = Finding("vii", "Layers of a BiFPN are less similar to their input than stages of a cascade")
    for folder in sorted(root.glob("table*/detection/*_frozen")):
        means = {
            preset: {
                seed: mean
                for path in folder.glob(f"seed*/cka/{preset}.json")
                if (seed := _number_of(path.parent.parent)) is not None
                and (mean := _mean_similarity(path, least_stages)) is not None
            }
            for preset, least_stages in (("bifpn", 0), ("cascade", 2))
        }
        if all(means.values()):
            finding.add(
                f"{folder.parent.parent.name} {folder.name}, CKA",
                {"cascade - BiFPN": difference({"cascade": 1, "bifpn": -1}, means)},
            )
    return finding


def _mean_similarity(path: Path, least_stages: int = 0) -> float | None:
    """Of inputs with the layers behind them: every level of a BiFPN, the box head of every stage of a cascade.

    None for a measurement that was interrupted, that compares two models, or of a model with fewer stages.
    """
    content = read_json(path)
    if content is None or not content["complete"] or len(content["models"]) != 1:
        return None
    panel = content["panels"][0]
    if len({_stage(row) for row in panel["rows"]} - {""}) < least_stages:
        return None
    values = [
        value
        for row, of_row in zip(panel["rows"], panel["cka"])
        for column, value in zip(panel["columns"], of_row)
        if value is not None and _stage(row) == _stage(column, default=_stage(row))
    ]
    return math.fsum(values) / len(values) if values else None


def _number_of(folder: Path) -> int | None:
    """7 of ``seed7``."""
    number = folder.name.removeprefix("seed")
    return int(number) if number.isdecimal() else None


def _stage(label: str, default: str = "") -> str:
    """Of the label of a cascade's map; a layer of a BiFPN is in none, and belongs to every level."""
    found = re.match(r"stage \d+", label)
    return found.group() if found else default


def verdict_rows(found: Sequence[Finding]) -> list[tuple[str, str, str]]:
    """A line per finding, with a header."""
    return [("", "finding", "verdict"), *((f.number, f.text, f.verdict) for f in found)]


def difference_rows(found: Sequence[Finding]) -> list[tuple[str, ...]]:
    """A line per difference, with a header."""
    header = (
        "",
        "measure",
        "difference",
        "mean ± standard error",
        f"{CONFIDENCE:.0%} interval",
        "seeds",
        "above 0",
    )
    return [header, *(_row(line) for finding in found for line in finding.lines)]


def _row(line: Line) -> tuple[str, ...]:
    d = line.difference
    # Similarities are between 0 and 1, scores between 0 and 100.
    digits = 3 if line.measure.endswith("CKA") else 2
    shown = "" if math.isnan(d.mean) else f"{d.mean:.{digits}f}"
    if not math.isnan(d.error):
        shown += f" ± {d.error:.{digits}f}"
    interval = "" if math.isnan(d.low) else f"{d.low:.{digits}f} to {d.high:.{digits}f}"
    verdict = d.verdict + (" (one seed)" if d.seeds == 1 else "")
    # Where some model has more: how many each has.
    seeds = str(d.seeds) + ("" if set(d.runs) == {d.seeds} else f" of {' / '.join(map(str, d.runs))}")
    return line.number, line.measure, line.label, shown, interval, seeds, verdict


ABOUT = (
    "Each difference should be above 0 if the finding holds; a finding of several differences holds if all are. A gap "
    "is full fine-tuning minus frozen. Differences are taken seed by seed, over the seeds that all models have, since "
    "runs of one seed share the order of the data and the start of equal layers. Standard errors and intervals "
    "(Student's t, as in a paired t-test) are over these, for each difference by itself (not corrected for their "
    "number). An interval that contains 0, or a single seed, cannot be told from noise."
)


def markdown(found: Sequence[Finding], scale: str, notes: Sequence[str] = ()) -> str:
    """Both tables, for people, and what is to be said of the runs."""
    return "\n".join(_blocks(found, scale, notes))


def _blocks(found: Sequence[Finding], scale: str, notes: Sequence[str]) -> Iterator[str]:
    yield f"### Findings at scale {scale}\n"
    for rows in (verdict_rows(found), difference_rows(found)):
        header, *body = rows
        yield tabulate(body, headers=header, tablefmt="github", disable_numparse=True) + "\n"
    yield "\n\n".join([ABOUT, *notes])


def write_findings(root: str | Path, scale: str) -> Path:
    """``findings.md`` in ``root``.

    Returns:
        The file.
    Raises:
        FileNotFoundError: nothing has run in ``root``.
    """
    text = markdown(findings(root, scale), scale, unlike(Path(root))) + "\n"
    return write_text(Path(root) / "findings.md", text)
