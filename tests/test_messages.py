"""Commands that are printed are copied: with a space and a quote in the root they must still mean the right place."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_config

from vlakeep import preflight
from vlakeep.benchmarks.records import Records, wilson
from vlakeep.checks import check_artifact
from vlakeep.core.config import Config
from vlakeep.core.errors import RunDirError
from vlakeep.core.rundir import RunDir
from vlakeep.core.storage import Storage, find_checkpoint
from vlakeep.core.target import target_checkpoint
from vlakeep.reporting.arms import load_arms
from vlakeep.reporting.compare import Comparison
from vlakeep.reporting.provenance import reproduce

REPOSITORY = Path(__file__).parent.parent
NAME = "it's a root"


@pytest.fixture
def root(tmp_path):
    (tmp_path / NAME).mkdir()
    return tmp_path / NAME


def words(text, command):
    """What a shell makes of the command that begins with these words, up to a closing ` or three spaces."""
    begin = str(text).index(command)
    end = re.search(r"`|   |\n|$", str(text)[begin:])
    return shlex.split(str(text)[begin:begin + end.start()])


def started(root):
    """A run folder with results."""
    folder = root / "runs" / "a run"
    (folder / "checkpoints" / "step_000001").mkdir(parents=True)
    (folder / "config.yaml").write_text("method: baseline\n")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def test_a_run_that_is_there_already(root):
    folder = started(root)
    config = Config(name="a run", root=str(root))
    with pytest.raises(RunDirError) as error:
        RunDir(folder, True).look(config)
    assert words(error.value, "rm -r") == ["rm", "-r", str(folder)]
    config.train.resume = True
    (folder / "config.yaml").unlink()
    (folder / "metrics.jsonl").unlink()
    save_config(config, folder / "config.yaml")
    with pytest.raises(RunDirError, match="none of its checkpoints") as error:
        RunDir.open(Storage(root), config)
    assert words(error.value, "rm -r") == ["rm", "-r", str(folder)]


def test_records_of_something_else_or_damaged(root):
    path = root / "eval" / "base" / "records.jsonl"
    with Records(path, {"weights": "a"}) as records:
        records.add(kind="skill", ability="reach", trial=0, seed=0, success=True, value=None, crash=None, steps=1)
    with pytest.raises(ValueError) as error:
        Records(path, {"weights": "b"})
    assert words(error.value, "rm -r") == ["rm", "-r", str(path.parent)]
    path.write_text(path.read_text() + "x\n")
    with pytest.raises(ValueError) as error:
        Records(path, {"weights": "a"})
    assert words(error.value, "rm -r") == ["rm", "-r", str(path.parent)]


def test_the_storage_root(root, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args, **kwargs: False)
    with pytest.raises(PermissionError) as error:
        Storage(root).create()
    message = str(error.value)
    assert shlex.split(message[message.index("chmod"):message.index("), or")]) == ["chmod", "u+rwx", str(root)]
    lines = [line for line in preflight.check_folders(Storage(root)) if line.status == "FAIL"]
    assert lines and all(words(line.remedy.replace(", or", "   "), "chmod") == ["chmod", "u+rwx", str(root)] for line in lines[:1])
    with pytest.raises(ValueError) as error:
        Storage(root, {"run_root_dir": "/elsewhere"})
    message = str(error.value)
    assert shlex.split(message[message.index("(--run_root_dir") + 1:message.index(") or a root")]) == ["--run_root_dir", str(root / "runs")]


def test_a_large_file_in_a_source_tree(root, tmp_path, monkeypatch):
    tree = tmp_path / "my tree"
    tree.mkdir()
    (tree / "it's big.bin").write_bytes(b"x" * 2000)
    monkeypatch.setattr(preflight, "code_trees", lambda more=None: [tree])
    lines, _ = preflight.check_storage(lambda: Storage(root), 1e-6)
    line, = [line for line in lines if line.what == "large file in source tree"]
    assert words(line.remedy, "mv") == ["mv", str(tree / "it's big.bin"), f"{root}/"]
    assert words(line.remedy.rstrip(")"), "git rm") == ["git", "rm", "--cached", str(tree / "it's big.bin")]


def test_remedies_of_preflight(root):
    config = Config(root=str(root), method="icsm_hsw_thermostat")
    line, = check_artifact(config, Storage(root), {}, None, str(root / "my config.yaml"))
    assert words(line.remedy, "vlakeep offline") == ["vlakeep", "offline", "--config", str(root / "my config.yaml")]
    with pytest.raises(FileNotFoundError) as error:
        find_checkpoint("some one/it's", root)
    assert words(error.value, "vlakeep fetch") == ["vlakeep", "fetch", "some one/it's"]
    with pytest.raises(FileNotFoundError) as error:
        target_checkpoint("it's mine", Storage(root))
    assert words(error.value, "vlakeep train")[-2:] == ["--name", "it's mine"]


def test_what_a_report_lacks_and_how_it_is_made_again(root):
    folder = started(root)
    with pytest.raises(FileNotFoundError) as error:
        load_arms({"baseline": {"run": folder, "eval": root / "eval" / "a run"}})
    found = words(error.value, "vlakeep evaluate")
    assert found == ["vlakeep", "evaluate", "--config", str(folder / "config.yaml"), "--evaluate.target", "a run"]
    with pytest.raises(FileNotFoundError) as error:
        load_arms({"baseline": {"run": root / "runs" / "it's", "eval": root / "eval" / "base"}})
    assert words(error.value, "vlakeep train")[-2:] == ["--name", "it's"]
    (root / "eval" / "a run").mkdir(parents=True)
    (root / "eval" / "a run" / "summary.json").write_text(json.dumps({"target": "a run", "abilities": {}, "new_skill": None}))
    (root / "eval" / "a run" / "records.jsonl").write_text('{"header": {}}\n')
    (folder / "config.yaml").write_text("method: icsm_hsw_thermostat\n")
    comparison = Comparison(load_arms({"it's": {"run": folder, "eval": root / "eval" / "a run"}}), wilson)
    script = "\n".join(reproduce(comparison, root))
    echo = "vlakeep() { printf '%s\\n' \"$@\"; echo --; }\n"
    shown = subprocess.run(["bash", "-c", echo + script], capture_output=True, text=True, check=True)
    commands = [part.split("\n")[:-1] for part in shown.stdout.split("--\n")][:-1]
    config = str(folder / "config.yaml")
    assert commands == [["offline", "--config", config], ["train", "--config", config, "--name", "a run_again"],
                        ["evaluate", "--config", config, "--evaluate.target", "a run_again"],
                        ["report", "--config", config, "--runs", "it's=a run_again"]]


def test_the_scripts_print_the_command_that_they_run(root):
    (root / "python3").write_text(f"#!{sys.executable}\nimport sys, json\nprint(json.dumps(sys.argv[1:]))\n")
    (root / "python3").chmod(0o755)
    environ = dict(os.environ, PATH=f"{root}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run(["bash", "scripts/run_baseline_lora.sh", "--root", str(root), "--data.datasets", "[one, two]"], cwd=REPOSITORY,
                          env=environ, capture_output=True, text=True, check=True)
    line = next(line for line in done.stderr.splitlines() if line.startswith("+ "))
    ran = json.loads(done.stdout)
    assert shlex.split(line[2:]) == ["python3", *ran] and ran[-4:] == ["--root", str(root), "--data.datasets", "[one, two]"]


def test_no_printed_command_holds_a_bare_path():
    """A safety net for what is added: in the sources a shell command is never followed by an unquoted value."""
    command = r"(?:\brm -r|\bmv|\bcp|\bchmod [\w+-]+|git rm --cached|--config|vlakeep fetch|--name|--evaluate\.target)"
    bare = re.compile(command + r" \{(?!quoted\()[\w.]*(?:path|folder|root|parent|name)")
    wrong = []
    for path in sorted((REPOSITORY / "vlakeep").rglob("*.py")):
        wrong += [f"{path.name}:{number}" for number, line in enumerate(path.read_text().splitlines(), 1) if bare.search(line)]
    assert wrong == []
