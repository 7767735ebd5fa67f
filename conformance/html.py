"""Results as one web page: a heat map, then the failures, smallest input first. It loads no other file."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from .cases import DTYPES, FAMILIES
from .modes import MODES
from .report import QUANTITIES, STATUSES, Results, left_out, only_values, quantities, ulps

Case = dict[str, Any]
FIRST = ("", ' class="first"')  # a gap between the columns of results
LEVELS = {1: 10, 2: 1e3, 3: 1e6}  # the shade of a failure: up to so many times its bound; above that, 4


def html(found: Results) -> str:
    failing = [(i, case) for i, run in enumerate(found["runs"]) for case in run["cases"] if case["status"] == "fail"]
    name = "unilabel conformance"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{"✓" if found["passed"] else "✗"} {name}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{name}</h1>{_headline(found)}</header>
<main>
{_map(found)}
<section id="cases" aria-labelledby="cases-title" tabindex="-1">
<h2 id="cases-title">{"What failed" if failing else "Cases"}</h2>
{_filters(found)}
{"".join(_group(found, flag, failing) for flag in [*found["flags"], "other"])}
{_others(found)}
</section>
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


# --- What was run, and what was not -----------------------------------------------------------------------------------


def _headline(found: Results) -> str:
    runs = found["runs"]
    counts = [{status: sum(c["status"] == status for c in run["cases"]) for status in STATUSES} for run in runs]
    total = {status: sum(count[status] for count in counts) for status in STATUSES}
    applied = total["pass"] + total["fail"]
    if total["fail"]:
        verdict = f"✗ {total['fail']:,} of {applied:,} answers do not match the oracle"
        verdict += f", and {total['not run']:,} never came" if total["not run"] else ""
    elif not applied:
        verdict = "✗ Nothing was checked"
    elif not found["passed"]:
        verdict = f"✗ Not everything was checked: the {applied:,} answers that came match the oracle"
    else:
        verdict = f"✓ All {applied:,} answers match the oracle"
    kind = "good" if found["passed"] else "bad"
    facts = {"unilabel": found["unilabel"], "Python": found["python"], "seed": found["seed"]}
    facts |= {"dtypes": ", ".join(found["dtypes"]), "cases": f"{len(runs[0]['cases']):,}" if runs else "0"}
    rows = [
        f'<tr><th scope="row">{escape(run["title"])}</th>'
        + "".join(f'<td class="number">{n:,}</td>' for n in count.values())
        + f"<td>{escape(run['version']) or '–'}</td><td>{escape(run['device']) or '–'}</td></tr>"
        for run, count in zip(runs, counts, strict=True)
    ]
    heads = "".join(f'<th scope="col" class="number">{status}</th>' for status in STATUSES)
    missing = [f"<strong>{escape(run['title'])}</strong>: {escape(run['problem'])}" for run in runs if run["problem"]]
    if found["interrupted"]:
        missing.insert(0, "<strong>Interrupted</strong>: this is what there was by then.")
    for run, count in zip(runs, counts, strict=True):
        title = f"<strong>{escape(run['title'])}</strong>"
        if reasons := "".join(f"<li>{n:,}: {escape(reason)}</li>" for reason, n in left_out(run)):
            summary = f"{title}: {count['not applicable']:,} answers are not applicable"
            missing.append(f"<details><summary>{summary}</summary><ul>{reasons}</ul></details>")
        if only_values(run):
            missing.append(f"{title}: gradients, as there are none. Only values were compared.")
    if found["patterns"]:
        missing.append(f"Cases that match none of <code>{escape(' '.join(found['patterns']))}</code>.")
    unasked = [dtype for dtype in DTYPES if dtype not in found["dtypes"]]
    missing += [f"Not asked for: {escape(', '.join(unasked))}."] if unasked else []
    modes = [mode for mode in MODES if mode not in found["modes"]]
    missing += [f"Modes not asked for: {escape(', '.join(modes))}."] if modes else []
    missing += [] if found["full"] else ["The large cases, which <code>--full</code> runs."]
    lines = "".join(f"<li>{line}</li>" for line in missing)
    return f"""
<p class="verdict {kind}">{verdict}</p>
<dl class="facts">{"".join(f"<div><dt>{k}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items())}</dl>
<div class="sides"><div class="scroll" role="region" aria-label="Answers" tabindex="0"><table class="plain">
<caption><span>Answers</span></caption>
<thead><tr><th scope="col">subject</th>{heads}<th scope="col">version</th><th scope="col">device</th></tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>
{f"<div><h2>Not checked</h2><ul>{lines}</ul></div>" if missing else ""}</div>"""


# --- The heat map -----------------------------------------------------------------------------------------------------


def _map(found: Results) -> str:
    """The heat map: family × column × quantity, less the quantities that a column never has."""
    runs = found["runs"]
    had = [quantities(run) for run in runs]
    families = _once(case["family"] for run in runs for case in run["cases"])
    places = [(i, run, quantity) for i, run in enumerate(runs) for quantity in had[i]]
    rows = []
    for family in families:
        row = f'<tr><th scope="row">{escape(family)}</th>'
        for i, run, quantity in places:
            cases = [case for case in run["cases"] if case["family"] == family]
            cell = _cell(cases, i, quantity, f"{family}, {run['title']}, {QUANTITIES[quantity]}")
            row += f"<td{FIRST[quantity == 'value']}>{cell}</td>"
        rows.append(f"{row}</tr>")
    columns = "".join(
        f'<th scope="colgroup" colspan="{len(names)}">{escape(run["title"])}</th>'
        for run, names in zip(runs, had, strict=True)
    )
    heads = "".join(f'<th scope="col"{FIRST[q == "value"]}>{QUANTITIES[q]}</th>' for _, _, q in places)
    said = {family: (FAMILIES[family].__doc__ or "") if family in FAMILIES else "" for family in families}
    return f"""<section aria-labelledby="map">
<h2 id="map">Where it is right</h2>
<div class="scroll" role="region" aria-labelledby="map" tabindex="0"><table class="map">
<caption><span>Worst error in ULP, and how many answers are right ✓ or wrong ✗, by family of cases</span></caption>
<thead><tr><th rowspan="2" scope="col">family</th>{columns}</tr><tr>{heads}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>
<ul class="legend"><li class="ok">✓ within what is allowed</li><li class="h1">✗ up to 10 times that</li>
<li class="h2">✗ 1000 times</li><li class="h3">✗ a million times</li><li class="h4">✗ more, or no number</li></ul>
<p class="dim">Where answers are wrong, the worst is theirs, and the cell leads to them. An error in place of an answer
counts as a value. n/a: no such case applies; –: no such quantity came.</p>
<details><summary>What the families are</summary>
<dl>{"".join(f"<dt>{escape(name)}</dt><dd>{escape(doc)}</dd>" for name, doc in said.items())}</dl></details>
</section>"""


def _cell(cases: list[Case], column: int, quantity: str, place: str) -> str:
    """A cell of the heat map: the worst of the wrong answers, or of all if none is wrong."""
    verdicts = [case["verdicts"][quantity] for case in cases if quantity in case["verdicts"]]
    wrong = [verdict for verdict in verdicts if "how" in verdict]
    errors = sum(map(_error, cases)) if quantity == "value" else 0
    worst = ulps(max((float(verdict["ulp"]) for verdict in wrong or verdicts), default=0))
    if wrong or errors:
        ratio = max((float(verdict["ulp"]) / verdict["bound"] for verdict in wrong), default=0)
        level = 4 if errors else next((level for level, most in LEVELS.items() if ratio <= most), 4)
        count, worst = f"{len(wrong) + errors}/{len(verdicts) + errors}", worst if wrong else "error"
        return (
            f'<a class="h{level}" href="#cases" aria-label="{worst} {count} ✗: show {escape(place)}" '
            f'data-column="{column}" data-family="{escape(cases[0]["family"])}" data-quantity="{quantity}">'
            f"{worst}<small>{count} ✗</small></a>"
        )
    if any(case["status"] == "not run" for case in cases):
        return '<span class="none">not run</span>'
    if verdicts:
        return f'<span class="ok">{worst}<small>{len(verdicts)} ✓</small></span>'
    applies = any(case["status"] != "not applicable" for case in cases)
    return f'<span class="none">{"–" if applies else "n/a"}</span>'


def _error(case: Case) -> bool:
    """Whether a case raised an error instead of giving an answer."""
    return case["status"] == "fail" and not any("how" in verdict for verdict in case["verdicts"].values())


# --- The cases --------------------------------------------------------------------------------------------------------


def _filters(found: Results) -> str:
    cases = [case for run in found["runs"] for case in run["cases"]]
    choices = {
        "column": [(str(i), run["title"]) for i, run in enumerate(found["runs"])],
        "family": [(name, name) for name in _once(case["family"] for case in cases)],
        "quantity": list(QUANTITIES.items()),
        "flag": [(name, name) for name in [*found["flags"], "other"]],
        "dtype": [(name, name) for name in found["dtypes"]],
        "status": [(name, name) for name in STATUSES if any(case["status"] == name for case in cases)],
    }
    selects = [
        f'<label>{"subject" if name == "column" else name}<select name="{name}"><option value="">all</option>'
        + "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options)
        + "</select></label>"
        for name, options in choices.items()
    ]
    return f"""<form class="filters" aria-label="Filters" hidden>{"".join(selects)}
<button type="reset">Show all</button><output></output></form>"""


def _group(found: Results, flag: str, failing: list[tuple[int, Case]]) -> str:
    """The failures of a flag: for each column the one with the smallest input, the others folded away."""
    blocks = []
    for i, run in enumerate(found["runs"]):
        cases = [case for column, case in failing if column == i and flag in (case["flags"] or ["other"])]
        if cases:
            first, *rest = [_failure(case, i, flag) for case in sorted(cases, key=lambda case: case["size"])]
            more = f"<details><summary>{len(rest)} more</summary><ol>{''.join(rest)}</ol></details>" if rest else ""
            head = f"<h4>{escape(run['title'])} <small>{len(cases)} wrong</small></h4>"
            blocks.append(f'<div class="block">{head}<ol>{first}</ol>{more}</div>')
    if not blocks:
        return ""
    about = found["flags"].get(flag, "cases under no flag")
    return (
        f'<section class="group"><div class="about"><h3>{escape(flag)}</h3><p>{escape(about)}</p></div>'
        f'<div class="blocks">{"".join(blocks)}</div></section>'
    )


def _failure(case: Case, column: int, flag: str) -> str:
    wrong = {quantity: verdict for quantity, verdict in case["verdicts"].items() if "how" in verdict}
    said = [
        f"<dt>{QUANTITIES[quantity]} by {escape(verdict['how'])}, element {verdict['element']}: "
        f"<span>{ulps(verdict['ulp'])} ULP, allowed {ulps(verdict['bound'])}</span></dt>"
        f"<dd>came <samp>{_marked(verdict['got'], verdict['right'])}</samp></dd>"
        f"<dd>right <samp>{escape(verdict['right'])}</samp></dd>"
        for quantity, verdict in wrong.items()
    ] or [f"<dt>error</dt><dd>came <samp>{escape(case['reason'])}</samp></dd>"]
    numbers = f"{case['size']} {'logit' if case['size'] == 1 else 'logits'}"
    return (
        f"<li {_data(case, column, [flag], list(wrong) or ['value'])}><code>{escape(case['call'])}</code>"
        f'<dl>{"".join(said)}</dl><p class="dim">{escape(case["id"])} · {numbers}</p></li>'
    )


def _marked(got: str, right: str) -> str:
    """The result, marked from the first wrong character on."""
    pairs = enumerate(zip(got, right, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(got), len(right)))
    return f"{escape(got[:same])}<b>{escape(got[same:])}</b>"


def _others(found: Results) -> str:
    """A line for each case that did not fail."""
    rows = [
        f"<tr {_data(case, i, case['flags'] or ['other'], list(case['verdicts']))}>"
        f'<th scope="row">{escape(case["id"])}</th><td>{escape(run["title"])}</td>'
        f"<td>{escape(case['status'] + ': ' * bool(case['reason']) + case['reason'])}</td>"
        + "".join(
            f'<td class="number">{ulps(case["verdicts"][q]["ulp"]) if q in case["verdicts"] else ""}</td>'
            for q in QUANTITIES
        )
        + "</tr>"
        for i, run in enumerate(found["runs"])
        for case in run["cases"]
        if case["status"] != "fail"
    ]
    if not rows:
        return ""
    heads = "".join(f'<th scope="col" class="number">{name}</th>' for name in QUANTITIES.values())
    return f"""<details class="others"><summary>{len(rows):,} that did not fail</summary>
<div class="scroll" role="region" aria-label="Cases that did not fail" tabindex="0"><table class="plain">
<caption><span>Cases that did not fail, and their errors in ULP</span></caption>
<thead><tr><th scope="col">case</th><th scope="col">subject</th><th scope="col">status</th>{heads}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div></details>"""


def _data(case: Case, column: int, flags: list[str], quantities: list[str]) -> str:
    """What the filters look at; several values are separated by |."""
    data = {"case": case["id"], "column": str(column), "family": case["family"], "dtype": case["dtype"]}
    data |= {"status": case["status"], "flag": "|".join(flags), "quantity": "|".join(quantities)}
    return " ".join(f'data-{name}="{escape(value)}"' for name, value in data.items())


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


STYLE = """
:root { --bg: #fcfcfa; --text: #1d2126; --dim: #5b636c; --line: #dcdfe2; --soft: #f2f3f1; --link: #1f5aa6;
  --good: #1c6b3c; --bad: #a8281c; --ok: #e2f0e6; --h1: #fcf0d4; --h2: #fad9b2; --h3: #f5b898; --h4: #ea9280 }
@media (prefers-color-scheme: dark) { :root {
  --bg: #16181b; --text: #e4e6e8; --dim: #a0a8b1; --line: #363b41; --soft: #1f2226; --link: #8db9f2;
  --good: #7fcf9c; --bad: #f2917f; --ok: #1b3325; --h1: #3d331d; --h2: #55371d; --h3: #6d3422; --h4: #8c3328 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 82rem; padding: 2.5rem 2rem 6rem; background: var(--bg); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
h1 { font-size: 1rem; font-weight: 600; color: var(--dim) }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem }
h1, h3, h4, p, ul, ol, dl, dd { margin: 0 }
h3 { font-size: 1.05rem } h4 { font-size: .95rem } ol { list-style: none; padding: 0 }
small, .dim, .about p { font-size: .85rem; font-weight: 400; color: var(--dim) }
code, samp { font: .85rem/1.5 ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
#cases:focus { outline: none }
summary { cursor: pointer; color: var(--link); padding: .35rem 0; font-size: .9rem; width: fit-content }
[hidden] { display: none !important }

.verdict { font-size: clamp(1.4rem, 4vw, 2rem); line-height: 1.25; font-weight: 650; margin: .35rem 0 1.25rem;
  text-wrap: balance }
.verdict.good { color: var(--good) } .verdict.bad { color: var(--bad) }
.facts { display: flex; flex-wrap: wrap; gap: .75rem 2.5rem; margin-bottom: 2rem }
.facts dt { font-size: .85rem; color: var(--dim) }
.sides { display: grid; grid-template-columns: minmax(0, max-content) minmax(16rem, 1fr); gap: 1.5rem 3.5rem }
.sides h2 { font-size: .9rem; font-weight: 400; color: var(--dim); margin: 0 0 .5rem }
.sides ul { padding-left: 1.1rem; font-size: .9rem } .sides li { margin-bottom: .4rem }

.scroll { overflow-x: auto }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; overflow-wrap: normal }
caption { text-align: left; color: var(--dim); padding-bottom: .5rem }
caption span { position: sticky; left: 0; display: block; max-width: calc(100vw - 2rem) }
th { font-weight: 600; text-align: left } thead th { color: var(--dim); font-weight: 400 }
.plain th, .plain td { padding: .35rem 1.25rem .35rem 0; border-bottom: 1px solid var(--line); white-space: nowrap }
.plain .number { text-align: right }
.sides .plain :is([scope=row], thead th) { white-space: normal; vertical-align: bottom }
.sides .plain [scope=row] { min-width: 6.5rem; overflow-wrap: anywhere }
.map { width: 100% }
.map thead th { padding: .2rem .4rem; text-align: center; vertical-align: bottom }
.map th[scope=colgroup] { color: var(--text); font-weight: 600; overflow-wrap: anywhere }
.map th:is([rowspan], [scope=row]) { position: sticky; left: 0; background: var(--bg); text-align: left;
  padding: 0 .6rem 0 0 }
.map td { min-width: 4.4rem; padding: 1px; text-align: center; line-height: 1.2 }
.map :is(a, td span) { display: grid; align-content: center; height: 2.8rem; border-radius: 6px; color: inherit;
  text-decoration: none }
.map :is(.first, [scope=colgroup]) { padding-left: .6rem }
.map small { display: block; color: inherit; font-size: .75rem }
.map a:hover { text-decoration: underline } .map a:focus-visible { outline-offset: -3px; outline-color: currentColor }
.map a[aria-current=true] { box-shadow: inset 0 0 0 2px currentColor }
.map .none { color: var(--dim) } .ok { background: var(--ok) }
.h1 { background: var(--h1) } .h2 { background: var(--h2) }
.h3 { background: var(--h3) } .h4 { background: var(--h4) }
.legend { display: flex; flex-wrap: wrap; gap: .4rem; padding: 0; margin: .9rem 0 .5rem; list-style: none }
.legend li { font-size: .8rem; padding: .15rem .6rem; border-radius: 4px }
details dt { font-weight: 600; margin-top: .4rem }

.filters { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; align-items: end;
  background: var(--soft); padding: 1rem; border-radius: 8px; margin-bottom: 1.5rem }
.filters label { font-size: .85rem; color: var(--dim) } .filters output { grid-column: 1 / -1; font-size: .9rem }
select, button { font: inherit; font-size: 1rem; min-height: 2.5rem; width: 100%; padding: .3rem .5rem; margin: 0;
  color: var(--text); background: var(--bg); border: 1px solid var(--dim); border-radius: 5px }
.group { display: grid; grid-template-columns: 15rem minmax(0, 1fr); gap: 1rem 2rem; padding: 1.75rem 0;
  border-top: 1px solid var(--line) }
.about { position: sticky; top: 1rem; align-self: start }
.blocks { display: grid; gap: 1.5rem }
.block li { margin: .5rem 0 1rem } .block dl, .block li p { padding-left: .6rem; margin-top: .2rem }
.block code { display: block; background: var(--soft); padding: .4rem .6rem; border-radius: 5px; margin-bottom: .4rem }
.block dl { font-size: .9rem } .block dt { font-weight: 400; margin-top: .2rem } .block dt span { color: var(--dim) }
.block dd { display: grid; grid-template-columns: 2.8rem 1fr; align-items: baseline; color: var(--dim);
  font-size: .85rem }
.block samp { color: var(--text) } .block dd b { color: var(--bad); text-decoration: underline }
@media (max-width: 48rem) { body { padding: 1.5rem 1rem 4rem } .group, .sides { grid-template-columns: minmax(0, 1fr) }
  .sides .plain :is(th, td) { padding-right: .75rem } .about { position: static }
  .filters { grid-template-columns: 1fr 1fr } }
"""

SCRIPT = """
const all = (selector, within = document) => [...within.querySelectorAll(selector)]
const form = document.querySelector('.filters'), cases = all('[data-case]'), others = document.querySelector('.others')
const blocks = all('.block').map(block => [block, all('li', block)])
function apply() {
  const wanted = [...new FormData(form)].filter(([, value]) => value)
  for (const row of cases) row.hidden = !wanted.every(([name, value]) => row.dataset[name].split('|').includes(value))
  for (const [block, items] of blocks) { // the smallest that is shown comes before the fold
    const shown = items.filter(item => !item.hidden), more = block.querySelector('details')
    block.hidden = !shown.length
    block.querySelector('small').textContent = shown.length + ' wrong'
    if (!more || block.hidden) continue
    block.querySelector('ol').replaceChildren(shown[0])
    more.querySelector('ol').replaceChildren(...items.filter(item => item != shown[0]))
    more.querySelector('summary').textContent = shown.length - 1 + ' more'
    more.hidden = shown.length == 1
  }
  for (const group of all('.group')) group.hidden = !all('.block', group).some(block => !block.hidden)
  const count = wrong => new Set(cases.filter(row => !row.hidden && (row.dataset.status == 'fail') == wrong)
    .map(row => row.dataset.column + ' ' + row.dataset.case)).size
  const [wrong, rest] = [count(true), count(false)]
  form.querySelector('output').textContent = `${wrong} wrong, ${rest} that did not fail`
  if (others) {
    others.hidden = !rest
    others.open = rest > 0 && !wrong && wanted.length > 0
    others.querySelector('summary').textContent = rest + ' that did not fail'
  }
  for (const cell of all('.map a')) {
    const here = ['column', 'family', 'quantity'].every(name => cell.dataset[name] == form[name].value)
    cell.setAttribute('aria-current', here)
  }
}
for (const cell of all('.map a')) cell.addEventListener('click', () => {
  for (const select of all('select', form)) select.value = cell.dataset[select.name] ?? ''
  apply()
})
form.addEventListener('change', apply)
form.addEventListener('reset', () => setTimeout(apply)) // when it has been done
form.hidden = false
apply()
"""
