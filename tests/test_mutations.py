"""The list of faults fits the sources as they are now, and the runner tells caught from survived."""

import ast
import re

import mutations
import pytest
from mutations import CAUGHT, SURVIVED, UNKNOWN, Fault, Outcome
from test_docs import defined
from test_layout import REPO

FAULTS = mutations.read_faults()


def test_every_fault_still_applies():
    """Its old text stands in the file exactly once, Python can still read the file, and nothing is said twice."""
    for fault in FAULTS:
        assert fault.old != fault.new and (REPO / fault.file).is_file(), fault.name
        source = mutations.mutated(fault, REPO)
        if fault.file.endswith(".py"):
            ast.parse(source)
    assert len({fault.name for fault in FAULTS}) == len({fault[1:4] for fault in FAULTS}) == len(FAULTS) > 100
    areas = {fault.name.split(":")[0] for fault in FAULTS}
    assert {"probe", "icsm", "hsw", "thermostat", "train", "data", "export", "checkpoint", "libero"} <= areas


def test_the_tests_that_must_catch_them_exist():
    for name in {name for fault in FAULTS for name in fault.tests}:
        file, _, test = name.partition("::")
        assert re.fullmatch(r"tests/test_\w+\.py", file) and (REPO / file).is_file(), name
        assert not test or test in defined(REPO / file), name


@pytest.fixture
def repository(tmp_path):
    """A package of two lines with a test of one of them."""
    for folder in ("vlakeep", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "vlakeep" / "__init__.py").write_text("ONE = 1\nTWO = 2\n")
    (tmp_path / "tests" / "test_one.py").write_text(
        "import time\nimport vlakeep\n\n\ndef test_one():\n    assert vlakeep.ONE == 1\n    time.sleep(vlakeep.TWO - 2)\n")
    return tmp_path


def test_the_runner_tells_caught_from_survived_and_leaves_the_tree_alone(repository, capsys):
    before = (repository / "vlakeep" / "__init__.py").read_bytes()
    faults = [Fault(name, "vlakeep/__init__.py", *change, ("tests/test_one.py",)) for name, change in
              (("one is wrong", ("ONE = 1", "ONE = 2")), ("two is wrong", ("TWO = 2", "TWO = 2.0")))]
    assert not mutations.check_all(faults, repository, 2, 60.0)
    assert "one is wrong  caught by test_one.py::test_one\ntwo is wrong  SURVIVED\n1 of 2 faults caught" in capsys.readouterr().out
    assert mutations.check_all(faults[:1], repository, 2, 60.0)
    assert (repository / "vlakeep" / "__init__.py").read_bytes() == before
    (repository / "tests" / "test_one.py").write_text("def test_one():\n    assert False\n")
    assert not mutations.check_all(faults[:1], repository, 2, 60.0)
    assert "without any fault tests/test_one.py fails: test_one.py::test_one" in capsys.readouterr().out


def test_what_gives_no_answer_is_not_caught(repository):
    slow = Fault("slow", "vlakeep/__init__.py", "TWO = 2", "TWO = 99", ("tests/test_one.py",))
    found = mutations.in_copy(repository, lambda copy: mutations.plant(slow, copy), slow.tests, 2.0)
    assert found == Outcome(UNKNOWN, "not done after 2 s")
    absent = mutations.in_copy(repository, lambda copy: None, ["tests/test_two.py"], 60.0)
    assert absent.verdict == UNKNOWN and SURVIVED != CAUGHT
    with pytest.raises(ValueError, match="occurs 0 times"):
        mutations.mutated(slow._replace(old="THREE"), repository)


def test_a_line_that_is_no_fault_is_named(tmp_path):
    (tmp_path / "list.txt").write_text("# a comment\n\nname :: file :: old :: new\n")
    with pytest.raises(ValueError, match="line 3"):
        mutations.read_faults(tmp_path / "list.txt")
