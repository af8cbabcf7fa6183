"""The page around the charts. Pure; everything that comes from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lepton.report.charts import confusion_table, loss_chart, sample_grid
from lepton.report.model import Report, Stage
from lepton.report.timeline import timeline

STYLE = """
:root{--bg:#fbfaf7;--card:#fff;--ink:#1d2430;--soft:#667085;--rule:#e4e1d9;--blue:#2b6cb0;
--teal:#0f8a7e;--amber:#b7791f;--plum:#7b4397;--red:#c2410c;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--bg:#14171c;--card:#1b2027;--ink:#e8eaed;--soft:#98a2b3;
--rule:#2d343e;--blue:#63a4e8;--teal:#42c0b0;--amber:#e0a94a;--plum:#c08bdb;--red:#f08c5a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif;
font-variant-numeric:tabular-nums}
main{max-width:1080px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:17px;margin:0 0 14px}
header p{margin:2px 0;color:var(--soft)}
code{font:13px ui-monospace,monospace;color:var(--soft);overflow-wrap:anywhere}
section{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:20px;
margin-top:20px;break-inside:avoid}
small{color:var(--soft);font-size:12px}
.loop{display:grid;grid-template-columns:repeat(auto-fit,minmax(122px,1fr));gap:24px;list-style:none;
margin:0;padding:0;counter-reset:n}
.loop li{position:relative;border-top:3px solid var(--blue);padding-top:8px}
.loop li:not(:last-child)::after{content:"→";position:absolute;right:-20px;top:2px;color:var(--soft)}
.loop li:last-child::after{content:"↺ back to the lake";display:block;color:var(--soft);font-size:12px;
margin-top:4px}
.loop h3{margin:0 0 4px;font-size:14px}
dl{display:grid;grid-template-columns:auto 1fr;gap:0 8px;margin:0;font-size:13px}
dt{color:var(--soft)}dd{margin:0;text-align:right;overflow-wrap:anywhere}
.chart{display:block;width:100%;height:auto;font:12px system-ui,sans-serif}
.grid{stroke:var(--rule)}.tick{fill:var(--soft)}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.a0{stroke:var(--blue)}.a1{stroke:var(--teal)}.a2{stroke:var(--plum)}.a3{stroke:var(--amber)}
line.fault{stroke:var(--red);stroke-dasharray:4 3}text.fault{fill:var(--red)}
.trace{font-size:13px}
.row,.axis{display:grid;grid-template-columns:250px 1fr 200px;border-top:1px solid var(--rule)}
.axis{border:0;color:var(--soft);font-size:12px}
.axis div{position:relative;height:20px}.axis span{position:absolute}
.name{padding:3px 8px 3px calc(var(--depth)*14px);white-space:nowrap;overflow:hidden;
text-overflow:ellipsis}
.name b{font-weight:600}.name em{color:var(--red);font-style:normal;font-size:12px}
.bars{position:relative;min-height:26px}
.took{text-align:right;padding:4px 0 0 10px}
.name small{margin-left:4px}
.bar{position:absolute;top:7px;height:12px;min-width:2px;background:var(--blue);border-radius:2px;
opacity:.8}
.bar.failed{background:var(--red);opacity:1}
.confusion{border-collapse:collapse;font-size:13px}
.confusion caption{caption-side:bottom;text-align:left;color:var(--soft);padding-top:8px;font-size:12px}
.confusion th,.confusion td{width:38px;height:30px;text-align:center;font-weight:400}
.confusion td{color:var(--rule)}
.confusion .right{background:color-mix(in srgb,var(--teal) calc(var(--share)*60%),transparent);
color:var(--ink)}
.confusion .wrong{background:color-mix(in srgb,var(--red) calc(30% + var(--share)*50%),transparent);
color:var(--ink);font-weight:600}
.pair{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:20px}
.pair>section{overflow-x:auto}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(68px,1fr));gap:12px}
figure{margin:0}figcaption{font-size:12px;color:var(--soft)}
figcaption b{color:var(--ink);font-size:14px}
.digit{width:100%;border:1px solid var(--rule);border-radius:6px;fill:var(--ink)}
.wrong .digit{border:2px solid var(--red)}.wrong figcaption{color:var(--red)}
@media (max-width:720px){.pair{grid-template-columns:1fr}.row,.axis{grid-template-columns:128px 1fr 78px}
.axis span:not(:nth-child(4n+1)){display:none}
section:has(.chart){overflow-x:auto}.chart{min-width:640px}
.took{font-size:10px;padding-left:4px}
.name small{display:none}.loop li::after{display:none}}
"""


def render(report: Report) -> str:
    """Return the page as one HTML document."""
    title = escape(report.title)
    sections = [
        _section("The loop", _loop(report.stages)) if report.stages else "",
        _section("Loss", loss_chart(report.losses, report.faults)),
        _section("One trace", timeline(report.spans)),
        _answers(report),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{title}</h1><p>{escape(report.subtitle)}</p>"
        f"<p>trace <code>{escape(report.trace_id)}</code></p></header>"
        f"{''.join(sections)}</main></body></html>"
    )


def _section(name: str, body: str) -> str:
    return f"<section><h2>{escape(name)}</h2>{body}</section>"


def _loop(stages: Sequence[Stage]) -> str:
    items = ""
    for stage in stages:
        facts = "".join(
            f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in stage.figures.items()
        )
        items += f"<li><h3>{escape(stage.name)}</h3><dl>{facts}</dl></li>"
    return f'<ol class="loop">{items}</ol>'


def _answers(report: Report) -> str:
    parts = ""
    if report.confusion is not None:
        parts += _section("Evaluation", confusion_table(report.confusion, report.labels))
    if report.samples:
        parts += _section("Answers over HTTP", sample_grid(report.samples))
    return f'<div class="pair">{parts}</div>' if parts else ""
