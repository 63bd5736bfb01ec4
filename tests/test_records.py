"""Trial records: intervals against published values, resume, damaged last line, foreign file."""

import json
import os
import subprocess
import sys

import pytest

from vlakeep.benchmarks.records import Records, mean_interval, summarise, wilson


@pytest.mark.parametrize("successes,n,low,high", [
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662),
])
def test_wilson_against_published_values(successes, n, low, high):
    mean, a, b = wilson(successes, n)
    assert mean == successes / n and a == pytest.approx(low, abs=2e-4) and b == pytest.approx(high, abs=2e-4)


def test_no_trials_say_nothing():
    assert wilson(0, 0) == (0.0, 0.0, 1.0) and mean_interval([]) == {"mean": None, "low": None, "high": None, "n": 0}


def add(records, trial, success=True, crash=None):
    records.add(kind="skill", ability="pick", trial=trial, seed=trial, success=success, value=None, crash=crash, steps=1)


def test_a_file_is_continued_and_a_half_line_cut_off(tmp_path):
    path = tmp_path / "records.jsonl"
    with Records(path, {"weights": "a"}) as records:
        add(records, 1)
        add(records, 0, False)
    with open(path, "a") as file:
        file.write('{"kind": "skill", "abil')
    with Records(path, {"weights": "a"}) as records:
        assert records.has("skill", "pick", 1) and not records.has("skill", "pick", 2)
        add(records, 2, None, "RuntimeError: broken")
    rows = [json.loads(line) for line in path.read_text().splitlines()][1:]
    assert len(rows) == 3
    assert summarise(rows) == {("skill", "pick"): {"mean": 0.5, "low": pytest.approx(0.0945, abs=1e-3),
                                                     "high": pytest.approx(0.9055, abs=1e-3),
                                                   "n": 2, "crashes": 1}}


def test_records_of_another_model_are_refused(tmp_path):
    with Records(tmp_path / "r.jsonl", {"weights": "a"}) as records:
        add(records, 0)
    with pytest.raises(ValueError, match="another model"):
        Records(tmp_path / "r.jsonl", {"weights": "b"})


def test_a_trial_counts_once(tmp_path):
    path = tmp_path / "records.jsonl"
    with Records(path, {"weights": "a"}) as records:
        add(records, 0)
        with pytest.raises(ValueError, match="records.jsonl has trial 0 of skill pick already"):
            add(records, 0)
        assert len(records.rows()) == 1
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[-1]]))
    with pytest.raises(ValueError, match=r"line 3 is damaged \(the trial of line 2 again\)"):
        Records(path, {"weights": "a"})


def test_what_is_missing_comes_in_batches_of_fixed_composition(tmp_path):
    with Records(tmp_path / "records.jsonl", {}) as records:
        for trial in (0, 1, 3):
            add(records, trial)
        assert list(records.missing("skill", "pick", 7, 2)) == [(range(2, 4), [2]), (range(4, 6), [4, 5]), (range(6, 7), [6])]


def test_alarms_are_kept_once_each_and_are_no_trials(tmp_path):
    path = tmp_path / "records.jsonl"
    with Records(path, {"weights": "a"}) as records:
        add(records, 0)
        before = summarise(records.rows())
        records.add_alarms(["it stands still", "it is mute"])
    with Records(path, {"weights": "a"}) as records:
        records.add_alarms(["it is mute", "it is blind"])
        assert records.alarms() == ["it stands still", "it is mute", "it is blind"]
        assert summarise(records.rows()) == before


def test_a_killed_process_loses_no_finished_trial(tmp_path):
    code = ("import os, sys\nfrom vlakeep.benchmarks.records import Records\nrecords = Records(sys.argv[1], {})\n"
            "for i in range(5):\n"
             "    records.add(kind='skill', ability='pick', trial=i, seed=i, success=True, value=None, crash=None, steps=1)\n"
            "os._exit(9)\n")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "r.jsonl")], env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)))
    assert len(Records(tmp_path / "r.jsonl", {}).rows()) == 5
