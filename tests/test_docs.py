"""The documents stay true: links, stages, flags, functions, tests, log fields and quoted messages exist; translations match."""

import ast
import importlib.util
import json
import re
import textwrap
from pathlib import Path

import pytest
from commands import all_options, wrong_options
from PIL import Image
from test_layout import DOCUMENTS, LAYERS, PACKAGE, REPO, SOURCES

from vlakeep import cli
from vlakeep.benchmarks.records import wilson
from vlakeep.core.config import EvaluateConfig, load_config
from vlakeep.core.registry import method_class
from vlakeep.core.storage import Storage, find_checkpoint
from vlakeep.data.formats import closing_all, open_datasets
from vlakeep.methods import graded_offline
from vlakeep.probe.probe_set import ProbeSet
from vlakeep.tabletop.questions import QUESTION_KINDS

# Options of other programs in the examples, and the pattern of ours.
OTHER = {"section.key", "requeue", "signal", "open-mode", "standalone", "nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint",
         "rdzv-id", "ntasks-per-node", "gpus-per-node", "signals-to-handle", "local-dir", "array",
         "model_family", "task_suite_name", "pretrained_checkpoint", "center_crop",
         "no-deps"}  # run_libero_eval.py from model_family on, and pip
TEXTS = [*DOCUMENTS, *sorted((PACKAGE / "configs").rglob("*.yaml")), *sorted(p for p in (REPO / "scripts").iterdir() if p.is_file())]
PAIRS = [("README.md", "README.zh-CN.md"), ("docs/RESEARCH_PIPELINE.md", "docs/RESEARCH_PIPELINE.zh-CN.md"),
         ("docs/getting-started.md", "docs/getting-started.zh-CN.md"), ("docs/reading-a-run.md", "docs/reading-a-run.zh-CN.md"),
         ("docs/graded.md", "docs/graded.zh-CN.md")]
# A page about extending -> the class of which it names every member.
SEAMS = [("docs/add-a-method.md", "methods/base.py", "Method"), ("docs/add-a-model.md", "models/base.py", "Backbone"),
         ("docs/add-a-benchmark.md", "benchmarks/base.py", "Benchmark")]
FENCE = re.compile(r"^ *```.*?^ *```$", re.M | re.S)
METRICS = re.compile(r"<!-- metrics-fields -->(.*?)<!-- /metrics-fields -->", re.S)

_spec = importlib.util.spec_from_file_location("doc_tables", REPO / "scripts" / "doc_tables.py")
doc_tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(doc_tables)


def read(name) -> str:
    return (REPO / name).read_text(encoding="utf-8")


def prose(path: Path) -> str:
    """A document without code blocks and HTML comments."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", path.read_text(encoding="utf-8")), flags=re.S)


def headings(text: str):
    return re.findall(r"^(#+) +(.+?) *$", FENCE.sub("", text), flags=re.M)


def anchors(path: Path):
    """The ids that GitHub gives the headings."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in headings(path.read_text(encoding="utf-8"))}


def rows(text: str):
    """Cells of every table row."""
    for line in text.splitlines():
        if line.strip().startswith("|") and not re.fullmatch(r"[\s|:-]+", line):
            yield [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def test_the_documents_are_there():
    assert {"README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {p.name for p in DOCUMENTS}
    assert {"OVERVIEW.md", "RESEARCH_PIPELINE.md", "paper_map.md", "formats.md", "log.md"} <= {p.name for p in DOCUMENTS}
    assert {"source_confirmation.md", "evidence.md"} <= {p.name for p in DOCUMENTS}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_resolve(path):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_stages_and_flags_exist():
    """A flag behind a command is one of that command; one that stands alone is one of any."""
    keys, wrong, stages, flags = {*all_options(), *OTHER}, [], 0, 0
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        code = text if path not in DOCUMENTS else "\n".join(FENCE.findall(text) + re.findall(r"`[^`\n]+`", prose(path)))
        for name in re.findall(r"(?<![\w./-])vlakeep ([a-z][a-z0-9-]+)", code):
            stages += 1
            wrong += [f"{path.name}: vlakeep {name}"] if name not in cli.STAGES else []
        wrong += [f"{path.name}: {command}" for command in wrong_options(code)]
        for flag in re.findall(r"(?<![\w-])--([A-Za-z][\w.-]*)", text if path.suffix != ".py" else ""):
            flags += 1
            known = flag.rstrip(".-") in keys or flag.startswith(("options.", "data.cards."))  # a method's own
            wrong += [] if known else [f"{path.name}: --{flag}"]
    assert wrong == []
    assert stages > 40 and flags > 100, "the patterns of this test are broken"


@pytest.mark.parametrize("command, wrong", [
    ("vlakeep train --config x.yaml --demos 3", ["vlakeep train: --demos"]),
    ("vlakeep libero-demos --demos 3 --train.lr=1 --root x", ["vlakeep libero-demos: --train.lr"]),
    ("vlakeep fetch openvla/openvla-7b --config x.yaml", ["vlakeep fetch: --config"]),
    ("vlakeep train && vlakeep preflight --gpus 8 | tee --append log", []),
    ("vlakeep storage-check --gpus 8", ["vlakeep storage-check: --gpus"]),
    ("vlakeep pretrain-tabletop --minutes 8 \\\n    --train.lr 1", ["vlakeep pretrain-tabletop: --train.lr"]),
    ("torchrun --standalone -m vlakeep.cli train --train.lr 1 --minutes 8", ["vlakeep.cli train: --minutes"]),
    ("scripts/run_method_train.sh --gpus 8 --demos 3", ["scripts/run_method_train.sh --gpus: --demos"]),
    ('ALL=(--lora.rank 8)\nALL+=(--threads 2)\nvlakeep offline "${ALL[@]}"', ["vlakeep offline: --lora.rank"]),
    ("python speed/step_time.py --rounds 3 --demos 3", ["python speed/step_time.py: --demos"]),
])
def test_an_option_of_another_stage_is_found(command, wrong):
    assert wrong_options(command) == wrong


def defined(path: Path):
    """Names of a Python file: functions, classes, `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= {f"{node.name}.{child.name}" for child in getattr(node, "body", []) if isinstance(child, ast.FunctionDef)}
    return names


def test_paper_map_names_what_exists():
    text = read("docs/paper_map.md")
    functions = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    tests = re.findall(r"`tests/(test_\w+\.py)::(\w+)`", text)
    assert len(functions) > 60 and len(tests) > 50
    wrong = [f"{f}:{n}" for f, n in functions if not (PACKAGE / f).is_file() or n not in defined(PACKAGE / f)]
    wrong += [f"{f}::{n}" for f, n in tests if not (REPO / "tests" / f).is_file() or n not in defined(REPO / "tests" / f)]
    assert wrong == []


def test_evidence_names_what_exists():
    functions = re.findall(r"`([\w/]+\.py):([A-Za-z_][\w.]*)`", read("docs/source_confirmation.md"))
    assert len(set(functions)) > 40
    assert [f"{f}:{n}" for f, n in functions if function_node(f, n) is None] == []


def test_paper_map_lists_every_requirement():
    listed = [row[0] for row in rows(read("docs/paper_map.md").split("## Requirements")[1])][1:]
    groups = {"G": 5, "S": 6, "O": 9, "T": 6, "E": 5, "A": 3}
    assert listed == [f"{letter}{i}" for letter, count in groups.items() for i in range(1, count + 1)]


def function_node(file: str, name: str):
    """The function or class `name` (`Class.method` for a method) of a file below vlakeep/; None when there is none."""
    found = ast.parse((PACKAGE / file).read_text(encoding="utf-8")) if (PACKAGE / file).is_file() else None
    for part in name.split("."):
        found = next((child for child in getattr(found, "body", []) if getattr(child, "name", None) == part), None)
    return found


def keys_made(file: str, name: str):
    """String keys that a function puts into dictionaries: literals, `d["key"] = `, `update(key=...)`."""
    keys = set()
    for node in ast.walk(function_node(file, name)):
        if isinstance(node, ast.Dict):
            keys |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.slice, ast.Constant):
            keys.add(node.slice.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "update":
            keys |= {keyword.arg for keyword in node.keywords if keyword.arg}
    return keys


def test_log_fields_are_those_of_the_code():
    """docs/formats.md and both pages about reading a run list the fields that the loop, the meters and the controller make, no other."""
    surgery = keys_made("hsw/meter.py", "NormMeter.read")
    made = {"step", *keys_made("train.py", "train_step"), *keys_made("train.py", "_loop"), *surgery, "nonfinite"}
    made |= keys_made("core/loss_scale.py", "LossScaler.log")
    made |= {f"lora_input/{key}" for key in surgery} | keys_made("methods/icsm_hsw_thermostat.py", "IcsmHswThermostat.after_step")
    made |= keys_made("methods/icsm_hsw_thermostat.py", "IcsmHswThermostat._measure")
    made |= keys_made("thermostat/controller.py", "Controller._row")
    made -= {"scaler", "method", "guard", "stream"}  # parts of a checkpoint, named in the same function
    assert '"lora_input/"' in (PACKAGE / "methods" / "icsm_hsw_thermostat.py").read_text()
    assert '"nonfinite"' in (PACKAGE / "core" / "rundir.py").read_text()
    listed = [row[0].strip("`") for row in rows(METRICS.search(read("docs/formats.md"))[1])][1:]
    assert sorted(listed) == sorted(made)
    for name, title in (("docs/reading-a-run.md", "## Log fields"), ("docs/reading-a-run.zh-CN.md", "## 日志字段")):
        table = read(name).split(title)[1].split("\n## ")[0]
        told = [field for row in list(rows(table))[1:] for field in re.findall(r"`([^`]+)`", row[0])]
        assert sorted(told) == sorted(listed), name


def messages() -> str:
    """Every text of the code, f-strings with a gap where a value stands, one per line."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
                found.append("".join(str(c.value) for c in ast.walk(node) if isinstance(c, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in found)


def test_quoted_messages_are_in_the_code():
    known = messages()
    quoted = [row[0].strip("`") for row in rows(read("docs/troubleshooting.md"))][1:]
    assert len(quoted) > 30
    missing = [text for text in quoted if not all(part.strip() in known for part in text.split("..."))]
    assert missing == []


def test_modules_that_documents_name_exist():
    """`vlakeep.room.file`, with or without a name inside it, and `vlakeep/room/file.py`; the log and the changelog tell of earlier ones."""
    named, gone = 0, []
    for path in DOCUMENTS:
        if path.name in ("log.md", "CHANGELOG.md"):
            continue
        for word in re.findall(r"(?<!github.com/)\bvlakeep(?:[./][A-Za-z_]\w*)+(?:\.py\b)?", path.read_text(encoding="utf-8")):
            parts = word.removesuffix(".py").replace("/", ".").split(".")
            if any(part.isupper() or "NAME" in part for part in parts):
                continue  # a placeholder
            named += 1
            places = [REPO.joinpath(*parts[:count]) for count in (len(parts), len(parts) - 1) if count > 1]
            if not any(place.with_suffix(".py").is_file() or place.is_dir() for place in places):
                gone.append(f"{path.name}: {word}")
    assert named > 50 and gone == []


@pytest.mark.parametrize("english,chinese", PAIRS)
def test_chinese_documents_have_the_structure_of_the_english_ones(english, chinese):
    one, two = read(english), read(chinese)
    assert [level for level, _ in headings(one)] == [level for level, _ in headings(two)]
    assert len(FENCE.findall(one)) == len(FENCE.findall(two))
    shell = re.compile(r"^```bash\n(.*?)^```$", re.M | re.S)
    assert shell.findall(one)[1:] == shell.findall(two)[1:], "the commands differ"
    assert len(list(rows(one))) == len(list(rows(two)))
    assert re.search("[\u4e00-\u9fff]", two)


def test_documents_name_no_machine():
    wrong = [p.name for p in DOCUMENTS if re.search(r"/work/|/root/|/home/\w|localhost|\b\d+\.\d+\.\d+\.\d+\b", p.read_text())]
    assert wrong == []


def demo_block(name: str) -> str:
    return re.search(r"<!-- demo-results -->(.+)<!-- /demo-results -->", read(name), flags=re.S)[1]


def test_figures_of_the_demo_are_those_of_fifty_episodes_and_the_same_in_both_languages():
    """Every rate with an interval is a Wilson interval of EPISODES trials, and every mean one that its arm can have."""
    told = [[re.findall(r"\d\.\d+", " ".join(row[1:])) for row in rows(demo_block(name))][1:] for name in PAIRS[0]]
    assert told[0] == told[1] and len(told[0]) == len(doc_tables.ARMS)
    possible = [[f"{value:.2f}" for value in wilson(successes, EvaluateConfig().episodes)] for successes in range(51)]
    for new, new_low, new_high, old, pick, pick_low, pick_high, place, place_low, place_high, asked in told[0]:
        assert [new, new_low, new_high] in possible and [pick, pick_low, pick_high] in possible
        assert [place, place_low, place_high] in possible
        assert (float(pick) + float(place)) / 6 <= float(old) + 5e-4 <= (4 + float(pick) + float(place)) / 6 + 1e-3 and float(asked) <= 1


def test_figures_of_the_demo_are_those_of_its_report():
    """docs/img/demo.json, if it is there, is the summary of the report whose figure is demo.png."""
    if doc_tables.RESULTS.is_file():
        results = json.loads(doc_tables.RESULTS.read_text(encoding="utf-8"))
        for name, language in doc_tables.LANGUAGES.items():
            assert doc_tables.demo_table(language, results) in demo_block(name), f"{name}: python scripts/doc_tables.py"


def a_report(new=0.94):
    """A summary.json as the report of a whole demo has it."""
    def rate(mean):
        return {"mean": mean, "low": mean / 2, "high": 1.0}

    skills = {name: rate(0.5) for name in ("pick", "place", "tap", "drop", "reach", "side")}
    asked = {name: rate(1.0) for name in QUESTION_KINDS}
    return {"arms": {arm: {"new_skill": rate(new), "abilities": {**skills, **asked}} for arm in doc_tables.ARMS}}


def test_the_demo_table_is_made_from_a_report():
    lines = doc_tables.demo_table(0, a_report()).splitlines()
    assert lines[2] == "| base (before training) | 0.94 [0.47, 1.00] | 0.500 | 0.50 [0.25, 1.00] | 0.50 [0.25, 1.00] | 1.000 |"
    assert len(lines) == 2 + len(doc_tables.ARMS)
    half = a_report()
    half["arms"]["graded"]["abilities"].pop("tap")
    with pytest.raises(ValueError, match="arm graded has 5 old skills and 6 kinds of questions: not a whole demo"):
        doc_tables.demo_table(0, half)


def test_a_loop_that_swings_or_shuts_is_counted_as_one():
    """docs/where-it-fails.md, on made measurements with a target of 1."""
    from fail_tables import as_good, at_equal, kind_of, reached, signs, swings

    def run(divergences, openings, **rest):
        steps = range(10, 10 * len(divergences) + 1, 10)
        return {"curves": {"step": [0, *steps], "kl": [0.0, *divergences], "opening": [None, *openings]}, **rest}

    steady = run([1.0] * 40, [8.0] * 40)
    assert kind_of(steady, 1.0) == "neither" and signs(steady, 1.0) == (False, False)
    turns = run([0.4, 3.1] * 20, [8.0, 6.0] * 20)
    assert kind_of(turns, 1.0) == "swings" and signs(turns, 1.0) == (True, False)
    assert swings([(10, 0.6, 1.0), (20, 3.1, 1.0), (30, 0.4, 1.0), (40, 2.9, 1.0)], 1.0) == 1
    falling = run([1.0] * 40, [8.0] * 10 + [1.0] * 29 + [0.7])
    assert kind_of(falling, 1.0) == "shuts without swinging" and signs(falling, 1.0) == (False, True)
    assert kind_of(run([0.4, 3.1] * 20, [8.0] * 39 + [0.7]), 1.0) == "swings and shuts"
    assert reached({50: 0.9, 60: 0.4, 70: 0.5}, 0.5) == 60 and reached({50: 0.9}, 0.5) is None
    assert at_equal([(0.2, 1.0), (0.4, 0.8), (0.8, 0.4)], 0.6) == pytest.approx(0.6) and at_equal([(0.2, 1.0), (0.4, 0.8)], 0.5) is None

    def cell(new, old):
        trials = {"new:a": new, "skill:b": old, "question:c": "1"}
        return {"arm": "x", "trials": {key: {"outcomes": value} for key, value in trials.items()}, "action_kl": None, "probe_kl": None}

    one = {("a", seed): cell("10", "10") for seed in range(3)}
    other = {("a", 0): cell("10", "10"), ("a", 1): cell("11", "00"), ("a", 2): cell("11", "10")}
    assert as_good(one, other, ["a"]) == "2 of 3"


def test_generated_tables_are_fresh():
    stale = [str(path.relative_to(REPO)) for path in doc_tables.stale()]
    assert stale == [] and doc_tables.main(["--check"]) == 0, "run: python scripts/doc_tables.py"


def test_generated_tables_are_complete():
    """Every room, every file and every stage: words for a room that is gone, or a room without words, are found."""
    assert list(doc_tables.ROOMS) == [room for line in LAYERS for room in line]
    listed = set(re.findall(r"^\| `([\w.]+)` \|", read("docs/file-map.md"), flags=re.M))
    files = [path for path in SOURCES if path.name != "__init__.py"]
    assert len(files) > 100 and {path.name for path in files} <= listed
    counted = read("docs/file-map.md").split("## scripts/")[0]
    assert len(re.findall(r"^\| `", counted, flags=re.M)) == len(files)
    assert set(re.findall(r"^\| `vlakeep ([a-z0-9-]+)` \|", read("docs/OVERVIEW.md"), flags=re.M)) == set(cli.STAGES)


def test_a_stale_table_is_found_and_a_place_that_is_missing_is_told(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- stages -->\nold\n<!-- /stages -->\nz\n")
    fresh = doc_tables.filled(page.read_text(), "stages", "new")
    assert fresh == "a\n<!-- stages -->\nnew\n<!-- /stages -->\nz\n"
    assert list(doc_tables.stale(lambda: {page: fresh})) == [page] and not doc_tables.stale(lambda: {page: page.read_text()})
    with pytest.raises(ValueError, match="0 places <!-- rooms -->"):
        doc_tables.filled(page.read_text(), "rooms", "new")


@pytest.mark.parametrize("page, file, name", SEAMS, ids=lambda value: str(value))
def test_pages_about_extending_name_every_member(page, file, name):
    node, members = function_node(file, name), set()
    for child in node.body:
        targets = [child.target] if isinstance(child, ast.AnnAssign) else child.targets if isinstance(child, ast.Assign) else []
        members |= {target.id for target in targets} | ({child.name} if isinstance(child, ast.FunctionDef) else set())
    missing = [m for m in sorted(members) if not m.startswith("_") and not re.search(rf"`{m}\b", read(page))]
    assert members and missing == []


@pytest.mark.parametrize("page, file", [("docs/add-a-method.md", "test_methods.py"), ("docs/add-a-benchmark.md", "test_benchmarks.py")])
def test_the_worked_example_is_the_one_that_is_tested(page, file):
    body = ast.parse((REPO / "tests" / file).read_text(encoding="utf-8")).body
    text = next(ast.literal_eval(node.value) for node in body
                if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "TOY")
    assert f"```python\n{textwrap.dedent(text).strip()}\n```" in read(page)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A storage root in which the golden LIBERO-like set is a link, named as the pages name theirs; the folder above is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLAKEEP_ROOT", str(tmp_path / "root"))
    storage = Storage.from_config(load_config())
    (storage.data / "libero_object_no_noops").symlink_to(REPO / "tests" / "golden" / "rlds" / "tfds" / "libero_goal_no_noops")
    return storage


def test_the_probes_of_the_page_about_data_are_written_by_its_code(elsewhere, capsys):
    first, second = re.findall(r"^```python\n(.*?)^```$", read("docs/bring-your-own-data.md").split("## The probe")[1], re.M | re.S)
    exec(first.replace("500", "40"), {})
    probe = ProbeSet(elsewhere.probe_folder("keep"))
    assert len(probe) == 40 and len(set(probe.kinds(range(40)))) > 1 and probe.samples([0])[0].image.shape == (224, 224, 3)
    Path("my_probe").mkdir()
    Image.new("RGB", (320, 240), "red").save("my_probe/cup_01.png")
    Path("my_probe/list.csv").write_text("cup_01.png,cup,pick up the cup\ncup_01.png,color,what color is the cup?\n")
    exec(second, {})
    probe = ProbeSet(elsewhere.probe_folder("keep"))
    assert [sample.question for sample in probe.samples([0, 1])] == [False, True] and probe.kinds([0, 1]) == ["cup", "color"]
    assert "2 items: " + probe.sha256 in capsys.readouterr().out


def test_what_may_lie_outside_of_the_root_is_read_there(elsewhere, tmp_path):
    link = elsewhere.data / "libero_object_no_noops"
    for name in (link.name, str(link.resolve())):
        with closing_all(open_datasets(elsewhere.data, [name], cache_dir=elsewhere.cache)) as found:
            assert found[0].name == "libero_goal_no_noops" and len(found[0])
    model = PACKAGE / "assets" / "tabletop-base"
    (elsewhere.cache / "openvla").mkdir()
    (elsewhere.cache / "openvla" / "openvla-7b").symlink_to(model)
    assert find_checkpoint("openvla/openvla-7b", elsewhere.cache).samefile(model) and find_checkpoint(str(model), elsewhere.cache) == model
    assert elsewhere.probe_folder(str(tmp_path / "mine")) == tmp_path / "mine"
    (tmp_path / "link").symlink_to(elsewhere.root)
    assert Storage(tmp_path / "link").guard_write(tmp_path / "link" / "runs" / "a")


def test_the_arms_at_7b_differ_in_the_method_alone():
    """Plain LoRA and every form of the method: the same model, adapters, data, steps and probe; the authors' form at both sites."""
    arms = {name: load_config(f"openvla_libero{name}") for name in ("_baseline", "_residual", "", "_graded", "_distillation")}
    for key in ("backbone", "lora", "data", "probe", "train", "evaluate", "seed"):
        assert [name for name, one in arms.items() if getattr(one, key) != getattr(arms[""], key)] == [], key
    assert (arms["_baseline"].method, arms["_residual"].hsw.site, arms[""].hsw.site) == ("baseline", "residual", "lora_input")
    assert arms["_residual"].icsm == arms[""].icsm and arms["_residual"].thermostat == arms[""].thermostat
    assert arms["_residual"].thermostat.batch_size == 64


def test_distillation_at_7b_differs_from_graded_in_the_method_alone():
    """docs/your-model.md trains both on one artefact."""
    one, two = (load_config(f"openvla_libero_{name}") for name in ("graded", "distillation"))
    same = ("backbone", "lora", "data", "probe", "train", "icsm", "thermostat", "seed")
    assert [key for key in same if getattr(one, key) != getattr(two, key)] == []
    assert graded_offline.deciding(one) == graded_offline.deciding(two) and method_class(two.method).problems(two) == []
    assert (two.options.get("moves"), two.gains.enabled, two.method) == (None, False, "distillation")
