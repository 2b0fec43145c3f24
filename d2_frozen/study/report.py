"""Everything that a study has run, on one page: findings, tables, curves, heatmaps, predictions, what each run was.

In: the folder of a study (``--output``/SCALE).  Out: report.md and report.html there; pictures are linked, not copied.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from tabulate import tabulate

from d2_frozen.files import write_text
from d2_frozen.study.findings import ABOUT, difference_rows, findings, unlike, verdict_rows
from d2_frozen.study.jobs import read_json

_PICTURES = (".png", ".jpg")
# Of each model, so that the page stays one that can be read.
_SHEETS_PER_MODEL = 1


@dataclass(frozen=True)
class Section:
    """A heading, then text, a table, or pictures; without a heading, a part of the section before."""

    heading: str
    text: str = ""
    rows: tuple[tuple[str, ...], ...] = ()
    pictures: tuple[Path, ...] = ()


def write_report(root: str | Path, scale: str = "mini") -> Path:
    """
    Args:
        root: of the study at that scale.
    Returns:
        The html file; report.md lies beside it.
    Raises:
        FileNotFoundError: nothing has run in ``root``.
    """
    root = Path(root)
    runs = sorted(finished_runs(root), key=lambda run: run["job"])
    if not runs:
        raise FileNotFoundError(f"{root} holds no finished run; `study table` and `study sweep` make them.")
    sections = [
        *_findings(root, scale),
        *_tables(root),
        *_heatmaps(root),
        _runs(runs),
        *_sheets(root, runs),
        *_failures(root),
    ]
    write_text(root / "report.md", _markdown(sections, root))
    return write_text(root / "report.html", _html(sections, root))


def finished_runs(root: Path) -> Iterator[dict[str, Any]]:
    """What every ``result.json`` below ``root`` holds."""
    for path in root.rglob("result.json"):
        if (run := read_json(path)) is not None:
            yield run


def _findings(root: Path, scale: str) -> Iterator[Section]:
    try:
        found = findings(root, scale)
    except FileNotFoundError:  # only sweeps, say
        return
    yield Section(f"Findings at scale {scale}", rows=tuple(verdict_rows(found)))
    about = " ".join([ABOUT, *unlike(root)])
    yield Section("Differences behind the findings", about, tuple(difference_rows(found)))


def _tables(root: Path) -> Iterator[Section]:
    """A section per table; those of several tasks have one each, the picture with the first."""
    for path in sorted([*root.glob("table*.md"), *root.glob("sweep_*.md")]):
        heading, _, body = path.read_text(encoding="utf-8").partition("\n")
        picture = path.with_suffix(".png")
        pictures = (picture,) if picture.exists() else ()
        for block in body.strip().split("\n\n"):
            lines = block.splitlines()
            rows = [line for line in lines if line.startswith("|")]
            yield Section(
                heading.lstrip("# "),
                " ".join(line for line in lines if not line.startswith("|")),
                tuple(_cells(line) for line in rows if not set(line) <= set("|-: ")),
                pictures,
            )
            heading, pictures = "", ()


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def _heatmaps(root: Path) -> Iterator[Section]:
    pictures = tuple(sorted(root.rglob("cka/*.png")))
    if pictures:
        yield Section("Centred kernel alignment", pictures=pictures)


def _runs(runs: list[dict[str, Any]]) -> Section:
    header = (
        "run",
        "config",
        "options",
        "iterations",
        "trainable",
        "all",
        "time",
        "memory",
        "device",
        "commit",
    )
    rows = [header]
    for run in runs:
        rows.append(
            (
                run["job"],
                run["config_file"],
                " ".join(run["options"]),
                f"{run['iterations']}",
                f"{run['trainable']:,}",
                f"{run['parameters']:,}",
                str(timedelta(seconds=int(run["seconds_of_last_start"])))
                + (" from the last start" if run.get("resumed") else ""),
                f"{run['peak_memory_mib']:.0f} MiB",
                run["device"],
                run["commit"],
            )
        )
    versions = sorted({f"torch {run['torch']}, engine {run['engine']}" for run in runs})
    return Section(f"{len(runs)} finished runs", "; ".join(versions), tuple(rows))


def _sheets(root: Path, runs: list[dict[str, Any]]) -> Iterator[Section]:
    seen: dict[str, list[Path]] = {}
    for run in runs:
        model = run["job"].rpartition("/")[0]
        found = seen.setdefault(model, [])
        sheets = sorted((root / run["job"] / "inference").glob("predictions_*"))
        found += [path for path in sheets if path.suffix in _PICTURES][: _SHEETS_PER_MODEL - len(found)]
    for model, sheets in seen.items():
        if sheets:
            yield Section(f"Predictions of {model}", pictures=tuple(sheets))


def _failures(root: Path) -> Iterator[Section]:
    failed = [
        (str(path.parent.relative_to(root)), failure["error"])
        for path in sorted(root.rglob("failed.json"))
        if (failure := read_json(path)) is not None
    ]
    if failed:
        yield Section("Failed", rows=(("run", "error"), *failed))


def _markdown(sections: list[Section], root: Path) -> str:
    blocks = ["# Study"]
    for section in sections:
        if section.heading:
            blocks.append(f"## {section.heading}")
        if section.text:
            blocks.append(section.text)
        if section.rows:
            header, *rows = section.rows
            blocks.append(tabulate(rows, headers=header, tablefmt="github", disable_numparse=True))
        blocks += [f"![{_name(path, root)}]({_name(path, root)})" for path in section.pictures]
    return "\n\n".join(blocks) + "\n"


def _html(sections: list[Section], root: Path) -> str:
    parts = [f"<h1>Study</h1>\n{_contents(sections)}"]
    for number, section in enumerate(sections):
        if section.heading:
            parts.append(f'<h2 id="s{number}">{html.escape(section.heading)}</h2>')
        if section.text:
            parts.append(f"<p>{html.escape(section.text)}</p>")
        if section.rows:
            header, *rows = section.rows
            parts.append(tabulate(rows, headers=header, tablefmt="html", disable_numparse=True))
        parts += [
            f'<figure><img src="{html.escape(_name(path, root))}" loading="lazy" alt=""></figure>'
            for path in section.pictures
        ]
    return _PAGE.format(body="\n".join(parts))


def _contents(sections: list[Section]) -> str:
    entries = (
        f'<li><a href="#s{n}">{html.escape(s.heading)}</a></li>' for n, s in enumerate(sections) if s.heading
    )
    return f"<ul>{''.join(entries)}</ul>"


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Study</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; font-size: 13px; }}
th, td {{ padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }}
img {{ max-width: 100%; }} figure {{ margin: 1rem 0; }}
</style></head><body>
{body}
</body></html>
"""
