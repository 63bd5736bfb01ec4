"""Statistics of a study: against worked examples, closed forms and simulations; the rule that chooses settings; the front; the power."""

import csv
import io
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from vlakeep.core.config import ConfigError
from vlakeep.core.stages import STUDY
from vlakeep.core.study import Cell
from vlakeep.reporting.intervals import t_quantile
from vlakeep.studies import claims, figures, front, inference, paper, power, report, streams
from vlakeep.studies.data import Data, Setting
from vlakeep.studies.records import _curves, rate_of, read_records, states_of, train_seconds, values_of
from vlakeep.studies.rule import Rule, choose, families_of, of_reported, read_rule, to_report
from vlakeep.studies.tables import Table, spread


def made(arm, task, rate, seed, new, old, kl=(0.1, 0.2), first=1000):
    """A record; `new` and `old` are outcomes, such as "110x"."""
    trials = {f"new:{task}": {"outcomes": new, "seeds": [first, 1]}, "skill:reach": {"outcomes": old, "seeds": [first, 1]}}
    return {"format": 1, "study": "x", "cell": f"{arm}-{task}-lr{rate:g}-s{seed}", "arm": arm, "task": task, "rate": rate, "seed": seed,
            "settings": {}, "evaluate": {}, "weights": "", "trials": trials, "action_kl": list(kl), "drift": 0.0, "probe_kl": 0.0,
            "curves": {}, "seconds": {"train": 1.0, "evaluate": 1.0}, "made": {}}


def cells_of(records, family=None):
    named = family or {}
    return [Cell("x", one["arm"], one["task"], one["rate"], one["seed"], None, (), named.get(one["arm"], one["arm"])) for one in records]


A, B = Setting("a", 1e-3), Setting("b", 1e-3)


def test_differences_are_taken_at_the_same_start_state_of_the_same_seed():
    data = Data([made("a", "t", 1e-3, 1, "11", "1100"), made("a", "t", 1e-3, 2, "11", "111x"),
                 made("b", "t", 1e-3, 1, "11", "0110"), made("b", "t", 1e-3, 2, "11", "0111")])
    block = data.blocks(A, "old", ["t"], [1, 2], minus=B)["skill:reach"]
    np.testing.assert_array_equal(block, [[1, 0, -1, 0], [1, 0, 0, np.nan]])
    found = inference.difference(data, A, B, "old", [1, 2], 500)
    assert found.mean == pytest.approx(1 / 7) and (found.seeds, found.tasks, found.trials) == (2, 1, 7), "a crash is no pair"
    other = Data([made("a", "t", 1e-3, 1, "11", "11"), made("b", "t", 1e-3, 1, "11", "11", first=5)])
    with pytest.raises(ValueError, match="a at 0.001 and b at 0.001 were evaluated on other start states of new:t"):
        other.blocks(A, "new", ["t"], [1], minus=B)


def test_what_crashed_altogether_has_no_mean_and_stands_in_nobodys_way():
    """A mean over the abilities that did not crash would be of something else, and NaN is greater than nothing and less than nothing."""
    def of(first_new, first_old):
        return [one for seed in (1, 11, 12) for one in (
            made("plain", "t", 1e-3, seed, first_new, first_old), made("plain", "t", 2e-3, seed, "1110", "1100"),
            made("graded", "t", 2e-3, seed, "1110", "1111"))]

    plain = Setting("plain", 1e-3)
    for new, old, name in (("xxxx", "1100", "new:t"), ("1110", "xxxx", "skill:reach")):
        records = of(new, old)
        data, rule = Data(records), Rule("graded", "plain", [1], near=0.03, draws=200)
        assert (data.mean(plain, "new", [1]) is None) == (name == "new:t") and data.crashed(plain, ["new", "old"], [1]) == [name]
        chosen = choose(rule, families_of(cells_of(records)), data)
        assert [(one.setting.rate, one.matched) for one in chosen.values()] == [(2e-3, True)] * 2
        found = front.front_of(data, families_of(cells_of(records)), "old", [11, 12], 200)
        assert found.settings == [Setting("plain", 2e-3), Setting("graded", 2e-3)] and np.isfinite([found.new, found.kept]).all()
        judged = claims.judge(cells_of(records), records, rule)
        assert [note for note in judged.notes if "crashed" in note] == [
            f"all trials of an ability crashed on the {which}: plain at 0.001 ({name})" for which in (
                "choosing seeds, so that these settings are not chosen", "reported seeds, on which these settings have no mean")]
    with pytest.raises(ValueError, match="in every setting all trials of an ability crashed"):
        front.front_of(data, {"plain": [plain]}, "old", [11, 12], 200)
    none = [made("plain", "t", 1e-3, seed, "1110", "xxxx") for seed in (1, 11, 12)]
    notes = claims.judge(cells_of(none), none, Rule("graded", "plain", [1])).notes
    assert not any("without records" in note for note in notes)
    blocks = {"skill:a": np.array([[1.0, 0.0], [1.0, 1.0]]), "skill:b": np.full((2, 2), np.nan)}
    assert inference.estimate(blocks, 50, 1) is None
    row = values_of({**none[0], "trials": {**none[0]["trials"], "skill:b": {"outcomes": "11", "seeds": [0, 1]}}})
    assert (row["skill:reach"], row["old"], row["worst"], row["new"]) == (None, None, None, 0.75)


@pytest.mark.parametrize("change, words", [
    (lambda record: record["trials"].update({"new:t": {"outcomes": "11001100", "seeds": [1000, 1]}}),
     "g-t-lr0.001-s12 has 8 trials of new:t, and g-t-lr0.001-s11 4: evaluate all with the same"),
    (lambda record: record["trials"].pop("skill:reach"), "g-t-lr0.001-s12 has no trials of skill:reach, which other cells of t have"),
    (lambda record: record.update(action_kl=[0.1]), "g-t-lr0.001-s12 has 1 trials of action_kl, and g-t-lr0.001-s11 2")])
def test_a_cell_that_was_evaluated_otherwise_is_named(change, words):
    records = [made(arm, "t", 1e-3, seed, "1100", "1100") for arm in ("plain", "g") for seed in (1, 11, 12)]
    change(records[-1])
    with pytest.raises(ValueError, match=words):
        claims.files(cells_of(records), records, Rule("g", "plain", [1], draws=200))


def test_tasks_are_averaged_state_by_state_for_what_was_there_before_and_stand_alone_for_what_is_new():
    data = Data([made("a", "t", 1e-3, 1, "11", "10"), made("a", "u", 1e-3, 1, "00", "11")])
    np.testing.assert_array_equal(data.blocks(A, "old", ["t", "u"], [1])["skill:reach"], [[1.0, 0.5]])
    assert {name: block.mean() for name, block in data.blocks(A, "new", ["t", "u"], [1]).items()} == {"new:t": 1.0, "new:u": 0.0}
    assert data.mean(A, "new", [1]) == 0.5
    np.testing.assert_allclose(data.blocks(A, "action_kl", ["t", "u"], [1])["action_kl"], [[0.1, 0.2]])


def test_only_seeds_that_both_have_of_every_common_task_are_compared():
    records = [made(arm, task, 1e-3, seed, "1", "1") for arm in "ab" for task in "tu" for seed in (1, 2, 3)]
    records = [one for one in records if (one["arm"], one["task"], one["seed"]) != ("b", "u", 2)] + [made("a", "v", 1e-3, 1, "1", "1")]
    assert Data(records).common([A, B], [1, 2, 3]) == (["t", "u"], [1, 3])
    assert Data(records[:6]).common([A, B], [1, 2, 3]) == ([], [])


def crossed(generator, seeds, states, sd_seed, sd_state, sd_rest, mean=0.0):
    return (mean + sd_seed * generator.normal(size=(seeds, 1)) + sd_state * generator.normal(size=(1, states))
            + sd_rest * generator.normal(size=(seeds, states)))


@pytest.mark.parametrize("parts", [(0.1, 0.0, 0.3), (0.0, 0.3, 0.3), (0.05, 0.1, 0.5)])
def test_the_interval_holds_the_truth_as_often_as_it_says(parts):
    """Five trainings, forty states, whatever of the three the noise is."""
    generator, inside, rounds = np.random.default_rng(5), 0, 300
    for _ in range(rounds):
        found = inference.estimate({"one": crossed(generator, 5, 40, *parts)}, 200, 1, binary=False)
        inside += found.low <= 0 <= found.high
    assert 0.92 <= inside / rounds, inside / rounds


def test_the_standard_error_is_that_of_clusters_where_trials_of_a_training_agree():
    means = np.array([0.2, 0.5, 0.3, 0.9, 0.6])
    found = inference.estimate({"one": np.repeat(means[:, None], 30, axis=1)}, 20000, 1, binary=False)
    assert found.se == pytest.approx(means.std(ddof=1) / math.sqrt(5), rel=0.02), "and not that of 150 trials"
    assert found.high - found.mean == pytest.approx(t_quantile(4) * found.se)
    alone = inference.estimate({"one": np.ones((1, 30))}, 100, 1)
    assert alone.mean == 1.0 and alone.low is None and alone.superior() is None, "one training has no spread"


def test_where_every_pair_agrees_the_interval_has_still_a_width():
    found = inference.estimate({"one": np.zeros((5, 40))}, 200, 1)
    assert found.se == pytest.approx(math.sqrt(1 / 202 * 201 / 202 / 200)) and found.low < 0 < found.high


def test_where_each_block_agrees_within_itself_a_difference_has_still_a_p():
    """Always better in one task and never in the other; and a state's mean over tasks, which is no whole number."""
    for blocks in ({"one": np.ones((3, 8)), "two": np.zeros((3, 8))}, {"one": np.full((3, 16), 0.5)}):
        found = inference.estimate(blocks, 200, 2)
        assert found.mean == 0.5 and found.se == pytest.approx(math.sqrt(1 / 50 * 49 / 50 / 48))
        assert 0 < found.superior() < 0.05 and found.low < 0.5 < found.high
    assert inference.estimate({"one": np.array([[1.0, 0.0], [0.0, 1.0]])}, 200, 1).se > 0.2, "where trials differ, their spread"


def test_draws_are_the_same_for_all_settings_and_for_every_call():
    first = np.random.default_rng(1).random((4, 6))
    one, two = inference.sample({"skill:a": first}, 50), inference.sample({"skill:a": first + 0.25}, 50)
    np.testing.assert_allclose(two - one, 0.25)
    np.testing.assert_array_equal(one, inference.sample({"skill:a": first}, 50))
    crashed = inference.sample({"skill:a": np.array([[1.0, np.nan], [1.0, np.nan]])}, 50)
    np.testing.assert_array_equal(crashed, 1.0, "a draw of crashes alone tells nothing")


def test_tests_are_those_of_students_t():
    e = inference.Estimate(0.02, -0.036, 0.076, 0.02, 5, 1, 100)
    assert e.superior() == pytest.approx(0.373901, abs=1e-5), "t = 1, four degrees of freedom"
    assert e.superior(higher=False) == 1.0 and e._replace(mean=-0.02).superior() == 1.0, "the wrong side"
    assert e.not_inferior(0.05) == pytest.approx(0.012448, abs=1e-6), "t = 3.5, one-sided"
    assert e._replace(mean=-0.06).not_inferior(0.05) == pytest.approx(1 - 0.321665, abs=1e-5), "t = -.5"


def test_tests_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 4, 9, 30):
        for t in (-2.5, -0.3, 0.0, 1.7, 6.0):
            assert inference.above(t, freedom) == pytest.approx(stats.t.sf(t, freedom), abs=1e-9)
    for seeds, effect, error in ((3, 0.1, 0.03), (5, 0.02, 0.01), (20, 0.02, 0.02)):
        c = t_quantile(seeds - 1)
        expected = stats.nct.sf(c, seeds - 1, effect / error) + stats.nct.cdf(-c, seeds - 1, effect / error)
        assert power.power(effect, error, seeds) == pytest.approx(expected, abs=2e-4)


def test_holm_is_the_step_down_of_the_worked_example():
    """Four p values of Holm's procedure as textbooks work it out; what is not known takes no part."""
    found = inference.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": None})
    assert found == {"a": pytest.approx(0.03), "b": pytest.approx(0.06), "c": pytest.approx(0.06), "d": pytest.approx(0.02), "e": None}
    assert inference.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert inference.both(0.01, 0.2) == 0.2 and inference.both(0.01, None) is None


def test_the_rule_takes_what_keeps_most_of_what_learns_enough_on_the_choosing_seeds():
    """Success and retention of one seed a setting in tens; near is 10 points, so that .8 is enough."""
    tens = {("plain", 1e-3): (9, 2), ("plain", 2e-3): (8, 4), ("soft", 1e-3): (8, 7), ("soft", 2e-3): (9, 6), ("soft", 4e-3): (7, 10),
            ("weak", 1e-3): (5, 9), ("weak", 2e-3): (6, 8)}
    records = [made(arm, "t", rate, seed, *("1" * n + "0" * (10 - n) for n in (values if seed == 1 else (10, 10))))
               for (arm, rate), values in tens.items() for seed in (1, 2)]
    rule, families = Rule("soft", "plain", choose=[1], near=0.1), families_of(cells_of(records))
    found = choose(rule, families, Data(records))
    assert {name: (one.setting.rate, one.matched) for name, one in found.items()} == {
        "plain": (2e-3, True), "soft": (1e-3, True), "weak": (2e-3, False)}
    best = choose(rule, families, Data(records), own_best=True)
    assert {name: (one.setting.rate, one.matched) for name, one in best.items()} == {
        "plain": (1e-3, True), "soft": (2e-3, True), "weak": (2e-3, False)}
    judged = claims.judge(cells_of(records), records, rule)
    assert judged.seeds == [2] and [one.family for one in judged.matched] == ["plain", "weak"]
    assert any("weak: no setting comes within 10 points" in note for note in judged.notes)
    assert claims.best_rival(judged) == "plain" and claims.best_rival(judged, oracles=True) is None
    together = families_of(cells_of(records, {"weak": "soft"}))
    assert list(together) == ["plain", "soft"] and len(together["soft"]) == 5, "arms of one family are its settings"


def test_what_is_to_be_reported_are_the_chosen_settings_on_the_other_seeds_and_the_base():
    values = (("plain", 1e-3, "1110", "1000"), ("plain", 2e-3, "1111", "0000"),
              ("soft", 1e-3, "0000", "1111"), ("soft", 2e-3, "1111", "1110"))
    records = [made(arm, "corner", rate, seed, new, old) for seed in (1, 2, 11) for arm, rate, new, old in values]
    cells = [*cells_of([made("base", "corner", 0.0, 0, "0000", "1111")]), *cells_of(records)]
    rule = Rule("soft", "plain", choose=[1, 2], near=0.3)
    done = [record for record in records if record["seed"] == 1]
    assert [cell.cell for cell in to_report(rule, cells, done)] == ["base-corner", "plain-corner-lr0.001-s11", "soft-corner-lr0.002-s11"]
    assert [cell.rate for cell in to_report(rule, cells, done, own_best=True)] == [0.0, 2e-3, 2e-3]
    with pytest.raises(ConfigError, match="--chosen: no cell of plain on the choosing seeds 1, 2 is done: run these with --seeds first"):
        to_report(rule, cells, [record for record in records if record["seed"] == 11])
    with pytest.raises(ConfigError, match="--chosen: the study's rule names no seeds that choose"):
        to_report(Rule("soft", "plain"), cells, done)


@pytest.mark.parametrize("given, words", [
    ({"subject": "a"}, "`rule.reference` is missing"), ({"subject": "c", "reference": "a"}, "c is no family of the study, which has a, b"),
    ({"subject": "a", "reference": "b", "choose": [1, 2]}, "none is left"),
    ({"subject": "a", "reference": "b", "choose": [9]}, "no seed 9"),
    ({"subject": "a", "reference": "b", "margin": 5}, "`rule.margin` must be a number above 0 and below 1"),
    ({"subject": "a", "reference": "b", "retention": "x"}, "`rule.retention` must be one of"),
    ({"subject": "a", "reference": "b", "seeds": []}, "`rule.seeds` is unknown"),
])
def test_mistakes_of_a_rule_are_told(given, words):
    cells = cells_of([made(arm, "t", 1e-3, seed, "1", "1") for arm in "ab" for seed in (1, 2)])
    with pytest.raises(ConfigError) as caught:
        read_rule({"rule": given}, cells)
    assert words in str(caught.value)
    assert read_rule({}, cells) is None


def test_what_is_beaten_and_how_much_a_front_covers():
    new, kept = np.array([[0.9, 0.8, 0.5, 0.8, 0.9]]), np.array([[0.2, 0.6, 0.9, 0.5, 0.2]])
    assert front.beaten(new, kept).tolist() == [[False, False, False, True, False]], "equal points beat each other not"
    assert front.hypervolume(new, kept)[0] == pytest.approx(0.1 * 0.2 + 0.3 * 0.6 + 0.5 * 0.9)
    points = np.random.default_rng(3).random((2, 1, 7))
    grid = (np.arange(400) + 0.5) / 400
    x, y = np.meshgrid(grid, grid)
    covered = np.zeros_like(x, dtype=bool)
    for n, r in zip(points[0, 0], points[1, 0]):
        covered |= (x < n) & (y < r)
    assert front.hypervolume(points[0], points[1])[0] == pytest.approx(covered.mean(), abs=5e-3)


def test_a_front_is_beyond_another_where_it_keeps_more_at_every_success_of_it():
    own = np.array([[0.9, 0.6]]), np.array([[0.5, 0.8]])
    assert front.shortfall(own, (np.array([[0.8, 0.5]]), np.array([[0.4, 0.7]])))[0] == pytest.approx(0.1)
    assert front.shortfall(own, (np.array([[0.91]]), np.array([[0.1]])))[0] == -1, "it learns that much nowhere"
    assert front.shortfall(own, (np.array([[0.91]]), np.array([[0.1]])), near=0.03)[0] == pytest.approx(0.4)


def test_the_probability_of_the_front_is_the_share_of_joint_draws():
    """b is a, less a tenth of retention at every state: never on the front; c keeps less and learns more in three seeds of four."""
    records = []
    for seed, c_new in zip((1, 2, 3, 4), ("1111", "1111", "1111", "0000")):
        records += [made("a", "t", 1e-3, seed, "1100", "1111"), made("b", "t", 1e-3, seed, "1100", "1110"),
                    made("c", "t", 1e-3, seed, c_new, "0000")]
    judged = claims.judge(cells_of(records), records, Rule("a", "b", draws=4000))
    rows = {row["family"]: row for row in claims.front_rows(judged)}
    assert rows["a"]["p_on_front"] == 1.0 and rows["c"]["on_front"] and not rows["b"]["on_front"]
    assert rows["b"]["p_on_front"] == pytest.approx((3 / 4) ** 4, abs=0.03), "where no draw holds the last state it is a's equal"
    volumes = {row["family"]: row for row in claims.volume_rows(judged)}
    assert volumes["b"]["beyond_by"] == pytest.approx(0.25) and volumes["b"]["hypervolume"] == pytest.approx(0.5 * 0.75)


def test_power_is_that_of_the_tables():
    assert power.power(0.5, 1 / math.sqrt(34), 34) == pytest.approx(0.8078, abs=1e-3), "34 pairs find half a standard deviation"
    assert power.power(0.0, 0.1, 10) == pytest.approx(0.05, abs=1e-3), "nothing is found as often as the test errs"
    parts = power.Parts(seeds=0.25, states=0.0, rest=0.0)
    assert power.seeds_needed(0.25, parts, 50) == 34 and power.seeds_needed(0.02, power.Parts(0.0, 1.0, 0.0), 50) is None
    assert parts.error(4, 10) == 0.25 and power.Parts(0.0, 4.0, 9.0).error(9, 4) == pytest.approx(math.sqrt(1.25))


def test_variances_are_found_again_where_they_were_planted():
    generator = np.random.default_rng(2)
    found = power.parts_of({"one": crossed(generator, 400, 400, 0.1, 0.2, 0.5)})
    assert found.seeds == pytest.approx(0.01, rel=0.15) and found.states == pytest.approx(0.04, rel=0.15)
    assert found.rest == pytest.approx(0.25, rel=0.02)
    two = power.parts_of({name: crossed(generator, 400, 400, 0.0, 0.0, 0.5) for name in "ab"})
    assert two.rest == pytest.approx(0.125, rel=0.02) and two.seeds < 1e-3, "the mean of two blocks has half of the variance"
    few = power.parts_of({"one": crossed(generator, 4000, 10, 0.0, 0.0, 0.5)})
    assert few.seeds < 3e-3, "the luck of ten episodes is no difference between trainings"
    assert power.parts_of({"one": np.ones((1, 9))}) is None


def test_the_claim_needs_both_and_is_adjusted_for_all_families():
    generator = np.random.default_rng(0)
    records = []
    for arm, new, old in (("ours", 0.9, 0.9), ("plain", 0.9, 0.3), ("slow", 0.9, 0.88)):
        for task in ("t", "u"):
            for seed in (1, 2, 11, 12, 13, 14, 15, 16):
                drawn = ["".join("01"[int(generator.random() < p)] for _ in range(100)) for p in (new, old)]
                records.append(made(arm, task, 1e-3, seed, *drawn))
    rule = Rule("ours", "plain", choose=[1, 2], margin=0.1, near=0.1)
    judged = claims.judge(cells_of(records), records, rule)
    plain, slow = judged.matched
    assert plain.shown and not slow.shown and plain.p == max(plain.not_worse, plain.keeps_more)
    assert plain.holm == pytest.approx(2 * plain.p) and slow.holm == pytest.approx(slow.p)
    text = claims.text(judged)
    assert "| plain | plain at 0.001 | yes |" in text and "shown" in text and "Reported on seeds 11, 12, 13, 14, 15, 16" in text
    rows = claims.versus_rows(judged)
    assert [row["settings"] for row in rows] == ["matched"] * 2 + ["own best"] * 2 and rows[0]["kept"] == judged.matched[0].kept.mean
    assert set(claims.files(cells_of(records), records, rule)) == {
        "claims.md", "choices.csv", "claims.csv", "front.csv", "hypervolume.csv", "power.csv"}
    assert json.dumps(claims.power_rows(judged)) and SimpleNamespace(**claims.choice_rows(judged)[0]).matched


# The report


def whole(seeds=(1, 2, 11, 12, 13)):
    """Records of a base and three families, with questions and curves."""
    generator, records = np.random.default_rng(4), []
    arms = ("base", (0.0,), 0.0, 0.9), ("plain", (1e-3, 2e-3), 0.9, 0.2), ("ours", (1e-3,), 0.9, 0.85), ("x<_&", (1e-3,), 0.5, 0.9)
    for arm, rates, new, old in arms:
        for rate, task, seed in ((r, t, s) for r in rates for t in ("t", "u") for s in (seeds if arm != "base" else (0,))):
            one = made(arm, task, rate, seed, *("".join("01"[int(generator.random() < p)] for _ in range(20)) for p in (new, old)))
            one["trials"]["question:left_of"] = one["trials"]["skill:reach"]
            one["curves"] = {"step": [0, 50, 100], "kl": [0.0, None, 0.01], "loss": [2.0, 1.0, 0.5]}
            if arm == "ours":
                one["curves"]["opening"] = [0.1, 0.2, 0.3]
            one["made"] = {"commit": "0123abc", "hardware": {"gpus": [{"name": "A card"}]}}
            records.append(one)
    return records


def test_the_front_ends_at_what_a_rate_can_be_and_marks_every_family():
    """A t interval of two seeds goes far beyond; a family of which only the mean is drawn has a mark below its name."""
    values = {"plain": ("1111", "0011"), "ours": ("1110", "1111"), "best": ("1111", "1110"), "other": ("0011", "0111")}
    records = [made(arm, "t", 1e-3, seed, new if seed < 12 else "1101", old if seed < 12 else "1011")
               for arm, (new, old) in values.items() for seed in (1, 11, 12)]
    records = [record for record in records if record["cell"] != "best-t-lr0.001-s12"]  # the front is of the one seed that all have
    judged = claims.judge(cells_of(records), records, Rule("ours", "plain", choose=[1], draws=200))
    drawn = Figure()
    figures._front(drawn, judged, figures.style_of(judged))
    axes = drawn.axes[0]
    assert axes.get_xlim()[1] <= 104 and axes.get_ylim()[1] <= 104 and axes.get_ylim()[0] >= -4
    ends = np.concatenate([points for bars in axes.collections for points in bars.get_segments()])
    assert ends.min() >= -1e-9 and 99 < ends.max() <= 100 + 1e-9
    marks = {tuple(np.round(point, 6)) for line in axes.lines for point in line.get_xydata()}
    assert [text.get_text() for text in axes.texts] == ["other"] and tuple(np.round(axes.texts[0].xy, 6)) in marks


def test_the_report_is_one_page_and_its_numbers_are_those_of_the_records(tmp_path):
    records, rule = whole(), Rule("ours", "plain", choose=[1, 2], near=0.1, draws=200)
    cells = cells_of(records)
    out = report.build(cells, records, rule, tmp_path / "report", ["vlakeep study x.yaml"])
    text = out.read_text()
    assert not re.search(r"<script|<link rel=.stylesheet|(src|href)=.(https?:)?//", text), "nothing is loaded"
    assert "x&lt;_&amp;" in text and "x<_&" not in text
    for title in ("Arms", "The claim", "Success and forgetting", "Fronts", "Abilities", "Harm", "Over training", "Cost", "Power", "Cells",
                  "Reproduce"):
        assert f"<h2>{title}</h2>" in text
    for name in ("front", "forgetting", "loss", "kl", "opening"):
        assert (tmp_path / "report" / "figures" / f"{name}.png").is_file() and (tmp_path / "report" / "figures" / f"{name}.svg").is_file()
    judged = claims.judge(cells, records, rule)
    plain = judged.matched[0]
    assert f"{100 * plain.kept.mean:+.1f} [{100 * plain.kept.low:+.1f}" in text
    assert f"<h1>ours against plain: {100 * plain.kept.mean:+.1f}" in text
    rows = list(csv.DictReader(io.StringIO((tmp_path / "report" / "tables" / "numbers_claims.csv").read_text())))
    assert float(rows[0]["kept"]) == plain.kept.mean and rows[0]["family"] == "plain"
    changes = (tmp_path / "report" / "tables" / "changes.csv").read_text()
    assert changes.startswith("family,t,reach,left of\n") or changes.startswith("family,new task,reach,left of\n")
    assert "plain against the base: worse in reach -" in text and "x&lt;_&amp;: no setting comes within 10 points" in text
    latex = (tmp_path / "report" / "tables" / "arms.tex").read_text()
    assert r"x$<$\_\&" in latex and latex.count(r"\\") == 1 + 4 and r"\label{tab:arms}" in latex and "%)" not in latex.replace(r"\%", "")
    cost = (tmp_path / "report" / "tables" / "cost.csv").read_text()
    assert "ours,1,1.00," in cost and "A card" in cost
    # Made again from the records that lie beside it, it is the same.
    again = report.build(cells, read_records(tmp_path / "report" / "records.jsonl"), rule, tmp_path / "again", ["vlakeep study x.yaml"])
    assert again.read_text() == text
    (tmp_path / "again" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="holds files of something else .mine.txt."):
        report.build(cells, records, rule, tmp_path / "again")


def test_a_report_of_the_first_few_cells_says_what_is_not_known_yet(tmp_path):
    records = [one for one in whole((1, 11)) if one["arm"] in ("plain", "base") and one["seed"] != 11]
    cells = cells_of(whole((1, 11)))
    text = report.build(cells, records, Rule("ours", "plain", choose=[1], draws=200), tmp_path / "report").read_text()
    assert "ours and plain have no seed in common yet" in text and "without records on the choosing seeds: ours" in text


def test_the_way_of_a_family_goes_over_the_checkpoints_of_its_chosen_setting():
    def stop(step, seed, new, old):
        return {**made(f"early_{step}", "t", 1e-3, seed, new, old), "of": {"arm": "ours", "at": step}}

    records = [made("base", "t", 0.0, 0, "0000", "1111")]
    for seed in (1, 11, 12):
        records += [{**made("ours", "t", 1e-3, seed, "1110", "1100"), "curves": {"step": [10, 400]}},
                    made("plain", "t", 1e-3, seed, "1110", "1000"), stop(200, seed, "1110", "1110"), stop(100, seed, "1000", "1111"),
                    {**made("soft_0.5", "t", 1e-3, seed, "1000", "1000"), "of": {"arm": "ours", "alpha": 0.5}},
                    {**made("early_300", "t", 2e-3, seed, "1111", "0000"), "of": {"arm": "ours", "at": 300}}]
    cells = cells_of(records, {"early_100": "ours", "early_200": "ours"})
    judged = claims.judge(cells, records, Rule("ours", "plain", choose=[1], draws=200))
    assert judged.choices["ours"].setting.arm == "early_200", "of equal success what keeps more"
    assert figures._way(judged, "ours") == [(0, 0.0, 1.0), (100, 0.25, 1.0), (200, 0.75, 0.75), (400, 0.75, 0.5)]
    assert figures._way(judged, "plain") == [] and judged.data.stops(Setting("ours", 1e-3)) == judged.data.stops(Setting("early_100", 1e-3))
    assert "steps" in [figure.name for figure in figures.figures(judged)]


def test_ratios_of_time_are_of_one_machine():
    records = whole()
    for one in records:
        if one["arm"] == "ours":
            one["made"] = {"hardware": {"gpus": [{"name": "Another"}]}}
    judged = claims.judge(cells_of(records), records, Rule("ours", "plain", choose=[1, 2], draws=200))
    assert [row[:3] for row in report.cost(judged).rows][:2] == [["plain", "1", "1.00"], ["ours", "1", ""]]


def test_only_families_that_are_named_are_tested():
    records = whole()
    judged = claims.judge(cells_of(records), records, Rule("ours", "plain", choose=[1, 2], near=0.1, compare=["plain"], draws=200))
    assert {one.family: one.holm for one in judged.matched} == {"plain": judged.matched[0].p, "x<_&": None}


# Streams


def test_metrics_of_a_stream_are_those_of_the_worked_example():
    """Three tasks, by hand from the definitions."""
    matrix = np.array([[0.8, 0.1, 0.0], [0.5, 0.9, 0.2], [0.4, 0.6, 1.0]])
    found = streams.metrics(matrix, base=np.array([0.0, 0.05, 0.1]))
    assert found == {
        "average": pytest.approx((0.4 + 0.6 + 1.0) / 3), "learned": pytest.approx((0.8 + 0.9 + 1.0) / 3),
        "bwt": pytest.approx(((0.4 - 0.8) + (0.6 - 0.9)) / 2),
        "nbt": pytest.approx((((0.8 - 0.5) + (0.8 - 0.4)) / 2 + (0.9 - 0.6)) / 2),
        "auc": pytest.approx(((0.8 + 0.5 + 0.4) / 3 + (0.9 + 0.6) / 2 + 1.0) / 3),
        "fwt": pytest.approx(((0.1 - 0.05) + (0.2 - 0.1)) / 2)}
    kept = streams.metrics(np.array([[0.9, 0.0], [0.9, 0.7]]))
    assert kept["nbt"] == kept["bwt"] == 0.0 and "fwt" not in kept


def test_a_stream_is_put_together_from_the_records_of_its_cells():
    def one(arm, seed, position, rates):
        record = made(arm, "ab"[position], 1e-3, seed, "11", "10")
        del record["trials"][f"new:{record['task']}"]
        for name, rate in zip("ab", rates):
            kind = "new" if name == "ab"[position] else "stream"
            record["trials"][f"{kind}:{name}"] = {"outcomes": "1" * rate + "0" * (10 - rate), "seeds": [1, 1]}
        return {**record, "stream": ["a", "b"], "position": position}

    records = [one("base", 0, 0, (0, 1))]
    for arm, forgotten in (("plain", 6), ("ours", 1)):
        for seed in (1, 2, 3):
            records += [one(arm, seed, 0, (9, 1)), one(arm, seed, 1, (9 - forgotten + seed % 2, 8))]
    found = streams.streams(records[:-1])
    assert [(one.setting.arm, one.seed) for one in found] == [("plain", 1), ("plain", 2), ("plain", 3), ("ours", 1), ("ours", 2)]
    np.testing.assert_allclose(found[0].matrix, [[0.9, 0.1], [0.4, 0.8]])
    assert found[0].old == 0.5, "other tasks of the stream are no old skills"
    table = streams.values(streams.streams(records), streams.base_of(records))
    rows = {(row["arm"], row["metric"]): row for row in streams.over_seeds(table, "plain")}
    assert rows["ours", "nbt"]["mean"] == pytest.approx(0.1 - 2 / 30) and rows["ours", "nbt"]["minus_mean"] == pytest.approx(-0.5)
    assert rows["ours", "fwt"]["mean"] == pytest.approx(0.0) and "minus_mean" not in rows["plain", "nbt"]
    assert "| ours at 0.001 | 3 |" in streams.files(records, "plain")["streams.md"] and streams.files(records[:2]) == {}


def test_every_table_of_the_paper_comes_from_the_records_or_is_told_as_missing(tmp_path):
    records = whole()
    for one in records:
        if one["arm"] in ("base", "ours"):
            one["followed"] = {"blue": {"prompted": 0.75 if one["arm"] == "ours" else 0.5, "other": 0.25, "neither": 0.0}}
    cells, rule = cells_of(records), Rule("ours", "plain", choose=[1, 2], near=0.1, draws=200)
    written = [path.name for path in paper.write(cells, records, rule, "all", tmp_path)]
    assert written == ["T1", "T2", "T4", "T6", "T7", "F1", "F3"], "no stream was run"
    assert {path.name for path in (tmp_path / "T1").iterdir()} == {"T1.md", "T1.tex", "T1.csv"}
    assert {path.name for path in (tmp_path / "F1").iterdir()} == {"F1.png", "F1.svg"}
    assert "ours,blue,75.0,25.0,0.0,6" in (tmp_path / "T4" / "T4.csv").read_text(), "three reported seeds, two tasks"
    plain = claims.judge(cells, records, rule).best[0]
    t6 = list(csv.reader(io.StringIO((tmp_path / "T6" / "T6.csv").read_text())))
    assert t6[1][2] == f"{-100 * plain.kept.mean:+.1f} [{-100 * plain.kept.high:+.1f}, {-100 * plain.kept.low:+.1f}]"
    assert next(option for option in STUDY.own if option.name == "--paper").choices == paper.NAMES
    with pytest.raises(ConfigError, match="--paper T3: the records of this study do not hold it"):
        paper.write(cells, records, rule, "T3", tmp_path)
    (tmp_path / "T6" / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="T6 holds files of something else .mine.txt"):
        paper.write(cells, records, rule, "all", tmp_path)
    assert (tmp_path / "T6" / "mine.txt").read_text() == "kept"


def test_ties_go_to_the_lower_rate_crashes_are_no_trials_and_a_paired_test_has_a_seed_less():
    low, high = Setting("plain", 1e-3), Setting("plain", 2e-3)
    data = Data([made("plain", "t", one.rate, seed, "11", "10") for one in (high, low) for seed in (1, 2)])
    for own_best in (False, True):
        assert choose(Rule("plain", "plain", choose=[1]), {"plain": [high, low]}, data, own_best)["plain"].setting == low
    assert [rate_of({"outcomes": one}) for one in ("1x0", "x1x", "xx")] == [0.5, 1.0, None]
    pairs = [0.1, 0.2, 0.4]
    t = np.mean(pairs) / (np.std(pairs, ddof=1) / math.sqrt(3))
    assert streams._paired(pairs) == pytest.approx(1 - t / math.sqrt(2 + t * t)), "the closed form of two degrees of freedom"


def test_power_is_that_of_the_test_that_is_run():
    """Its bootstrap takes the luck of single episodes for more than it is, so it finds less than the t test on the true standard error."""
    generator = np.random.default_rng(7)
    for sd, effect in (((0.0, 0.0, 0.5), 0.13), ((0.05, 0.1, 0.3), 0.13), ((0.05, 0.0, 0.0), 0.09)):
        parts = power.Parts(*(one ** 2 for one in sd))
        found = [inference.estimate({"one": crossed(generator, 5, 50, *sd, mean=effect)}, 200, 1, binary=False) for _ in range(300)]
        taken = math.sqrt(np.mean([one.se ** 2 for one in found]))
        assert taken == pytest.approx(parts.taken(5, 50)[0], rel=0.05)
        share = sum(one.superior() < 0.05 for one in found) / len(found)
        assert parts.power(effect, 5, 50) == pytest.approx(share, abs=0.12)
    assert power.table(0.1, power.Parts(0.0, 0.0, 0.25), (5,), (50,))[0][0] < 0.3 < power.power(0.1, 0.5 / math.sqrt(250), 5)


def test_what_was_not_measured_is_no_divergence_of_zero():
    records = [{**made("a", "t", 1e-3, seed, "11", "10"), "action_kl": None} for seed in (1, 2)]
    data = Data([*records, *(made("a", "u", 1e-3, seed, "11", "10") for seed in (1, 2)), {**made("base", "t", 0.0, 0, "11", "10"),
                                                                                          "action_kl": None}])
    assert inference.value(Data(records), A, "action_kl", [1, 2], 100) is None and Data(records).mean(A, "action_kl", [1]) is None
    assert data.mean(A, "action_kl", [1, 2]) == pytest.approx(0.15), "that of the task where it was"
    assert data.mean(Setting("base", 0.0), "action_kl", [1]) == 0.0, "the base is the teacher"


def test_the_front_has_what_the_rule_calls_retention():
    records = whole()
    for one in records:
        one["trials"]["question:left_of"] = {"outcomes": "0" * 20, "seeds": [1000, 1]}
    judged = claims.judge(cells_of(records), records, Rule("ours", "plain", choose=[1, 2], near=0.1, retention="all", draws=200))
    for family in ("ours", "base"):
        assert judged.values[family]["all"].mean == pytest.approx(judged.values[family]["old"].mean / 2)
    from matplotlib.figure import Figure
    drawn = Figure()
    figures._front(drawn, judged, figures.style_of(judged))
    marks = {one.get_label(): float(one.lines[0].get_xdata()[0]) for one in drawn.axes[0].containers}
    assert marks["ours"] == pytest.approx(100 * judged.values["ours"]["all"].mean)


def test_cells_that_left_no_record_are_told():
    records = whole()
    cells = cells_of(records)
    judged = claims.judge(cells, records, Rule("ours", "plain", choose=[1, 2], near=0.1, draws=200))
    assert not any("without a record" in note for note in judged.notes)
    gone = [one for one in records if (one["arm"], one["task"], one["seed"]) not in (("ours", "t", 1), ("ours", "u", 12))
            and (one["arm"], one["rate"], one["seed"]) != ("plain", 1e-3 if judged.choices["plain"].setting.rate == 2e-3 else 2e-3, 13)]
    notes = claims.judge(cells, gone, Rule("ours", "plain", choose=[1, 2], near=0.1, draws=200)).notes
    assert "cells without a record on the choosing seeds, where settings are chosen by the others: ours 1 of 4" in notes
    assert "cells without a record at the chosen settings on the reported seeds, where the others speak for them: ours 1 of 6" in notes


def test_families_of_which_the_same_is_to_be_said_share_a_line():
    """A study of thirty families has one line of those that learn too little, not thirty."""
    records = whole()
    cells = cells_of(records)
    gone = [one for one in records if (one["arm"], one["task"], one["seed"]) not in (("ours", "t", 1), ("x<_&", "t", 1))]
    notes = claims.judge(cells, gone, Rule("ours", "plain", choose=[1, 2], near=0.1, draws=200)).notes
    assert any("others: ours, x<_& each 1 of 4" in note for note in notes)
    notes = claims.judge(cells, records, Rule("plain", "plain", choose=[1, 2], near=-0.5, draws=200)).notes
    [line] = [note for note in notes if "no setting comes within" in note]
    assert line.startswith("plain, ours, x<_&: ") and line.endswith("the own best stands for each, and what that keeps is not what is "
                                                                    "kept at that success")


@pytest.mark.parametrize("given, words", [
    (5, "`rule` must be a table"), ({"subject": ["a"], "reference": "b"}, "['a'] is no family"),
    ({"subject": "a", "reference": "a"}, "a is subject and reference"), ({"subject": "a", "reference": "b", "compare": ["a"]}, "itself"),
])
def test_a_rule_that_compares_nothing_is_refused(given, words):
    cells = cells_of([made(arm, "t", 1e-3, seed, "1", "1") for arm in "ab" for seed in (1, 2)])
    with pytest.raises(ConfigError) as caught:
        read_rule({"rule": given}, cells)
    assert words in str(caught.value)


def test_streams_are_told_of_the_seeds_that_are_reported():
    records = [{"arm": arm, "seed": seed} for arm, seed in (("base", 1), ("a", 1), ("a", 2))]
    assert of_reported(Rule("a", "b", choose=[1]), records) == [records[0], records[2]] and of_reported(None, records) == records


def test_a_table_keeps_columns_of_one_name():
    assert Table("x", "", ["family", "count", "count"], [["a", "1", "2"]]).csv() == "family,count,count\na,1,2\n"


# One by one: what of a number nothing else would notice


def test_the_luck_of_few_trainings_is_no_difference_between_states():
    few = power.parts_of({"one": crossed(np.random.default_rng(3), 3, 6000, 0.0, 0.2, 0.5)})
    assert few.states == pytest.approx(0.04, rel=0.15), "and not .04 + .25 / 3"
    np.testing.assert_allclose(power._filled(np.array([[1.0, 2.0], [3.0, np.nan]])), [[1, 2], [3, 3]])
    np.testing.assert_allclose(power._filled(np.array([[1.0, np.nan], [3.0, np.nan]])), [[1, 1], [3, 3]])


def test_blocks_count_alike_and_their_states_are_drawn_apart():
    uneven = inference.estimate({"one": np.zeros((2, 30)), "two": np.ones((2, 10))}, 50, 1)
    assert uneven.mean == 0.5, "a block with more states counts no more"
    row = np.random.default_rng(0).random((1, 40)).repeat(3, 0)
    alone, both = (np.std(inference.sample(dict.fromkeys(names, row), 4000)) for names in (["skill:a"], ["skill:a", "skill:b"]))
    assert both == pytest.approx(alone / math.sqrt(2), rel=0.1), "two skills are asked at states of their own"


def test_choices_pairs_and_fronts_are_those_that_they_are_called():
    """ours has two rates: .8 with 9 of 10 kept, and 1.0 with 6 kept; plain reaches .9 and keeps 3; slow keeps more and learns less than
    near allows; keen learns as much as plain and keeps 5."""
    tens = {("plain", 1e-3): (9, 3), ("ours", 1e-3): (8, 9), ("ours", 2e-3): (10, 6), ("keen", 1e-3): (9, 5), ("slow", 1e-3): (2, 10)}
    records = [made(arm, "t", rate, seed, "1" * new + "0" * (10 - new), "1" * old + "0" * (10 - old))
               for (arm, rate), (new, old) in tens.items() for seed in (1, 2, 3)]
    judged = claims.judge(cells_of(records), records, Rule("ours", "plain", choose=[1], near=0.15, draws=500))
    assert (judged.choices["ours"].setting.rate, judged.own_best["ours"].setting.rate) == (1e-3, 2e-3)
    matched, best = ({one.family: (round(one.new.mean, 6), round(one.kept.mean, 6)) for one in found}
                     for found in (judged.matched, judged.best))
    assert matched["plain"] == (-0.1, 0.6) and best["plain"] == (0.1, 0.3)
    assert claims.best_rival(judged) == "keen", "of those that learn enough what keeps most"
    wanted = power.parts_of(judged.data.blocks(Setting("ours", 1e-3), "old", ["t"], [2, 3], minus=Setting("plain", 1e-3)))
    assert judged.parts == wanted and wanted != power.parts_of(
        judged.data.blocks(Setting("ours", 1e-3), "new", ["t"], [2, 3], minus=Setting("plain", 1e-3)))
    rows = {row["family"]: row for row in claims.volume_rows(judged)}
    assert rows["ours"]["hypervolume"] == pytest.approx(0.8 * 0.9 + 0.2 * 0.6) and rows["plain"]["hypervolume"] == pytest.approx(0.27)
    assert 0 < rows["plain"]["more_low"] < rows["plain"]["more"] == pytest.approx(0.84 - 0.27)
    assert rows["plain"]["more"] < rows["plain"]["more_high"]
    versus = judged.matched[0]
    assert [versus._replace(holm=p).shown for p in (0.049, 0.051, None)] == [True, False, False]


def test_a_record_says_its_states_its_time_its_curves_and_its_worst_skill():
    assert states_of({"outcomes": "0101", "seeds": [7, 3]}) == [7, 10, 13, 16] and states_of({"outcomes": "01", "seeds": [7, 3]}) == [7, 10]
    assert states_of({"outcomes": "010", "seeds": [1, 5, 6]}) == [1, 5, 6] and states_of({"outcomes": "0", "seeds": [4, 1]}) == [4]
    assert train_seconds([{"seconds": one} for one in (1.0, 5.0, 2.0, 4.0)]) == 9.0 and train_seconds([{}]) is None, "resumed after 5 s"
    rows = [{"step": step, "loss": 1.0, **({"kl": 0.5} if step == 7 else {})} for step in range(500)]
    kept = _curves(rows)
    assert 7 in kept["step"] and 499 in kept["step"] and len(kept["step"]) < 80 and kept["kl"][kept["step"].index(7)] == 0.5
    record = made("a", "t", 1e-3, 1, "11", "10")
    record["trials"]["skill:tap"] = {"outcomes": "00", "seeds": [1, 1]}
    found = values_of(record)
    assert (found["worst"], found["old"], found["new"]) == (0.0, 0.25, 1.0)
    assert spread([(1, 0.0), (1, 1.0), (2, 0.5)]) == "0.5 ±0", "a seed is one value, its mean over tasks"


def test_the_figures_show_what_is_forgotten_and_the_reported_seeds():
    from matplotlib.figure import Figure

    records = whole()
    for one in records:
        if one["arm"] == "ours":
            one["curves"]["kl"] = [0.0, None, 1.0 if one["seed"] in (1, 2) else 0.01 * one["seed"]]
            one["settings"]["thermostat.target"] = 0.07
    judged = claims.judge(cells_of(records), records, Rule("ours", "plain", choose=[1, 2], near=0.1, draws=200))
    steps, mean, low, high = figures._curve(judged, "ours", "kl")
    assert list(steps) == [0, 100] and mean[1] == pytest.approx(0.12) and (low[1], high[1]) == (0.11, 0.13)
    assert figures.budget(judged) == 0.07
    drawn = Figure()
    figures._forgetting(drawn, judged, figures.style_of(judged), ["skill:reach"])
    e = inference.difference(judged.data, judged.choices["plain"].setting, Setting("base", 0.0), "skill:reach", judged.seeds, 200)
    bars = next(one for one in drawn.axes[0].containers if one.get_label() == "plain")
    assert e.mean < -0.3 and bars.patches[0].get_width() == pytest.approx(-100 * e.mean), "to the right is lost"
    ends = bars.errorbar.lines[2][0].get_segments()[0][:, 0]
    assert sorted(ends) == pytest.approx([-100 * e.high, -100 * e.low])


def test_families_with_unlike_tasks_are_told():
    """A mean over easy tasks is none over all: on two of three tasks a family may seem to learn enough."""
    def notes(lacking):
        records = [made(arm, task, 1e-3, seed, "1110", "1100") for arm in ("plain", "ours", "gpm") for task in ("t", "u", "v")
                   for seed in (1, 11, 12) if (arm, task, seed) not in lacking]
        return [note for note in claims.judge(cells_of(records), records, Rule("ours", "plain", choose=[1], near=0.3, draws=200)).notes
                if "unlike" in note]

    chosen = ("on the choosing seeds settings are compared by means over unlike tasks: 3 of 3 (t, u, v) of plain, ours; "
              "2 of 3 (t, u) of gpm")
    shown = ("on the reported seeds means are over unlike tasks, and differences over those that both have: "
             "2 of 3 (t, v) of plain; 3 of 3 (t, u, v) of ours, gpm")
    assert notes([]) == [] and notes([(arm, "v", 1) for arm in ("plain", "ours", "gpm")]) == [], "the same for all"
    assert notes([("gpm", "v", 1)]) == [chosen]
    assert notes([("plain", "u", 11), ("plain", "u", 12)]) == [shown]
    assert notes([("gpm", "v", 1), ("plain", "u", 11), ("plain", "u", 12)]) == [chosen, shown]
    records = [made(arm, task, rate, 1, "1110", "1100") for arm, rate, tasks in
               (("plain", 1e-3, "tu"), ("ours", 1e-3, "tu"), ("ours", 2e-3, "t")) for task in tasks]
    assert "1 of 2 (t) of ours" in "".join(claims.judge(cells_of(records), records, Rule("ours", "plain", draws=200)).notes)


def test_the_front_is_of_settings_that_have_reported_seeds():
    """Rates that were run on the choosing seed alone hid the front of all others."""
    records = [made(arm, "t", rate, seed, new, old) for arm, rate, new, old, seeds in (
        ("plain", 1e-3, "1111", "1100", (1, 11, 12)), ("plain", 2e-3, "1110", "1000", (1,)), ("ours", 1e-3, "1110", "1111", (1, 11, 12)))
        for seed in seeds]
    judged = claims.judge(cells_of(records), records, Rule("ours", "plain", choose=[1], near=0.3, draws=200))
    assert judged.front.settings == [Setting("plain", 1e-3), Setting("ours", 1e-3)] and judged.front.seeds == [11, 12]
    assert "settings without a record on the reported seeds, which the front lacks: 1" in judged.notes
    few = [one for one in records if (one["arm"], one["seed"]) != ("ours", 12)]
    notes = claims.judge(cells_of(records), few, Rule("ours", "plain", choose=[1], near=0.3, draws=200)).notes
    said = next(note for note in notes if note.startswith("the front is over 1 of 2 seeds and 1 of 1 tasks"))
    assert "no difference between trainings" in said
    assert not any("the front is over" in note for note in judged.notes)
