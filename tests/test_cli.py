"""The command line as a user meets it: help, typing mistakes, one-line errors, exit statuses, signals."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest import mock

import pytest
from stage_reads import Calls

from vlakeep import cli
from vlakeep.core.config import ConfigError, load_config
from vlakeep.core.hardware import DECIDED
from vlakeep.core.options import help_text, leaves, read, split
from vlakeep.core.storage import KEYS

REPO = Path(__file__).parents[1]


def vlakeep(*argv, **environ):
    return subprocess.run(
        [sys.executable, "-m", "vlakeep.cli", *argv],
        capture_output=True,
        text=True,
        cwd=REPO,
        timeout=60,
        env=dict(os.environ, **environ),
    )


def here(capsys, *argv, **environ):
    """(exit status, stdout, stderr) as of vlakeep(), in this process, which has torch already."""
    with mock.patch.dict(os.environ, environ), mock.patch.object(sys, "argv", ["vlakeep", *argv]), mock.patch.object(signal, "signal"):
        status = cli.main()
    return status, *capsys.readouterr()


def test_help_lists_every_stage_and_imports_nothing_heavy():
    code = "import sys; from vlakeep import cli; cli.run(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, "--help imported torch"
    for name in (
        "plan",
        "preflight",
        "storage-check",
        "tabletop-data",
        "offline",
        "train",
        "evaluate",
        "report",
        "demo",
        "audit-probe",
        "verify-golden",
        "pretrain-tabletop",
    ):
        assert f"\n  {name} " in done.stdout


def test_stage_help_shows_default_choices_and_a_line_of_explanation():
    text = help_text(cli.STAGES["train"])
    assert "reads:" in text and "writes:" in text
    assert "  --thermostat.batch_size 64\n      At least 2. Probe items" in text
    assert "  --lora.alpha 16\n      At least 1. Scale of the update is alpha / rank." in text
    assert "  --train.resume false\n" in text and "  --train.optimizer adamw\n      One of adamw, adamw8bit, paged_adamw8bit, sgd. " in text
    text = help_text(cli.STAGES["libero-demos"])
    assert "  --suite libero_object\n      One of libero_spatial, libero_object, libero_goal, libero_10, libero_90. " in text
    for stage in cli.STAGES.values():
        shown = entries(help_text(stage))
        assert set(shown) == {*stage.names(), *(option.dest for option in stage.own)} - {"help"}, stage.name
        assert [name for name, note in shown.items() if not note] == [], f"{stage.name}: no explanation"


def entries(text):
    """Option -> what is said of it, of the lists below the docstring."""
    lists = re.split(r"^(?:options of this stage|configuration keys that it reads.*):$", text, flags=re.M)[1:]
    return dict(re.findall(r"^  (?:--)?(\w[\w.-]*).*\n(?:      (.*)\n)?", "\n".join([*lists, ""]), flags=re.M))


@pytest.fixture(scope="module")
def calls():
    return Calls()


# Options of methods have no names in the configuration; the demo sets its own for these; a new model is made with a section of its own.
UNSEEN, SET = {"options"}, {"name", "evaluate.target", "train.keep_last", "train.save_every"}


@pytest.mark.parametrize("name", [name for name, stage in cli.STAGES.items() if stage.keys])
def test_a_stage_declares_what_it_reads_and_nothing_else(calls, name):
    stage = cli.STAGES[name]
    declared, found = set(stage.reads()), calls.keys(stage)
    assert {"root", *KEYS} <= declared
    if name in ("preflight", "plan"):
        expected = {key for one in ("offline", "train", "evaluate", *["export"] * (name == "plan")) for key in cli.STAGES[one].reads()}
        assert declared == expected and found <= declared
        return
    if name == "study":  # what else it reads is of its cells, whose keys stand in the study's file
        assert declared == {"root", *KEYS, *DECIDED}
        return
    made = {key for key in leaves() if key.startswith("backbone.")}
    makers = ("pretrain-libero", "train-base", "own-texts", "base-delta", "pretrain-tabletop", "pretrain-tabletop-pi0", "verify-golden",
              "verify-pi0-fast")
    found |= {"offline": {"gains.enabled"}}.get(name, set())  # a method's own check reads it, distillation's of its moves
    found -= {"demo": SET, "verify-openvla": {*made, "device"}, **dict.fromkeys(makers, made)}.get(name, set())  # a device of its own
    assert declared - UNSEEN - set(KEYS) == found - UNSEEN


def test_a_key_that_is_read_and_not_declared_is_found(calls):
    found = calls.keys(cli.STAGES["libero-check"]._replace(module="vlakeep.libero.vqa"))
    assert found == {"root", "seed", "probe.name"}
    assert "thermostat.ema" in calls.keys(cli.STAGES["train"]) - calls.keys(cli.STAGES["evaluate"])


def test_help_of_a_stage_is_quick():
    code = "import sys; from vlakeep import cli; [cli.run([name, '--help']) for name in cli.STAGES]; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, "--help of a stage imported torch"
    assert all(f"vlakeep {name}" in done.stdout for name in cli.STAGES)


@pytest.mark.parametrize("argv, words", [
    ("evaluate --train.lr 3", r"--train.lr in the command line: `vlakeep evaluate` does not read it \(`vlakeep train`, .* would\)"),
    ("train --suite libero_10", r"`vlakeep train` does not read it \(`vlakeep libero-\w+`, `vlakeep libero-\w+` would\)"),
    ("evaluate --evaluate.btach 3", "unknown key `evaluate.btach` in the command line; did you mean `evaluate.batch`\\?$"),
    ("storage-check --trian.lr 3", "did you mean `train.lr`. Of `vlakeep train`, not of this stage"),
    ("libero-demos --demo 3", "did you mean `demos`"),
    ("evaluate --options.strength 3", "--options.strength in the command line: `vlakeep evaluate` does not read it"),
    ("train --zzz 3", "unknown key `zzz` in the command line; `vlakeep train --help` lists what it reads"),
    ("train --train 3", "`train` in the command line is a section"),
    ("train --train.lr", "--train.lr on the command line has no value; it takes a number: --train.lr 0.0005"),
    ("train word", "`word` on the command line belongs to no key"),
    ("train --config", "--config needs a file"),
    ("fetch a/b --config x.yaml", "--config in the command line: `vlakeep fetch` does not read it"),
    ("assemble-openvla", "vlakeep assemble-openvla needs --out"),
    ("verify-golden", "vlakeep verify-golden needs folders"),
    ("verify-openvla --device cpu", "vlakeep verify-openvla needs --openvla_dir"),
    ("libero-demos --demos 0", "--demos '0': must be a whole number above 0"),
    ("libero-demos --workers", "--workers '': must be a whole number above 0"),
    ("libero-demos --suite libero_100", "--suite 'libero_100': must be one of libero_spatial, "),
    ("report --seconds much", "--seconds 'much': must be a number, 0 or above"),
    ("preflight --gpus 0", "--gpus '0': must be a whole number above 0"),
    ("preflight --large_file_gb 0", "--large_file_gb '0': must be a number above 0"),
    ("pretrain-tabletop --out x --patch 9", "--patch '9': must be 8 or 16"),
])
def test_what_a_stage_does_not_take_is_refused(argv, words):
    name, *rest = argv.split()
    with pytest.raises(ConfigError, match=words):
        read(cli.STAGES[name], rest)


def test_a_file_may_hold_keys_of_other_stages(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {lr: 0.25}\nprobe: {size: 9}\n")
    argv = ["--probe.name=x", "--config", str(tmp_path / "c.yaml"), "--probe.size", "7", "--probe.size=8", "--root", "-1"]
    _, config = read(cli.STAGES["audit-probe"], argv)
    assert config == load_config(str(tmp_path / "c.yaml"), ["--probe.name", "x", "--probe.size", "8", "--root", "-1"])


def test_own_options_are_read_beside_the_configuration():
    args, file, pairs = split(cli.STAGES["libero-demos"], ["--tasks", "0, 4", "--root=a b", "--noise=.5", "--first", "0"])
    assert (args.tasks, args.noise, args.first, args.demos, file, pairs) == (["0", "4"], 0.5, 0, 20, None, ["--root=a b"])
    args, _, _ = split(cli.STAGES["verify-golden"], ["a", "b", "--tokenizer", "t"])
    assert (args.folders, args.tokenizer) == ([Path("a"), Path("b")], Path("t"))
    args, config = read(cli.STAGES["fetch"], ["--root", "r", "a/b"])
    assert (args.model, config.root) == ("a/b", "r")
    args, _, _ = split(cli.STAGES["pretrain-tabletop"], ["--out", "o", "--seed", "3", "--compile"])
    assert (args.out, args.seed, args.compile, args.device) == (Path("o"), 3, True, "cuda")
    args, _, pairs = split(cli.STAGES["train"], ["--options.strength", "1", "--options.kind=x"])
    assert pairs == ["--options.strength=1", "--options.kind=x"]


def test_unknown_stage_is_met_with_a_suggestion():
    done = vlakeep("trian")
    assert done.returncode == 2 and "did you mean `train`?" in done.stderr


def test_mistakes_print_one_message_and_exit_2(tmp_path, capsys):
    done = vlakeep("storage-check", "--train.lr", "-1", VLAKEEP_ROOT=str(tmp_path))
    found = [(done.returncode, done.stdout, done.stderr, "--train.lr in the command line: `vlakeep storage-check` does not read it")]
    for argv, words in ((["--trian.lr", "1"], "did you mean `train.lr`?"), (["--config", "no.yaml"], "no configuration file at no.yaml")):
        found.append((*here(capsys, "storage-check", *argv, VLAKEEP_ROOT=str(tmp_path)), words))
    for status, _, error, words in found:
        assert status == 2 and error.startswith("error: ") and words in error and "Traceback" not in error


def test_a_finding_of_a_check_exits_1(tmp_path, capsys):
    status, shown, _ = here(capsys, "storage-check", "--root", str(REPO / "x"), VLAKEEP_ROOT=str(tmp_path))
    assert status == 1 and "source tree" in " ".join(shown.replace("│", " ").split())


def test_traceback_on_request(tmp_path, capsys):
    """The error reaches Python, which shows it (test_exit_status has one that does)."""
    with pytest.raises(ConfigError, match="--train.lr"):
        here(capsys, "storage-check", "--train.lr", "-1", VLAKEEP_DEBUG="1", VLAKEEP_ROOT=str(tmp_path))


def stage(tmp_path, body):
    (tmp_path / "a_stage.py").write_text("def main(argv):\n" + textwrap.indent(textwrap.dedent(body), "    "))
    return [
        sys.executable,
        "-c",
        "import sys; from vlakeep import cli; cli.STAGES['x'] = cli.Stage('x', 'a_stage', ''); sys.argv = ['vlakeep', 'x'];"
        "sys.exit(cli.main())",
    ], dict(os.environ, PYTHONPATH=f"{REPO}:{tmp_path}", VLAKEEP_ROOT=str(tmp_path / "root"))


@pytest.mark.parametrize(
    "body, status, words",
    [
        ("raise ValueError('wrong, do this')", 2, "error: wrong, do this\n"),
        ("open('/no/such/file')", 2, "error: [Errno 2] No such file"),
        ("raise PermissionError('not yours')", 2, "error: not yours\n"),
        ("from vlakeep.core.errors import DiskFull; raise DiskFull('full: 1 byte free')", 2, "error: full: 1 byte free\n"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("1 / 0", 1, "Traceback"),
        ("return 1", 1, ""),
        ("return None", 0, ""),
        ("import os; assert os.environ['HF_HOME'].endswith('hf_cache')", 0, ""),
    ],
)
def test_exit_status(tmp_path, body, status, words):
    command, environ = stage(tmp_path, body)
    environ.pop("HF_HOME", None)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert words in done.stderr and ("Traceback" in done.stderr) == (words == "Traceback")


def test_sigterm_runs_the_clean_up(tmp_path):
    command, environ = stage(
        tmp_path,
        """
        import time
        from vlakeep.core.storage import atomic_write
        with atomic_write("file") as file:
            print("ready", flush=True)
            time.sleep(60)
        """,
    )
    child = subprocess.Popen(command, env=environ, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 143
    assert not list(tmp_path.glob("*file*")) and not list(tmp_path.glob(".file*"))


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m vlakeep.cli train --help | head -1", shell=True, capture_output=True, text=True, cwd=REPO
    )
    assert "Error" not in done.stderr


def test_every_stage_exists():
    for name, found in cli.STAGES.items():
        path = REPO / (found.module.replace(".", "/") + ".py")
        assert path.is_file(), f"stage {name}: {path} is missing"
        assert f"def {found.function}(argv" in path.read_text(), f"stage {name}: {path} has no {found.function}(argv)"
