"""Record benchmark rows and the page that shows them.

    python -m fastvit.benchmarks.record [--size small|full] [--threads N] [SUITE ...]
    python -m fastvit.benchmarks.record --from out/gpu/bench.jsonl [SUITE ...]
    python -m fastvit.benchmarks.record traffic
    python -m fastvit.benchmarks.record --render

Writes benchmarks/results/<machine>/<suite>.jsonl, one file a suite, then benchmarks/RESULTS.md from all files there,
those of other machines included, and the table in README.md of the ops for the processor. The suite traffic, counted
and the same on every machine, is run only where it is named, and goes into results/counted. With --from the rows are
those of a file that `make gpu` has written, with --render only the pages are. Run it on a machine that does nothing
else.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastvit.benchmarks.problem import SIZES
from fastvit.benchmarks.rows import Row, read_json_lines, rivals_of, write_json_lines
from fastvit.benchmarks.runner import SUITES, run_suites
from fastvit.benchmarks.traffic import suite as traffic

TRAFFIC, COUNTED = "traffic", "counted"  # the suite that is not timed, and its folder
FOLDER = Path(__file__).resolve().parent
HEAD = """# Benchmark results

Written by `python -m fastvit.benchmarks.record` from the rows in `results/`. Ratio: the rival's median over ours, above
1 we are faster; losses are in **bold**. Of a rival's settings (eager, channels_last, compiled) the best one counts.
Each case was checked against float64 in the same process before it was timed; rivals were interleaved with ours. Times
are medians, with the 20th and 80th percentile. "Of floor" is the time that the machine's own GEMM rate and copy
bandwidth, measured in the same run, would allow, over our median.
"""


def machine(row: Row) -> str:
    """A folder's name for the machine that a row was measured on: "nvidia-h200", "amd-epyc-2-threads-avx2"."""
    words = f"{row.device} {row.versions.get('capability', '')}".lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def render(files: Sequence[tuple[str, str, Sequence[Row]]]) -> str:
    """RESULTS.md for recorded files, each a machine, a suite and its rows."""
    parts = [HEAD]
    above = ""
    for name, suite, rows in files:
        if name != above:
            capability = rows[0].versions.get("capability", "") if rows else ""
            parts.append(f"\n## {rows[0].device if rows else name}{capability and f', {capability}'}\n")
            above = name
        if not rows:
            parts.append(f"\n### {suite}\n\nNo rows.\n")
            continue
        parts.append(f"\n### {suite}\n\n{rows[0].about}; `{rows[0].command}`\n\n{_table(rows)}")
        reasons = dict.fromkeys((row.provider, row.shape, row.mode, row.reason) for row in rows if row.reason)
        parts += [f"- {provider}, {shape}, {mode}: {reason}\n" for provider, shape, mode, reason in reasons]
    return "".join(parts)


def _table(rows: Sequence[Row]) -> str:
    rivals = rivals_of(rows)
    headings = ["shape", "dtype", "layout", "mode", "provider", "vs best rival", *(f"vs {rival}" for rival in rivals)]
    headings += ["median", "of floor"]
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    for row in rows:
        if row.is_ours and row.median_us is not None:
            cells = [*row.case[1:], row.provider]
            cells += [f"{_ratio(row.headline)} ({row.best_rival})" if row.best_rival else ""]
            cells += [_ratio(row.ratios.get(rival)) for rival in rivals]
            cells += [_time(row), row.floor_text()]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n"


def of_campaign(rows: Sequence[Row], suites: Sequence[str]) -> Iterator[list[Row]]:
    """The rows of each suite that a campaign has measured; of a case that several stages did, the last one's."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        known = cases.setdefault(row.case, [])
        if known and known[-1].command != row.command:
            known.clear()
        known.append(row)
    for suite in suites:
        found = [row for measured in cases.values() for row in measured if row.op == suite]
        if found:
            yield found


def render_traffic(rows: Sequence[traffic.TrafficRow]) -> str:
    """The part of RESULTS.md about what was counted."""
    versions = ", ".join(f"{name} {version}" for name, version in rows[0].versions.items() if version)
    about = f"{versions}; commit {rows[0].commit}; `{rows[0].command}`"
    text = f"""
## Counted: traffic of a training step

Nothing here was timed and no GPU was used; {about}

Bytes per token value and block, products and attention apart, and in brackets the launches of a block, with them.

"""
    headings = ["shape", "setting", "stream", "host", *traffic.WAYS]
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    lines += ["| " + " | ".join(cells) + " |" for cells in traffic.cells(rows)]
    reasons = dict.fromkeys((row.host, row.setting, row.way, row.reason) for row in rows if row.reason)
    lines += ["", *(f"- {host}, {setting}, {way}: {reason}" for host, setting, way, reason in reasons)]
    return text + "\n".join(lines) + "\n"


NATIVE = "fastvit:native"
MARKS = "<!-- recorded -->\n", "<!-- /recorded -->\n"  # around the table in README.md


def summary(files: Sequence[tuple[str, str, Sequence[Row]]]) -> str:
    """README.md's table: of each suite that the ops for the processor were measured in, how much longer the best rival
    took, over its cases in float32 and uint8."""
    lines = ["| machine | suite | cases | least | median | most |", "|---|---|---|---|---|---|"]
    for _, suite, rows in files:
        ratios = [
            row.headline for row in rows if row.provider == NATIVE and row.headline and row.dtype.endswith("float32")
        ]
        if ratios:
            capability = rows[0].versions.get("capability", "")
            cells = [f"{rows[0].device}, {capability}", f"`{suite}`", str(len(ratios))]
            cells += [_ratio(function(ratios)) for function in (min, statistics.median, max)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_summary(page: str, table: str) -> str:
    """A page with the table between its marks."""
    before, mark, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise ValueError("README.md: the marks of the recorded table are gone")
    return f"{before}{mark}{table}{end}{after}"


def _progress(done: int, total: int, title: str) -> None:
    print(f"{done}/{total} {title}", file=sys.stderr, flush=True)


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"**{ratio:.2f}x**" if ratio < 1 else f"{ratio:.2f}x"


def _time(row: Row) -> str:
    median, p20, p80 = ((value or 0.0) / 1000 for value in (row.median_us, row.p20_us, row.p80_us))
    return f"{median:.2f} ms ({p20:.2f} to {p80:.2f})"


def _recorded(options: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows that are to be written, suite by suite.

    Raises:
        OSError, ValueError: the file of a campaign can't be read, or is none.
    """
    suites = [name for name in options.suites or SUITES if name != TRAFFIC]
    if options.render:
        return iter(())
    if not options.source:
        how = {"progress": _progress, "seconds": options.seconds, "threads": options.threads}
        return (run_suites([suite], options.size, **how) for suite in suites)
    found = list(of_campaign(read_json_lines(options.source), suites))
    if not found:
        raise ValueError(f"{options.source}: no rows of {', '.join(suites)}")
    return iter(found)


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """The command line; returns the exit code: 1 if a case of ours was not timed here."""
    about_this = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m fastvit.benchmarks.record", description=about_this)
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default: all; or {TRAFFIC}"
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's setting")
    parser.add_argument("--seconds", type=float, help="to spend on timing each case")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="take the rows of a campaign instead")
    parser.add_argument("--render", action="store_true", help="only write RESULTS.md from the recorded rows")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.suites if name not in (*SUITES, TRAFFIC)]
    if unknown:
        parser.error(f"unknown suite {unknown[0]!r}; known: {', '.join(SUITES)}, {TRAFFIC}")
    results, readme = folder / "results", folder.parent / "README.md"
    counted = results / COUNTED / f"{TRAFFIC}.jsonl"
    if TRAFFIC in options.suites:
        others = traffic.cases(["timm"], ["Ti", "B", "L"], ["plain"], ["float32"])
        write_json_lines(traffic.run([*traffic.cases(), *others], _progress), counted)
    missing = 0
    try:
        measured = _recorded(options)
    except (OSError, ValueError) as error:
        parser.error(f"--from: {error}")
    for rows in measured:
        write_json_lines(rows, results / machine(rows[0]) / f"{rows[0].op}.jsonl")
        missing += sum(row.is_ours and row.median_us is None for row in rows)
    timed = [path for path in sorted(results.glob("*/*.jsonl")) if path != counted]
    recorded = [(path.parent.name, path.stem, read_json_lines(path)) for path in timed]
    page = folder / "RESULTS.md"
    text = render(recorded) + (render_traffic(traffic.read_json_lines(counted)) if counted.exists() else "")
    page.write_text(text, encoding="utf-8")
    if readme.exists():
        readme.write_text(with_summary(readme.read_text(encoding="utf-8"), summary(recorded)), encoding="utf-8")
    print(f"Wrote {page.name} from {len(recorded)} files")
    return int(missing > 0 and not options.source)


if __name__ == "__main__":
    sys.exit(main())
