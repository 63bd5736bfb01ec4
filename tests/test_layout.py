"""The rules of the code tree as tests: depth, file length, one-way imports, every YAML loads, every documented command exists."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from commands import wrong_options

from vlakeep import cli
from vlakeep.core.config import load_config

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "vlakeep"
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "assets" not in p.parts)
# Rooms in order: each imports only from rooms that stand before it, and from itself. Those of one line do not know of each other.
LAYERS = [["core"], ["data"], ["probe"], ["models"], ["openvla", "pi0_fast"], ["teacher"], ["hsw"], ["thermostat"], ["protection"],
          ["methods"], ["benchmarks"], ["planning"], ["language"], ["tabletop", "libero"], ["parity"], ["reporting"], ["studies"]]
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
# Stages stand above all rooms and do not import one another, but for the dispatcher, the demo, which runs them in order, `checks`,
# which is preflight's, `closing_pass`, which is export's, the study, which calls the dispatcher, and `warm`, which it forks cells from.
MAY_IMPORT_STAGES = {"cli": None, "demo": None, "warm": None, "preflight": {"checks"}, "export": {"closing_pass"},
                     "study": {"checks", "cli"}}
# A model by name: its own room, the comparison with its official code, and the stages that make a small one, with their options. All
# others ask models/base.py.
MODELS = ("openvla", "pi0_fast")
MAY_NAME_A_MODEL = {*MODELS, "parity", *(f"{room}/{file}.py" for room in ("tabletop", "libero") for file in ("pretrain", "stages")),
                    "tabletop/pretrain_pi0_fast.py", "libero/train_base.py"}
OPTIONAL = {"timm", "torchvision", "wandb", "tensorboard", "tensorflow", "h5py", "pyarrow", "av", "bitsandbytes", "ray", "submitit"}
DOCUMENTS = sorted([*REPO.glob("*.md"), *(REPO / "docs").glob("*.md")])


def imports(path):
    """(module, line) of every vlakeep module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("vlakeep."):
                parts = name.split(".")
                while not ((REPO / Path(*parts)).with_suffix(".py").is_file() or (REPO / Path(*parts)).is_dir()):
                    parts.pop()
                if parts != ["vlakeep"]:
                    yield ".".join(parts), node.lineno


def test_two_folder_levels_and_flat_tests():
    assert len(SOURCES) > 20
    assert [str(p) for p in SOURCES if len(p.relative_to(PACKAGE).parts) > 2] == []
    assert [str(p) for p in (REPO / "tests").rglob("*.py") if p.parent != REPO / "tests"] == []
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name not in ("assets", "configs", "__pycache__")}
    assert rooms == set(LAYER), f"rooms without a layer, or layers without a room: {rooms ^ set(LAYER)}"


def test_files_are_of_readable_length():
    long = {str(p.relative_to(REPO)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 450}
    assert long == {}


def test_sub_packages_have_an_empty_init():
    for folder in PACKAGE.iterdir():
        if folder.name in LAYER:
            assert (folder / "__init__.py").read_text() == "", folder


def room_of(parts):
    """Room of a module, given as the parts of its name without `vlakeep`; None for a stage."""
    return parts[0] if parts[0] in LAYER else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    me = path.relative_to(PACKAGE).with_suffix("").parts
    mine, wrong = room_of(me), []
    for name, line in imports(path):
        there = name.split(".")[1]
        if mine is not None:
            ok = there in LAYER and (there == mine or LAYER[there] < LAYER[mine])
        else:
            allowed = MAY_IMPORT_STAGES.get(me[0], set())
            ok = there in LAYER or allowed is None or there in allowed
        if not ok and me != ("__init__",):
            wrong.append(f"{path.relative_to(REPO)}:{line} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_models_are_asked_through_their_protocol(path):
    own = path.relative_to(PACKAGE)
    if not {str(own), own.parts[0]} & MAY_NAME_A_MODEL:
        assert [f"{own}:{line} imports {name}" for name, line in imports(path) if name.split(".")[1] in MODELS] == []


def test_no_module_imports_itself_by_a_detour():
    """Within a room too; imports inside functions count."""
    graph = {".".join(("vlakeep", *p.relative_to(PACKAGE).with_suffix("").parts)): {name for name, _ in imports(p)} for p in SOURCES}

    def reaches(start):
        seen, todo = set(), list(graph[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph.get(name, ())
        return seen

    assert sorted(name for name in graph if name in reaches(name)) == []


def test_optional_and_heavy_imports_stay_inside_functions():
    """timm goes through compat (torchvision may be unusable); wandb, tensorboard, matplotlib and the extras load when used."""
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            tops = {(name or "").split(".")[0] for name in names}
            assert not tops & OPTIONAL, f"{path}: {tops}"


def test_no_pickle():
    for path in SOURCES:
        text = path.read_text()
        assert "import pickle" not in text and "weights_only=False" not in text and "_object_list" not in text, path
        for call in re.finditer(r"torch\.load\(", text):
            assert "weights_only=True" in text[call.start() : call.start() + 200], f"{path}: torch.load without weights_only=True"


CONFIGS = sorted((PACKAGE / "configs").rglob("*.yaml"))


def test_configs_are_found():
    assert len(CONFIGS) >= 2
    assert {"baseline_lora", "method_icsm_hsw_thermostat"} <= {p.stem for p in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_loads_and_is_headed_by_its_launch_line(path):
    load_config(str(path))
    head = path.read_text().split("\n\n")[0]
    assert head.startswith("#") and f"--config configs/{path.relative_to(PACKAGE / 'configs')}" in path.read_text()


def commands():
    """(document, command line) of every shell line in the code blocks of the documents."""
    for document in DOCUMENTS:
        # All fences are matched, or the end of a Python block would open a shell block.
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(encoding="utf-8"), flags=re.M | re.S):
            if language not in ("", "bash", "sh", "shell", "console"):
                continue
            joined = re.sub(r"\\\n\s*", " ", block)
            for line in joined.splitlines():
                yield document.name, line.strip().removeprefix("$ ").split("  #")[0].strip()


def test_readme_exists():
    assert (REPO / "README.md").is_file()


def test_documented_commands_exist():
    targets = set(re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(), flags=re.M))
    wrong, seen = [], 0
    for document, line in commands():
        words = [w for w in line.split() if not re.fullmatch(r"[A-Z_]+=\S*", w)]
        if not words:
            continue
        where = f"{document}: {line}"
        if words[0] == "make":
            seen += 1
            wrong += [where for word in words[1:] if not word.startswith("-") and "=" not in word and word not in targets]
        elif words[0] == "vlakeep" and len(words) > 1:
            seen += 1
            if words[1] not in cli.STAGES and words[1] not in ("<stage>", "--help", "--version"):
                wrong.append(where)
            wrong += [f"{where} ({command})" for command in wrong_options(line)]
        for word in words:
            file = re.fullmatch(r"(bash )?(\./)?(configs|scripts)/[\w./-]+\.(yaml|sh)", word)
            if file and not ((PACKAGE if file[3] == "configs" else REPO) / word).is_file():
                wrong.append(f"{where} ({word} is missing)")
    assert wrong == []
    if DOCUMENTS:
        assert seen >= 2, "no command was found in the documents: the pattern of this test is broken"


def test_dependencies_have_lower_bounds_only_and_constraints_pin():
    text = (REPO / "pyproject.toml").read_text()
    block = re.search(r"\ndependencies = \[(.*?)\]", text, flags=re.S)[1]
    wanted = re.findall(r'"([^"]+)"', block)
    extras = re.search(r"\n\[project.optional-dependencies\](.*?)\n\[", text, flags=re.S)[1]
    optional = re.findall(r'"([^"]+)"', extras)
    assert len(wanted) >= 15 and all(re.fullmatch(r"[A-Za-z0-9-]+>=[\d.]+", line) for line in wanted + optional), text
    pins = [line for line in (REPO / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line for line in pins)
    from vlakeep.preflight import LOWER_BOUNDS

    for name, bound in LOWER_BOUNDS.items():
        assert f"{name}>={bound}" in wanted, f"{name}: pyproject.toml and preflight.py disagree"


def test_what_lies_at_the_root_belongs_there():
    """What a tool drops into a checkout (a wheel, a file called like an option) is not committed with the rest by oversight."""
    if not (REPO / ".git").exists():
        pytest.skip("no checkout")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True).stdout.split("\0")
    roots = {file.split("/")[0] for file in files if file}
    assert roots == set("""
        .ci .gitignore .pre-commit-config.yaml CHANGELOG.md CONTRIBUTING.md LICENSE MANIFEST.in Makefile README.md
        README.zh-CN.md constraints-docs.txt constraints-openvla.txt constraints.txt docs examples mkdocs.yml
        pyproject.toml scripts setup.py speed studies tests vlakeep""".split())
    assert {file for file in files if file and (REPO / file).stat().st_size > 2 ** 21} == {
        f"vlakeep/assets/tabletop-{base}/model.safetensors" for base in ("base", "pi0")}
