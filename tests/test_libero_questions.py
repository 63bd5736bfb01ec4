"""Visual questions about LIBERO scenes without a simulator: what is asked, colors, the choice of questions, guessing from the text."""

from collections import Counter

import numpy as np
import pytest

from vlakeep.libero.balance import Question, choose, measure
from vlakeep.libero.colors import color_of, lab
from vlakeep.libero.questions import questions
from vlakeep.libero.view import Thing, View, noun_of


def thing(name, x, depth, color=None):
    """Twenty pixels and 8 cm wide."""
    return Thing(name, noun_of(name), 300, x, 100.0, x - 10, x + 10, depth, depth - 0.04, depth + 0.04, color)


def view(things, apart=None, **other):
    empty = dict(hidden=frozenset(), held=frozenset(), ground="table", supports={}, inside={}, drawers={})
    places = {one.name: np.array([one.x / 300, one.depth]) for one in things}
    apart = {(a, b): (float(np.linalg.norm(p - q)), float(np.linalg.norm(p - q)) - 0.08)
             for a, p in places.items() for b, q in places.items() if a != b}
    return View(things, **{**empty, "apart": apart, **other})


MUG, BOWL, PLATE = thing("red_coffee_mug_1", 50, 1.0, "red"), thing("akita_black_bowl_1", 100, 1.06), thing("plate_1", 250, 1.3, "white")


def test_what_is_asked_about_a_scene():
    asked = questions(view([MUG, BOWL, PLATE], supports={"akita_black_bowl_1": "table"}, drawers={"top": 0.15, "middle": 0.05},
                           inside={"basket": ["akita_black_bowl_1"], "tray": [], "caddy": ["plate_1", "red_coffee_mug_1"]}))
    assert ("is the red mug left of the bowl?", "yes") in asked["left"] and len(asked["left"]) == 6
    assert ("is the plate in front of the bowl?", "no") in asked["front"]
    assert asked["on"] == [("what is the bowl on?", "table")] and asked["drawer"] == [("is the top drawer of the cabinet open?", "yes")]
    assert asked["in"] == [("what is in the basket?", "bowl"), ("what is in the tray?", "nothing")]
    assert asked["nearest"] == [("which thing is nearest to the red mug?", "bowl"), ("which thing is nearest to the bowl?", "red mug"),
                                ("which thing is nearest to the plate?", "bowl")]
    assert ("what is furthest to the left on the table?", "red mug") in asked["kind"]
    assert ("what color is the thing furthest to the right on the table?", "white") in asked["color"]
    assert ("what color is the mug?", "red") in asked["color"]
    assert {("is there a mug?", "yes"), ("is there an orange juice?", "no")} <= set(asked["exists"])
    assert {("how many mugs are there?", "one"), ("how many cookie boxes are there?", "zero")} <= set(asked["count"])


def test_nothing_is_asked_where_the_picture_leaves_doubt():
    asked = questions(view([MUG, BOWL, PLATE], hidden=frozenset({"butter", "plate"}), held=frozenset({"red_coffee_mug_1"})))
    texts = {text for pairs in asked.values() for text, _ in pairs}
    assert not [text for text in texts if "butter" in text or "plates" in text or "the plate" in text]
    assert "is the red mug left of the bowl?" in texts and "is the red mug in front of the bowl?" not in texts
    assert not asked["nearest"] and not asked["kind"]
    close = questions(view([MUG, BOWL._replace(x=65.0, depth=1.03)]))
    assert not close["left"] and not close["front"]
    mugs = questions(view([thing("white_yellow_mug_1", 50, 1.0)]))
    assert "is there a white mug?" not in dict(mugs["exists"]) and dict(mugs["exists"])["is there a red mug?"] == "no"


def test_lab_is_that_of_the_standard():
    assert np.allclose(lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]])),
                       [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]], atol=0.1)


@pytest.mark.parametrize("rgb, word", [((150, 30, 30), "red"), ((235, 235, 230), "white"), ((6, 6, 6), "black"), ((60, 70, 130), "blue"),
                                       ((120, 95, 60), "brown"), ((110, 110, 110), None), ((180, 175, 170), None)])
def test_a_color_has_a_word_only_where_it_is_clear(rgb, word):
    assert color_of(*patch(rgb)) == word


def test_of_two_colors_neither_is_said_but_gray_takes_none_away():
    assert color_of(*patch((150, 30, 30), (60, 70, 130))) is None
    assert color_of(*patch((150, 30, 30), (110, 110, 110))) == "red"
    picture, mask = patch((150, 30, 30))
    assert color_of(picture, mask & (np.arange(20) < 6)) is None  # too few pixels


def patch(rgb, right=None):
    """(picture, mask) of a thing in one color, or in two halves."""
    picture, mask = np.zeros((20, 20, 3), np.uint8), np.zeros((20, 20), bool)
    picture[:], mask[2:18, 2:18] = rgb, True
    picture[:, 10:] = rgb if right is None else right
    return picture, mask


def pool(scenes=40, seed=0):
    """Scenes of four tasks; most answers follow from the text, as they do where tasks have a scene of their own."""
    rng, found = np.random.default_rng(seed), []
    for scene in range(scenes):
        for noun in ("cup", "plate", "ball"):
            found.append(Question(scene, "exists", f"is there a {noun}?", "yes" if rng.random() < 0.8 or noun == "ball" else "no"))
        found.append(Question(scene, "color", "what color is the cup?", rng.choice(["red", "red", "red", "blue", "green"])))
        found.append(Question(scene, "on", "what is the cup on?", "table"))
    return found


def test_questions_are_chosen_so_that_their_text_tells_no_answer():
    chosen = choose(pool(), 24, 1, 0)
    assert chosen == choose(pool(), 24, 1, 0) and len(chosen) == len(set(chosen)) == 24
    told = Counter((q.text, q.answer) for q in chosen)
    assert told["is there a cup?", "yes"] == told["is there a cup?", "no"] > 0 and not told["is there a ball?", "yes"]
    assert {q.kind for q in chosen} == {"exists", "color"}  # what the cup is on is always the same
    assert 2 * told["what color is the cup?", "red"] <= sum(n for (text, _), n in told.items() if "color" in text)
    assert max(Counter(q.scene for q in chosen).values()) == 1
    assert len(choose(pool(), 1000, 4, 0)) < 1000


def test_guessing_from_the_text_alone_is_measured():
    """Before the choice the text gives most answers away; afterwards it is worth nothing."""
    before, after = measure(pool(200)), measure(choose(pool(200), 100, 1, 0))
    assert before["on"]["text_only"] == before["on"]["majority"] == 1.0 and before["exists"]["text_only"] > 0.8
    assert after["exists"]["majority"] == after["exists"]["text_told"] == 0.5 and after["exists"]["text_only"] <= 0.6
    assert after["color"]["text_told"] <= 0.5 and after["all"]["n"] == len(choose(pool(200), 100, 1, 0))
    fair = [Question(i, "k", f"text {i % 2}", "ab"[i % 2]) for i in range(40)]
    assert measure(fair)["k"] == {"n": 40, "texts": 2, "answers": {"a": 20, "b": 20}, "majority": 0.5, "text_only": 1.0, "text_told": 1.0}
