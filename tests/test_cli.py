"""The command line as a user meets it: help, typing mistakes, one-line errors, exit statuses, signals."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vlakeep import cli
from vlakeep.core.config import known_keys

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


def test_help_lists_every_stage_and_imports_nothing_heavy():
    code = "import sys; from vlakeep import cli; cli.run(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, "--help imported torch"
    for name in (
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


def test_stage_help_shows_every_key_with_default_and_comment():
    text = cli.stage_help("train")
    assert "reads:" in text and "writes:" in text
    for key in known_keys():
        assert f"--{key} " in text or f"--{key}." in text, key
    assert "  --thermostat.batch_size 64\n" in text
    assert "  --lora.alpha 16\n      Scale of the update is alpha / rank." in text


def test_unknown_stage_is_met_with_a_suggestion():
    done = vlakeep("trian")
    assert done.returncode == 2 and "did you mean `train`?" in done.stderr


def test_mistakes_print_one_message_and_exit_2(tmp_path):
    for argv, words in (
        (["--train.lr", "-1"], "--train.lr -1.0: must be greater than 0"),
        (["--trian.lr", "1"], "did you mean `train.lr`?"),
        (["--config", "no.yaml"], "no configuration file at no.yaml"),
        (["--root", str(REPO / "x")], "source tree"),
    ):
        done = vlakeep("storage-check", *argv, VLAKEEP_ROOT=str(tmp_path))
        if argv[0] == "--root":  # a finding of the check itself
            assert done.returncode == 1 and words in " ".join(done.stdout.replace("│", " ").split())
        else:
            assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr
            assert "Traceback" not in done.stderr


def test_traceback_on_request(tmp_path):
    done = vlakeep("storage-check", "--train.lr", "-1", VLAKEEP_DEBUG="1", VLAKEEP_ROOT=str(tmp_path))
    assert done.returncode == 1 and "Traceback" in done.stderr and "ConfigError" in done.stderr


def stage(tmp_path, body):
    (tmp_path / "a_stage.py").write_text("def main(argv):\n" + textwrap.indent(textwrap.dedent(body), "    "))
    return [
        sys.executable,
        "-c",
        "import sys; from vlakeep import cli; cli.STAGES['x'] = cli.Stage('a_stage', ''); sys.argv = ['vlakeep', 'x'];"
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
