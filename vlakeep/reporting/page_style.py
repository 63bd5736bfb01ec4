"""Style sheet of the report page: light and dark, from phones to desktops, nothing loaded from anywhere."""

from vlakeep.reporting.figures import Style, css_name

CSS = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",
"Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif}
main,header,footer{max-width:1240px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
.over{color:var(--muted);font-size:.85rem;letter-spacing:.02em;margin:0 0 10px}
h1{text-wrap:pretty;
font-size:clamp(1.45rem,1.05rem + 1.7vw,2.3rem);line-height:1.22;letter-spacing:-.015em;margin:0 0 16px;max-width:34em}
h2{font-size:1.3rem;line-height:1.3;letter-spacing:-.01em;margin:52px 0 6px}
h3{font-size:1rem;line-height:1.35;margin:0 0 8px}
p{margin:0 0 10px;max-width:76ch;overflow-wrap:anywhere}
.lead{display:grid;grid-template-columns:minmax(0,6fr) minmax(0,5fr);gap:8px 40px;align-items:start}
.zh{color:var(--muted);border-left:3px solid var(--line);padding-left:12px;font-size:.95rem;line-height:1.75}
.hint{color:var(--muted);font-size:.92rem}
nav{display:flex;flex-wrap:wrap;gap:6px 18px;margin:18px 0 0;padding:12px 0;border-top:1px solid var(--line);
border-bottom:1px solid var(--line);
font-size:.92rem}
a{color:var(--link);text-decoration:none}
a:hover,a:focus-visible{text-decoration:underline}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,250px),1fr));gap:14px;margin:22px 0 0}
.card{background:var(--card);border:1px solid var(--line);
border-top:4px solid var(--c);border-radius:10px;padding:14px 16px;min-width:0}
.card dl{display:grid;grid-template-columns:1fr 1fr;gap:4px 14px;margin:0}
.card dt{color:var(--muted);font-size:.8rem;order:1}
.card dd{margin:0;font-size:1.5rem;font-weight:650;line-height:1.15;font-variant-numeric:tabular-nums;order:0}
.card dd small{display:block;color:var(--muted);font-size:.78rem;font-weight:400;line-height:1.5;white-space:nowrap}
.card div{display:flex;flex-direction:column;min-width:0}
.card .badge{margin-left:8px}
.panel{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px;min-width:0;margin:0}
.grid{display:grid;gap:16px;margin:16px 0 0}
.two{grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr))}
.three{grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr))}
.start{align-items:start}
figure svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
figcaption{color:var(--muted);font-size:.88rem;line-height:1.5;margin-top:10px}
.narrow{display:none}
.scroll{overflow-x:auto;max-width:100%;background:var(--card);border:1px solid var(--line);border-radius:10px;margin:14px 0;
-webkit-overflow-scrolling:touch}
.scroll:focus-visible{outline:2px solid var(--link)}
table{border-collapse:separate;border-spacing:0;font-size:.92rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:5px 12px;text-align:right;vertical-align:top;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child{text-align:left;position:sticky;left:0;background:var(--card);z-index:1;font-weight:500}
thead th{font-weight:600;vertical-align:bottom;font-size:.86rem}
thead .badge{display:block;width:max-content;margin:3px 0 0 auto}
thead .chip{white-space:normal;max-width:8.5em}
thead th small,tbody th small{display:block;color:var(--muted);font-weight:400;font-size:.78rem}
tbody th small{display:inline;margin-left:6px}
tbody tr:last-child>*{border-bottom:0}
td b{display:block;font-weight:600}
td i{display:block;font-style:normal;color:var(--muted);font-size:.82rem}
tr.section th,tr.section td{padding-top:16px;padding-bottom:4px;border-bottom:1px solid var(--strong);background:var(--card)}
tr.section span{color:var(--muted);font-size:.76rem;letter-spacing:.07em;text-transform:uppercase}
tr.mean>*{background:var(--soft)}
.edge{border-left:1px solid var(--line)}
th[colspan]{text-align:center}
.small .chip{font-size:.74rem;font-weight:500;line-height:1.3;white-space:normal;max-width:6.2em}
.small,.count{padding-left:8px;padding-right:8px}
.count{color:var(--muted);text-align:center}
.crashed{color:var(--bad);font-weight:700}
.none{color:var(--muted)}
.chip{display:inline-flex;align-items:center;gap:7px;text-align:left}
.chip::before{content:"";width:10px;height:10px;border-radius:3px;background:var(--c);flex:none}
.badge{display:inline-block;
border-radius:99px;padding:1px 8px;font-size:.74rem;font-weight:600;line-height:1.5;background:var(--soft);
color:var(--muted);margin-top:3px}
.badge.better{background:var(--good-soft);color:var(--good)}
.badge.worse{background:var(--bad-soft);color:var(--bad)}
.facts td,.facts th{text-align:left;font-size:.86rem;white-space:normal;min-width:9em}
.facts th:first-child{min-width:5.5em}
.facts td{overflow-wrap:anywhere;min-width:15em}
ul.findings{list-style:none;margin:0;padding:0}
ul.findings li{padding:5px 0 5px 26px;position:relative;font-size:.94rem;overflow-wrap:anywhere}
ul.findings li::before{position:absolute;left:2px;font-weight:700}
.good::before{content:"+";color:var(--good)}
.bad::before{content:"\\2212";color:var(--bad)}
.neutral::before{content:"\\00b7";color:var(--muted)}
.warn::before{content:"!";color:var(--warn)}
.notes{border:1px solid var(--warn);border-radius:10px;padding:10px 16px;margin:18px 0 0;background:var(--card)}
pre{background:var(--card);
border:1px solid var(--line);border-radius:10px;padding:14px 16px;overflow-x:auto;max-width:100%;font-size:.82rem;
line-height:1.7;margin:12px 0}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.92em;overflow-wrap:anywhere}
pre code{overflow-wrap:normal;font-size:1em}
details{margin:14px 0}
summary{cursor:pointer;font-weight:500}
footer{color:var(--muted);font-size:.85rem;padding-top:36px;padding-bottom:48px}
@media (max-width:860px){.lead{grid-template-columns:minmax(0,1fr)}}
@media (max-width:640px){
 main,header,footer{padding-left:16px;padding-right:16px}
 header{padding-top:26px}
 h2{margin-top:40px}
 .panel{padding:12px}
 .wide.paired{display:none}
 .narrow{display:block}
 th,td{padding:6px 10px}
 th:first-child{max-width:34vw;white-space:normal;box-shadow:1px 0 0 var(--line)}
 tbody th small{display:block;margin-left:0}
 .chip{white-space:normal;min-width:5.5em}
}
@media print{body{background:#fff}.scroll{overflow:visible}nav{display:none}}
"""
LIGHT = {
    "page": "#f6f7f9",
    "card": "#ffffff",
    "soft": "#f3f5f8",
    "ink": "#1b2733",
    "muted": "#5b6875",
    "line": "#dfe4ea",
    "strong": "#b9c2cc",
    "link": "#0a5fa8",
    "good": "#0b6b4b",
    "good-soft": "#dcf3ea",
    "bad": "#a8330b",
    "bad-soft": "#fde6dc",
    "warn": "#8a6100",
}
DARK = {
    "page": "#10151b",
    "card": "#181f27",
    "soft": "#1f2731",
    "ink": "#e7ecf1",
    "muted": "#9ba8b5",
    "line": "#2d3743",
    "strong": "#4b5866",
    "link": "#7cc0f5",
    "good": "#6fe0b3",
    "good-soft": "#143a2d",
    "bad": "#ffab87",
    "bad-soft": "#47220f",
    "warn": "#e5c15f",
}


def style_sheet(style: Style) -> str:
    """The whole style sheet, with one variable per arm."""
    light, dark = dict(LIGHT), dict(DARK)
    for name, (day, night, _) in style.items():
        light[css_name(name)[2:]], dark[css_name(name)[2:]] = day, night

    def block(values):
        return ":root{" + "".join(f"--{key}:{value};" for key, value in values.items()) + "}"

    return f":root{{color-scheme:light dark}}{block(light)}@media (prefers-color-scheme:dark){{{block(dark)}}}{CSS}"
