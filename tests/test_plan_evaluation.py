"""What `vlakeep plan` says of an evaluation: how much of it there is, on how many cards, with and without a CUDA graph."""

from pathlib import Path

import pytest
from test_plan import DATA, FROZEN, GRADED, NOWHERE, configuration

from vlakeep import plan
from vlakeep.benchmarks import amount, open_loop
from vlakeep.benchmarks.questions import ANSWER_TOKENS, KL_BATCH, QUESTION_BATCH, together
from vlakeep.core.hardware import CARDS, GIB, SLACK
from vlakeep.core.registry import benchmark_class
from vlakeep.language.items import PACKAGED
from vlakeep.libero import evaluation as libero
from vlakeep.libero.env import MAX_STEPS, TASKS
from vlakeep.libero.questions import questions
from vlakeep.libero.view import View
from vlakeep.planning.evaluation import Evaluation
from vlakeep.planning.predict import Planner, find_model
from vlakeep.tabletop import skills

H100, H200 = CARDS["h100"], CARDS["h200"]
SPATIAL = ["--evaluate.benchmark", "libero_spatial"]
MANY = [*SPATIAL, "--evaluate.workers", 8]
# speed/seven_b.py --stages generate, LoRA on the last eight layers: card, rows, as one CUDA graph, seconds of seven tokens (docs/log.md).
ANSWERS = [("h200", 1, True, 0.065), ("h200", 8, True, 0.140), ("h200", 1, False, 0.478), ("h200", 8, False, 0.446),
           ("h100", 1, False, 0.34), ("h100", 32, False, 0.61)]


@pytest.fixture(scope="module")
def seven_b():
    return find_model(configuration(FROZEN), NOWHERE)


@pytest.fixture
def evaluation(seven_b):
    def made(*options, card=H100, gpus=1, file=GRADED, model=None):
        return Evaluation(Planner(configuration(file, *DATA, *options), model or seven_b, card, gpus))
    return made


def episodes(evaluation):
    """Seconds of what is played."""
    return sum(play.seconds(evaluation.answer(play), evaluation.chunk) for play in evaluation.amount.plays)


@pytest.mark.parametrize("card, rows, graph, seconds", ANSWERS)
def test_an_answer_takes_what_was_measured_within_a_fifth(evaluation, card, rows, graph, seconds):
    assert evaluation(card=CARDS[card]).answered(rows, 7, graphed=graph) == pytest.approx(seconds, rel=0.2)


def test_a_further_token_of_a_graph_takes_what_was_measured(evaluation):
    one = evaluation(card=H200)
    assert (one.answered(1, 7, graphed=True) - one.answered(1, 1, graphed=True)) / 6 == pytest.approx(0.0078, rel=0.2)


def test_a_graph_keeps_what_an_answer_takes_as_far_as_it_was_seen(evaluation):
    """Under a limit of 22.5 GiB two graphs and a plain answer of 8 rows ran, of 16 rows they did not fit (docs/log.md, 2026-11-28)."""
    def three(rows):
        found = evaluation(*MANY, "--evaluate.batch", rows).plan()
        own = found.memory["the graph's own memory"]
        return (found.memory["weights"] + found.memory["adapters"] + 3 * own) / GIB

    assert three(8) < 22.5 < three(16)
    without = evaluation(*MANY, "--evaluate.cuda_graph", "false").plan()
    whole = without.memory["keys and values"] + without.memory["a layer"]
    assert evaluation(*MANY).plan().memory["the graph's own memory"] == pytest.approx((1 + SLACK) * whole + 64 * 2**20)


def test_twice_the_tasks_or_episodes_take_twice_the_time(evaluation):
    one, two = (evaluation(*MANY, "--evaluate.skills", tasks) for tasks in ("[0, 1]", "[0, 1, 2, 3]"))
    assert episodes(two) == pytest.approx(2 * episodes(one)) and episodes(one) > 0
    more = evaluation(*MANY, "--evaluate.skills", "[0, 1]", "--evaluate.episodes", 100)
    assert episodes(more) == pytest.approx(2 * episodes(one))
    assert episodes(evaluation(*MANY)) == pytest.approx(5 * episodes(one)), "all ten tasks where none is named"
    assert two.plan().seconds - one.plan().seconds == pytest.approx(episodes(one))


def test_cards_divide_the_episodes(evaluation):
    one, two = (evaluation(*MANY, gpus=gpus) for gpus in (1, 2))
    assert episodes(two) == pytest.approx(episodes(one) / 2)
    assert any("250 episodes on each of 2 GPUs" in note for note in two.plan().notes)
    assert two.drift() == pytest.approx(one.drift() / 2)
    asked = [*MANY, "--evaluate.probe", "p"]
    alone, shared = (evaluation(*asked, gpus=gpus).asked() for gpus in (1, 2))
    assert [b[2] for b in shared] == pytest.approx([a[2] / 2 for a in alone], rel=0.15), "whole batches are dealt"


def test_a_benchmark_that_one_process_plays_is_not_divided(evaluation, monkeypatch):
    one = evaluation(*MANY)
    monkeypatch.setattr(benchmark_class("libero_spatial"), "divides", False)
    assert episodes(evaluation(*MANY, gpus=8)) == episodes(one)


def test_without_a_graph_an_answer_costs_more(evaluation):
    graph, without = (evaluation(*MANY, "--evaluate.cuda_graph", on) for on in ("true", "false"))
    assert episodes(without) > 2 * episodes(graph)
    assert any("as one CUDA graph" in note for note in graph.plan().notes)
    assert not any("CUDA graph" in note for note in without.plan().notes)
    cpu = CARDS["h100"]._replace(device="cpu")
    assert not evaluation(*MANY, card=cpu).graphed(graph.amount.plays[0])


def test_four_bits_are_unpacked_in_every_pass_of_an_answer(evaluation):
    whole, packed = (evaluation(*MANY, "--backbone.quantisation", kind) for kind in ("none", "nf4"))
    unpacking = H100.seconds(packed.unpacked, graphed=True)
    assert whole.unpacked.stream == 0 and packed.answered(4, 7, graphed=True) == pytest.approx(
        whole.answered(4, 7, graphed=True) + 7 * unpacking)
    assert packed.drift() > whole.drift() and packed.text(16) > whole.text(16)


def test_a_model_that_waits_for_the_device_has_no_graph_and_looks_once_a_chunk(evaluation):
    file = "pi0_fast_libero_graded"
    model = find_model(configuration(file, *DATA), NOWHERE)
    assert model.work.chunk == 50

    def made(*options):
        return evaluation(*MANY, *options, file=file, model=model)

    whole, tenth = made(), made("--evaluate.chunk", 5)
    play = whole.amount.plays[0]
    assert not whole.graphed(play) and whole.chunk == 50 and tenth.chunk == 5
    answer = whole.answer(play)
    assert episodes(whole) == pytest.approx(max(play.calls / 50 * answer, play.simulated + play.alone / 50 * answer))
    assert episodes(tenth) > 2 * episodes(whole)


def test_other_suites_questions_frames_and_texts_count(evaluation):
    one = evaluation(*MANY)
    other = evaluation(*MANY, "--evaluate.other_suites", "[libero_object, libero_90]")
    share = (10 * MAX_STEPS["libero_object"] + 90 * MAX_STEPS["libero_90"]) / (10 * MAX_STEPS["libero_spatial"])
    assert episodes(other) == pytest.approx((1 + share) * episodes(one), rel=0.02)
    chosen = evaluation(*MANY, "--evaluate.other_suites", "[libero_object]", "--evaluate.skills", "[0]").amount.plays
    assert [play.episodes for play in chosen] == [50, 500], "skills are the benchmark's alone"
    assert one.asked() == []
    asked = evaluation(*MANY, "--evaluate.probe", "p", "--evaluate.language", "true", "--evaluate.questions_per_kind", 60,
                       "--evaluate.retention_frames", 70, "--evaluate.texts", Path(__file__).parent / "texts")
    assert [(what, count) for what, count, _, _ in asked.asked()] == [
        ("questions", 60 * libero.KINDS), ("frames for the KL from the base", 70), ("texts", 60 * 2)]
    assert asked.plan().seconds == pytest.approx(one.plan().seconds + sum(seconds for _, _, seconds, _ in asked.asked()))
    two = evaluation(*MANY, "--evaluate.probe", "p", "--evaluate.questions", "[left, on]").amount
    assert two.questions == [100, 100]


def test_controls_take_what_they_do(evaluation):
    blank = evaluation(*MANY, "--evaluate.blank", "true", "--evaluate.probe", "p", "--evaluate.language", "true")
    assert blank.asked() == [] and episodes(blank) == episodes(evaluation(*MANY))
    replay = evaluation(*MANY, "--evaluate.target", "replay", "--evaluate.other_suites", "[libero_goal]").plan()
    play = evaluation(*MANY).amount.plays[0]
    assert replay.seconds == pytest.approx(play.simulated) and replay.reserved == 0
    # 100 episodes of libero_object with eight workers took 69 s, .49 of the limits; the plan assumes .625 (docs/evidence.md).
    ten = evaluation("--evaluate.benchmark", "libero_object", "--evaluate.workers", 8, "--evaluate.episodes", 10,
                     "--evaluate.target", "replay")
    assert ten.plan().seconds * 0.49 / amount.SHARE == pytest.approx(69, rel=0.2)


def test_simulators_go_on_beside_the_policy(evaluation):
    """One worker waits for every answer; of many, half simulate while the others are answered."""
    one, two, eight, many = (evaluation(*SPATIAL, "--evaluate.workers", workers).amount.plays[0] for workers in (1, 2, 8, 64))
    assert one.steps == 500 * 220 * amount.SHARE == one.calls == one.alone
    assert one.seconds(0.1, 1) == pytest.approx(one.simulated + 0.1 * one.steps)
    assert two.calls == one.calls and two.alone == one.calls / 2 and two.simulated == pytest.approx(one.simulated / 2)
    assert (eight.calls, eight.alone) == (one.calls / 4, one.calls / 8)
    assert many.calls == eight.calls, "more workers than rows bring no larger batch"
    assert eight.seconds(10.0, 1) == eight.calls * 10 and eight.seconds(0.0, 1) == eight.simulated
    software = benchmark_class("libero_spatial").amount(configuration(GRADED, *SPATIAL), gpu=False).plays[0]
    assert software.simulated > 2 * one.simulated and "in software" in software.simulator
    few = evaluation(*SPATIAL, "--evaluate.skills", "[0]", "--evaluate.episodes", 3, "--evaluate.workers", 8).amount.plays[0]
    assert "3 simulators" in few.simulator


def test_tables_go_on_until_the_last_one_fails(evaluation):
    own = ["--evaluate.benchmark", "tabletop", "--evaluate.parallel", 100, "--evaluate.episodes", 50]
    known, new = evaluation(*own).amount.plays
    assert known.episodes == 50 * len(skills.SKILLS) and new.episodes == 50
    assert known.calls == 3 * max(skills.MAX_STEPS[skill] for skill in skills.SKILLS) and known.most == 100 and new.most == 50
    assert known.rows * known.calls == pytest.approx(known.steps)
    found = evaluation(*own, "--evaluate.questions_per_kind", 7, "--evaluate.skills", "[reach, blue, red]").amount
    assert [play.name for play in found.plays] == ["reach, red", "blue"] and set(found.questions) == {7} and found.retention == [200]
    assert evaluation(*own).plan().memory["keys and values"] == evaluation(*own).answered_in(100)["keys and values"]
    assert not any("CUDA graph" in note for note in evaluation(*own).plan().notes), "tables leave the batch"


def test_frames_of_a_data_set_and_texts_are_benchmarks_of_their_own(evaluation):
    own = ["--evaluate.benchmark", "dataset", "--evaluate.episodes", 20]
    one, two = evaluation(*own), evaluation(*own, "--data.datasets", "[a, b]")
    play = one.amount.plays[0]
    assert play.episodes == 20 and play.calls == 20 and play.most == amount.FRAMES
    assert episodes(two) == pytest.approx(2 * episodes(one))
    assert one.amount.retention == [10] * 20 == [open_loop.looked_at(one.config.evaluate)] * 20
    small = evaluation(*own, "--evaluate.parallel", 40)
    assert small.amount.plays[0].calls == 20 * 4 and small.plan().reserved < one.plan().reserved
    language = ["--evaluate.benchmark", "language", "--evaluate.questions_per_kind", 160]
    texts = evaluation(*language)
    assert texts.amount.plays == [] and texts.amount.texts == [160] * len(PACKAGED)
    few = evaluation(*language, "--evaluate.questions", "[sciq]")
    assert texts.asked()[0][2] == pytest.approx(len(PACKAGED) * few.asked()[0][2]) and few.asked()[0][2] > 0
    assert any("480 texts" in note for note in texts.plan().notes)


def test_a_benchmark_that_says_nothing_is_counted_with_300_steps_an_episode(seven_b):
    from vlakeep.benchmarks.base import Benchmark

    found = Benchmark.amount(configuration(GRADED, *SPATIAL, "--evaluate.skills", "[0, 1]"), 2)
    play, = found.plays
    assert (play.episodes, play.steps) == (50, 50 * 300) and "300 each" in play.said and found.questions == []


def test_a_large_model_is_asked_fewer_questions_together(evaluation, seven_b):
    """250 and 100 prompts of a 7B model took 40 and 16 GiB of keys and values: no card of 24 GB holds them beside the weights."""
    work = seven_b.work
    assert together(QUESTION_BATCH, 6, 256) == QUESTION_BATCH and together(KL_BATCH, work.layers, work.width) == 24
    assert together(10, work.layers, work.width) == 10 and together(5, 1000, 10**6) == 1
    found = evaluation(*MANY, "--evaluate.probe", "p", "--evaluate.batch", 8).plan()
    assert found.memory["questions"] == sum(evaluation().answered_in(24).values()) and found.reserved < 22.5 * GIB
    assert ANSWER_TOKENS < seven_b.work.answer


def test_the_constants_of_libero_are_those_of_its_rooms():
    assert set(TASKS) == set(MAX_STEPS) and TASKS["libero_90"] == 90 and TASKS["libero_10"] == 10
    assert len(questions(View([], frozenset(), frozenset(), "table", {}, {}, {}, {}))) == libero.KINDS


def test_the_command_says_what_it_assumes(capsys, tmp_path):
    assert plan.main(["--config", GRADED, "--hardware", "h100", "--root", str(tmp_path), "--evaluate.workers", "8", "--gpus", "2"]) == 0
    said = capsys.readouterr().out
    for words in ("libero_spatial, 10 tasks: 250 episodes on each of 2 GPUs, 34,375 steps", "0.625 of the limit each", "one in four fails",
                  "a call of 4 rows as one CUDA graph", "8 simulators with a core each, 38 ms a step", "the drift, 500 items"):
        assert words in said, words
