"""What a message tells to run is run, or parsed by the real command line, in a root with spaces and Chinese characters."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from commands import wrong_options
from test_layout import SOURCES

from vlakeep import cli, preflight
from vlakeep.core.config import Config
from vlakeep.core.next_step import completed, completed_remedy
from vlakeep.core.options import read
from vlakeep.core.rundir import RunDir
from vlakeep.core.storage import Storage

ROOT = "it's a root 机器人"
SHELL = re.compile(r"(?:rm -r|mkdir -p|git rm --cached|git -C|chmod [\w+-]+|\bmv|\bcp) $")
# Names that hold what quoted() or shlex has made, in the function that uses them.
QUOTED = {"preflight.check_storage:target", "arms._load_run:config", "arms._load_eval:config", "provenance.reproduce:config",
          "base_models._refuse_without_owner:move",
          # Names of stages and of suites, which hold nothing that a shell minds.
          "options._unread:name", "options._unread:stage.name", "options._unread:readers[far][0]", "evaluation.demonstrations:suite"}


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / ROOT
    (folder / "my configs").mkdir(parents=True)
    (folder / "my configs" / "一.yaml").write_text("method: icsm_hsw_thermostat\nlora:\n  rank: 4\n", encoding="utf-8")
    return folder


@pytest.fixture
def said(root, monkeypatch, capsys):
    """said(*argv): (what the command line prints about its error, or preflight about its remedies; the commands in it)."""
    monkeypatch.setattr("vlakeep.core.storage.prepare_environment", lambda *args, **kwargs: None)
    monkeypatch.setattr(cli, "end_on_signals", lambda: None)
    # The tree of the sources is none of this test's business, and takes its time to scan.
    monkeypatch.setattr(preflight, "code_trees", lambda more=None: [])

    def run(*argv):
        line = [*map(str, argv), "--root", str(root), "--config", str(root / "my configs" / "一.yaml")]
        monkeypatch.setattr(sys, "argv", ["vlakeep", *line])
        capsys.readouterr()
        assert cli.main() in (1, 2)
        done = capsys.readouterr()
        text = done.err if argv[0] != "preflight" else "\n".join(x for x in done.out.splitlines() if x.startswith(("FAIL", "note")))
        found = re.findall(r"`([^`]+)`", text) + re.findall(r": (vlakeep [a-z-]+ .*)$", text, re.M)
        return text, [shlex.split(command) for command in found if command.startswith(("vlakeep ", "rm ", "mv ", "mkdir ", "git "))]

    return run


def parses_in(root, words):
    """A command of vlakeep is parsed by its stage, and works in the same root."""
    assert words[0] == "vlakeep"
    _, config = read(cli.STAGES[words[1]], words[2:])
    assert config.root == str(root)
    return config


@pytest.mark.parametrize("argv, stages", [
    (["train"], ["tabletop-data"]),
    (["train", "--data.datasets", "[mine]"], ["tabletop-data"]),
    (["train", "--data.datasets", "[mine]", "--backbone.checkpoint", "some one/it's"], ["fetch", "tabletop-data"]),
    (["train", "--backbone.checkpoint", "someone/vla"], ["fetch", "tabletop-data"]),
    (["evaluate", "--evaluate.target", "base", "--backbone.checkpoint", "some one/it's"], ["fetch"]),
    (["offline", "--backbone.checkpoint", "someone/vla"], ["fetch"]),
    (["evaluate", "--evaluate.target", "my run"], ["train"]),
    (["offline"], ["tabletop-data"]),
    (["export", "--name", "机器人"], ["train"]),
    (["train", "--trian.lr", "3"], None),
    (["preflight"], ["tabletop-data", "offline"]),
    (["preflight", "--stage", "evaluate", "--evaluate.target", "my run"], ["train"]),
])
def test_every_command_of_an_error_is_one_of_the_same_root(said, root, argv, stages):
    text, commands = said(*argv)
    ours = [words for words in commands if words[0] == "vlakeep" and "--help" not in words]
    for words in ours:
        config = parses_in(root, words)
        if cli.STAGES[words[1]].file:
            assert config.lora.rank == 4 and config.method == "icsm_hsw_thermostat"  # the file was read
    if stages is None:
        assert ours == [] or "`vlakeep train --help`" in text
    else:
        assert set(stages) <= {words[1] for words in ours}, text


def test_train_names_all_that_is_missing_at_once(said, root):
    text, _ = said("train", "--backbone.checkpoint", "someone/vla", "--data.datasets", "[mine]")
    for words in ("no base model 'someone/vla'", f"no data set at {root}/datasets/mine", f"{root}/probe/tabletop"):
        assert words in text
    text, commands = said("train", "--data.datasets", "[mine]", "--probe.name", "mine")
    assert "no base model" not in text and "no data set at" in text and f"{root}/probe/mine" in text


def test_what_the_command_line_gave_is_handed_on_and_nothing_that_the_stage_does_not_take(root):
    file = str(root / "my configs" / "一.yaml")
    argv = ["train", "--config", file, "--root", str(root), "--train.lr", "0.1", "--probe.name", "my probe", "--icsm.rank", "7", "--seed=3"]
    whole = completed("made for another probe: rebuild it with `vlakeep offline`, see `vlakeep train --help`", argv)
    command = whole.split("`")[1]
    assert "`vlakeep train --help`" in whole
    config = parses_in(root, shlex.split(command))
    assert (config.probe.name, config.icsm.rank, config.seed) == ("my probe", 7, 3) and "train.lr" not in command
    # What the message says itself counts.
    said = completed("`vlakeep offline --icsm.rank 5`", argv).strip("`")
    assert parses_in(root, shlex.split(said)).icsm.rank == 5 and said.count("icsm.rank") == 1
    assert shlex.split(completed("`vlakeep train --config ... --name x`", argv).strip("`"))[2:6] == ["--name", "x", "--config", file]
    assert completed("`vlakeep train --config ... --name x`", ["train"]) == "`vlakeep train --config ... --name x`"
    for text in ("`vlakeep none`", "`vlakeep offline 'open`", "vlakeep offline", "nothing"):
        assert completed(text, argv) == text
    assert completed("`vlakeep offline`", ["train", "--no.such", "1"]) == completed("`vlakeep offline`", []) == "`vlakeep offline`"
    assert completed_remedy("vlakeep offline", argv) == command
    assert completed_remedy("--name OTHER, or another", argv) == "--name OTHER, or another"


def test_the_advice_to_delete_a_run_deletes_that_run_and_nothing_else(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "precious").write_text("must survive")
    root = tmp_path / "r s 机器人"
    folder = root / "runs" / "my run"
    (folder / "checkpoints" / "step_000001").mkdir(parents=True)
    (folder / "config.yaml").write_text("method: baseline\n")
    with pytest.raises(ValueError) as error:
        RunDir(folder, True).look(Config(name="my run", root=str(root)))
    command = str(error.value)[str(error.value).index("rm -r"):]
    subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path)
    assert not folder.exists() and folder.parent.is_dir() and (tmp_path / "r" / "precious").is_file()


def test_the_advice_to_make_a_folder_writable_does_it(tmp_path, monkeypatch):
    root = tmp_path / ROOT
    Storage(root).create()
    root.chmod(0o500)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != root)  # whoever runs the tests may be allowed everything
    with pytest.raises(PermissionError) as error:
        Storage(root).create()
    text = str(error.value)
    subprocess.run(["bash", "-c", text[text.index("chmod"):text.index("), or")]], check=True)
    assert root.stat().st_mode & 0o700 == 0o700
    shutil.rmtree(root)


# ---- all sources ----


@lru_cache(maxsize=None)
def texts():
    """(file.function, line, parts) of every string in the sources but docstrings; a part is a text, or the expression that is put in."""
    found = []

    def walk(node, where):
        if isinstance(node, ast.FunctionDef):
            where = f"{where.partition('.')[0]}.{node.name}"
        if isinstance(node, ast.JoinedStr):
            found.append((where, node.lineno, [part.value for part in node.values]))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append((where, node.lineno, [node.value]))
        inside = [value.value for value in node.values if isinstance(value, ast.FormattedValue)] if isinstance(node, ast.JoinedStr) else [
            child for child in ast.iter_child_nodes(node) if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant))]
        for child in inside:
            walk(child, where)

    for path in SOURCES:
        walk(ast.parse(path.read_text(encoding="utf-8")), f"{path.stem}.")
    return found


def harmless(where, value):
    """Whether a shell reads what is put in as one word."""
    if isinstance(value, ast.Call) and getattr(value.func, "id", getattr(value.func, "attr", "")) in ("quoted", "join", "max"):
        return True
    return f"{where}:{ast.unparse(value)}" in QUOTED


def test_no_source_puts_a_bare_value_into_a_command():
    wrong, seen = [], 0
    for where, line, parts in texts():
        before = ""
        for part in parts:
            if isinstance(part, str):
                before += part
                continue
            open_command = re.search(r"`[^`]*$", before) if before.count("`") % 2 else None
            inside = open_command is not None and re.match(r"`(vlakeep|rm|mv|cp|chmod|git|mkdir|pip) ", open_command[0])
            if inside or SHELL.search(before):
                seen += 1
                if not harmless(where, part):
                    wrong.append(f"{where}:{line}: {ast.unparse(part)}")
            before += "\0"
    assert sorted(set(wrong)) == [] and seen > 20


def test_every_command_in_the_sources_is_one_that_its_stage_takes():
    wrong, seen = [], 0
    for where, line, parts in texts():
        text = "".join(part if isinstance(part, str) else "X" for part in parts)
        for command in re.findall(r"`(vlakeep [^`]*)`", text):
            name = command.split()[1]
            if name in ("<stage>", "--help") or not re.fullmatch("[a-z-]+", name):
                continue
            seen += 1
            found = wrong_options(command) if name in cli.STAGES else [command]
            wrong += [f"{where}:{line}: {one}" for one in found]
    assert sorted(set(wrong)) == [] and seen > 40
