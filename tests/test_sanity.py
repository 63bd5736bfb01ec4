"""Every module's small sanity check runs: the lines `if __name__ == "__main__":  # sanity check: python -m MODULE ARGUMENTS`."""

import ast
import os
import re
import runpy
import shlex
import sys
import warnings

import pytest
from test_layout import PACKAGE, REPO

MARK = re.compile(r'^if __name__ == "__main__":  # sanity check: (?:python|torchrun.*?) -m (\S+) ?(.*)$', re.M)
FOUND = {match[1]: match[2] for path in sorted(PACKAGE.rglob("*.py")) for match in MARK.finditer(path.read_text())}
# What stands for a folder of the user's in the line. The golden data in tests/golden are a part, so all of them must be named.
PLACES = {"runs/NAME": "tests", "GOLDEN_FOLDER": os.environ.get("VLAKEEP_GOLDEN")}
KEY_MODULES = [
    "vlakeep.teacher.decompose",
    "vlakeep.teacher.sensitivity",
    "vlakeep.hsw.transform",
    "vlakeep.hsw.residual",
    "vlakeep.hsw.lora_input",
    "vlakeep.thermostat.controller",
    "vlakeep.thermostat.drift",
    "vlakeep.probe.pooling",
    "vlakeep.tabletop.benchmark",
    "vlakeep.benchmarks.records",
]


def test_key_modules_have_one():
    assert [name for name in KEY_MODULES if name not in FOUND] == []


@pytest.mark.parametrize("module", KEY_MODULES)
def test_what_a_key_module_prints_is_asserted(module):
    """A deviation that nobody compares with anything would only be printed."""
    block = ast.parse((REPO / (module.replace(".", "/") + ".py")).read_text()).body[-1]
    assert isinstance(block, ast.If) and any(isinstance(node, ast.Assert) for node in ast.walk(block))


@pytest.mark.parametrize("module", FOUND)
def test_sanity_check_runs(module, monkeypatch, capsys):
    assert (REPO / (module.replace(".", "/") + ".py")).is_file(), "the line names another module than its own"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(REPO)
    arguments = [PLACES.get(word, word) for word in shlex.split(FOUND[module])]
    if None in arguments:
        pytest.skip("VLAKEEP_GOLDEN names no folder with the golden data")
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy says that the module is imported already
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            assert not end.code
    if module in KEY_MODULES:
        assert capsys.readouterr().out.strip()
