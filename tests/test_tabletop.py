"""The tabletop benchmark: experts, exact predicates, determinism, disjoint seeds, balanced questions, rollouts."""

from collections import Counter

import numpy as np
import pytest

from vlakeep.benchmarks import tabletop
from vlakeep.benchmarks.records import Records, summarise
from vlakeep.benchmarks.rollout import random_policy, run_skill_episodes
from vlakeep.benchmarks.tabletop_expert import coarse, expert_actions
from vlakeep.benchmarks.tabletop_questions import ANSWERS, QUESTION_KINDS, ask, corpus, words
from vlakeep.benchmarks.tabletop_render import SIZE, render
from vlakeep.benchmarks.tabletop_world import (
    ALL_SKILLS,
    COLORS,
    MAX_STEPS,
    NEW_SKILL,
    NEW_SKILLS,
    RADIUS,
    SKILLS,
    TRAY,
    TabletopWorld,
)


def play(world, steps, noise=0.0, rng=None):
    done = np.zeros(world.n, dtype=bool)
    for _ in range(steps):
        actions = expert_actions(world)
        done |= world.step(tabletop.noisy(actions, noise, rng) if noise else actions)
    return done


@pytest.mark.parametrize("skill", ALL_SKILLS)
def test_the_expert_succeeds_on_500_tables(skill):
    assert play(TabletopWorld([skill] * 500, range(500)), MAX_STEPS[skill]).all()


@pytest.mark.parametrize("skill", ["pick", "place", *NEW_SKILLS])
def test_the_expert_recovers_from_disturbances(skill):
    done = play(TabletopWorld([skill] * 200, range(200)), 2 * MAX_STEPS[skill], 0.25, np.random.default_rng(0))
    assert done.mean() > 0.95


def test_a_table_depends_on_its_skill_and_seed_alone():
    many = TabletopWorld(["pick", "place", "pick"] * 5, range(15))
    one = TabletopWorld(["place"], [7])
    assert one.instructions[0] == many.instructions[7]
    assert np.array_equal(one.xy_NK2[0], many.xy_NK2[7]) and np.array_equal(render(one)[0], render(many)[7])
    for _ in range(4):
        many.step(expert_actions(many))
        one.step(expert_actions(one))
    assert np.array_equal(render(one)[0], render(many)[7])
    assert np.array_equal(render(many.subset(np.array([7])))[0], render(many)[7])


def test_starts_are_unambiguous_and_leave_the_tray_free():
    world = TabletopWorld(["place"] * 300, range(300))
    assert not world.success().any()
    for i in range(world.n):
        xy = world.xy_NK2[i, world.present_NK[i]]
        gaps = np.linalg.norm(xy[:, None] - xy[None], axis=2)[np.triu_indices(len(xy), 1)]
        assert gaps.min() > 2 * RADIUS and np.linalg.norm(xy - TRAY, axis=1).min() > 0.3
        kinds = list(zip(world.color_NK[i, world.present_NK[i]], world.shape_NK[i, world.present_NK[i]]))
        assert len(set(kinds)) == len(kinds)


def test_what_does_not_do_the_new_skill_does_not_count():
    """Picking the object up, or putting it down elsewhere, is no success."""
    for other in ("pick", "tap", "reach"):
        world = TabletopWorld([NEW_SKILL] * 50, range(50))
        acting = TabletopWorld([NEW_SKILL] * 50, range(50))
        acting.skills = np.array([other] * 50)
        done = np.zeros(50, dtype=bool)
        for _ in range(MAX_STEPS[NEW_SKILL]):
            action = expert_actions(acting)
            acting.step(action)
            done |= world.step(action)
        assert not done.any(), other


def test_a_random_policy_and_a_blind_one_score_low(tmp_path):
    with Records(tmp_path / "r.jsonl", {}) as records:
        run_skill_episodes(random_policy(0), ["pick", "place", *NEW_SKILLS], 20, 5, 180, records)
    assert max(v["mean"] for v in summarise(records.rows()).values()) <= 0.1
    for skill in ALL_SKILLS:  # doing nothing
        world = TabletopWorld([skill] * 50, range(50))
        open_hand = np.tile([0, 0, 0, 0, 0, 0, 1.0], (50, 1))
        assert not any(world.step(open_hand).any() for _ in range(MAX_STEPS[skill])) or skill in ("reach", "drop")


def test_frames_show_colour_shape_and_gripper():
    world = TabletopWorld(["reach"], [3])
    image = render(world)[0].astype(int)
    for slot in np.flatnonzero(world.present_NK[0]):
        x, y = world.xy_NK2[0, slot]
        assert np.abs(image[int(y * SIZE), int(x * SIZE)] - list(COLORS.values())[world.color_NK[0, slot]]).max() < 40 or \
            np.linalg.norm(world.grip_N2[0] - world.xy_NK2[0, slot]) < 0.2
    closed = TabletopWorld(["reach"], [3])
    closed.closed_N[:] = True
    low = TabletopWorld(["reach"], [3])
    low.z_N[:] = 0
    assert not np.array_equal(render(closed), render(world)) and not np.array_equal(render(low), render(world))


def test_bad_actions_and_skills_are_refused():
    world = TabletopWorld(["pick"], [0])
    with pytest.raises(ValueError, match="shape"):
        world.step(np.zeros((1, 6)))
    with pytest.raises(ValueError, match="not finite"):
        world.step(np.full((1, 7), np.nan))
    with pytest.raises(ValueError, match="unknown tabletop skills"):
        TabletopWorld(["juggle"], [0])


def test_coarse_steps_are_from_the_grid():
    assert coarse(np.array([-2, -0.6, -0.2, 0.1, 0.3, 0.5, 0.9])).tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_questions_are_balanced_exact_and_reproducible(kind):
    trials = tabletop.question_trials(kind, 60, 0)
    counts = Counter(t.sample.answer for t in trials)
    assert set(counts) == set(ANSWERS[kind]) and max(counts.values()) - min(counts.values()) <= 1
    again = tabletop.question_trials(kind, 60, 0)
    assert all(a.sample.instruction == b.sample.instruction for a, b in zip(trials, again))
    assert all(np.array_equal(a.sample.image, b.sample.image) for a, b in zip(trials, again))


def test_left_means_left_in_the_image():
    rng = np.random.default_rng(0)
    world = TabletopWorld(["reach"] * 40, range(40))
    seen = 0
    for i in range(world.n):
        found = ask(world, i, "left", rng)
        if found is None:
            continue
        first, second = found[0].removeprefix("is the ").removesuffix("?").split(" left of the ")

        def column(name):
            color, shape = name.split()
            for slot in np.flatnonzero(world.present_NK[i]):
                shapes = ["circle", "square", "triangle", "cross"]
                if (list(COLORS)[world.color_NK[i, slot]], shapes[world.shape_NK[i, slot]]) == (color, shape):
                    return world.xy_NK2[i, slot, 0]
        assert (found[1] == "yes") == (column(first) < column(second))
        seen += 1
    assert seen > 20


def test_the_new_skill_is_in_no_probe_question_or_pretraining_frame():
    frames = tabletop.mixed_frames(600, tabletop.PRETRAINING, questions=0.3)
    probe, kinds = tabletop.make_probe(100, 0)
    retention = tabletop.retention_frames(50, 0)
    texts = frames.instructions + [s.instruction for s in probe + retention]
    assert not any("stash" in text for text in texts)
    assert all(s.action is None and s.answer is None for s in probe) and NEW_SKILL not in kinds
    assert len(set(kinds)) >= 10


def test_seed_ranges_are_disjoint():
    starts = [tabletop.PRETRAINING, tabletop.DEMONSTRATIONS, tabletop.PROBE, tabletop.EVALUATION, tabletop.RETENTION]
    assert len(set(starts)) == 5 and min(np.diff(sorted(starts))) >= tabletop.RANGE
    with pytest.raises(ValueError, match="seed"):
        tabletop.make_probe(10, tabletop.RANGE)


def test_demonstrations_are_reproducible_and_end_in_success():
    first, again = (tabletop.collect_demos(NEW_SKILL, 6, seed=3) for _ in range(2))
    assert all(np.array_equal(a.images, b.images) and np.array_equal(a.actions, b.actions) for a, b in zip(first, again))
    assert all(e.language.startswith("stash the ") and e.images.shape[1:] == (64, 64, 3) for e in first)
    assert all(e.actions[-1][6] == 1 for e in first), "the last action lets go"


def test_pretraining_frames_do_not_depend_on_the_number_of_processes():
    one, two = (tabletop.training_frames(5_200, 0, processes=p) for p in (1, 2))
    assert np.array_equal(one[0], two[0]) and [s.instruction for s in one[1]] == [s.instruction for s in two[1]]


def test_every_word_of_the_benchmark_is_in_the_vocabulary():
    import re
    assert {w for t in corpus() for w in re.findall(r"[A-Za-z]+", t)} == set(words())


def expert_policy(world_of):
    """The expert as a policy, looking at the world instead of the image."""
    return lambda images, instructions: expert_actions(world_of())


def test_rollouts_record_every_trial_whatever_the_batch(tmp_path, monkeypatch):
    """The same policy in one batch and in several gives the same records; a policy that raises is a crash, not a failure."""
    from vlakeep.benchmarks import rollout
    worlds = []

    def watched(world):
        worlds.append(world)
        return render(world)

    monkeypatch.setattr(rollout, "render", watched)

    def run(name, parallel, policy):
        with Records(tmp_path / name, {}) as records:
            run_skill_episodes(policy, ["pick", "side"], 8, 50, parallel, records)
        return records.rows()

    expert = expert_policy(lambda: worlds[-1])
    all_at_once, in_threes = run("a", 16, expert), run("b", 3, expert)
    assert all_at_once == in_threes and all(r["success"] for r in all_at_once) and len(all_at_once) == 16

    def fragile(images, instructions):
        if any("side" in text for text in instructions):
            raise RuntimeError("no idea of sides")
        return np.tile([0, 0, 0, 0, 0, 0, 1.0], (len(images), 1))

    rows = run("c", 16, fragile)
    summary = summarise(rows)
    assert summary[("skill", "side")]["crashes"] == 8 and summary[("skill", "side")]["n"] == 0
    assert summary[("skill", "pick")]["crashes"] == 0 and summary[("skill", "pick")]["n"] == 8


def behave_as(behaviour, world):
    """The expert's actions for another skill with the same object, as of a model that does that skill whatever it is told.

    A side that is given goes with the table; else the one farthest from the object. The known prompt of a pair means the other target.
    """
    acting = world.subset(np.arange(world.n))
    acting.skills = np.array([behaviour] * world.n)
    own = world.skills[0]
    other_N = (world.target_N + 1) % world.present_NK.sum(axis=1)
    acting.goal_N = np.where(world.goal_N >= 0, world.goal_N, other_N)
    if (world.rival_N >= 0).all() and behaviour != own:
        acting.goal_N = world.rival_N
    if behaviour != own:
        x_N, y_N = world.start_NK2[np.arange(world.n), world.target_N].T
        far_N = {"carry": np.where(x_N > 0.5, 0, 1), "path": np.where(y_N > 0.5, 2, 3)}.get(behaviour, world.side_N)
        acting.side_N = np.maximum(np.where(world.side_N >= 0, world.side_N, far_N), 0)
        if behaviour == "relation":
            acting.side_N %= 2
    return expert_actions(acting)


def success_as(behaviour, skill, n):
    """Share of `n` tables of `skill` on which a model that always does `behaviour` succeeds."""
    world = TabletopWorld([skill] * n, range(n))
    done = np.zeros(n, dtype=bool)
    for _ in range(MAX_STEPS[skill]):
        done |= world.step(behave_as(behaviour, world))
    return done.mean()


# One motion under different prompts: who has collapsed onto one of these may do another by its motion, not by its target.
SAME_MOTION = {(a, b) for a in ("place", "red", "blue") for b in ("place", "red", "blue") if "place" in (a, b)}


@pytest.mark.parametrize("behaviour", ALL_SKILLS)
def test_no_skill_is_done_on_the_way_of_another(behaviour):
    """A model that has collapsed onto one skill fails at all others; otherwise forgetting could not be seen."""
    for skill in ALL_SKILLS:
        old = behaviour in (*SKILLS, NEW_SKILL) and skill in (*SKILLS, NEW_SKILL)
        rate = success_as(behaviour, skill, 100 if old else 40)
        if skill == behaviour:
            assert rate == 1
        elif (behaviour, skill) not in SAME_MOTION:
            assert rate <= 0.12, (behaviour, skill, rate)


@pytest.mark.parametrize("frames", [
    lambda: tabletop.retention_frames(200, 1000),
    lambda: tabletop.mixed_frames(200, tabletop.PROBE, 0.0, keep=0.3).samples(),
])
def test_few_frames_show_whole_episodes_not_their_beginnings(frames):
    actions = np.stack([sample.action for sample in frames()])
    assert (actions[:, 6] < 0.5).mean() > 0.35 and (actions[:, 2] > 0).mean() > 0.1


def test_an_action_that_is_not_finite_is_one_crash_and_no_abort(tmp_path):
    def broken(images, instructions):
        actions = np.tile([0, 0, 0, 0, 0, 0, 1.0], (len(images), 1))
        actions[[i for i, text in enumerate(instructions) if "side" in text]] = np.nan
        return actions

    with Records(tmp_path / "r.jsonl", {}) as records:
        run_skill_episodes(broken, ["pick", "side"], 4, 0, 8, records)
        summary = summarise(records.rows())
    assert summary[("skill", "side")]["crashes"] == 4 and summary[("skill", "pick")] == {**summary[("skill", "pick")], "n": 4, "crashes": 0}


def test_the_random_policy_does_not_depend_on_the_batch(tmp_path):
    def rows(parallel):
        with Records(tmp_path / f"{parallel}.jsonl", {}) as records:
            run_skill_episodes(random_policy(1), ["side", "reach"], 10, 0, parallel, records)
            return records.rows()
    assert rows(3) == rows(20)


def test_the_largest_seed_stays_in_its_range():
    last = tabletop.SEEDS - 1
    assert last * 10**8 + 2 * 10**9 < tabletop.RANGE and last * 10**7 + 10**7 <= tabletop.RANGE
