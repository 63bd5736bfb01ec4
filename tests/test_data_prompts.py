"""Text and labels: what the official whole-text tokenisation gives, and what evaluation shows the model."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlakeep.data.sample import IGNORE_INDEX, Row, Sample
from vlakeep.openvla import prompts
from vlakeep.openvla.processor import Processor
from vlakeep.openvla.tiny import build_tiny_tokenizer

TEXTS = ["In: What action should the robot take to push the red block to the corner?\nOut:",
         "pick up the black bowl, State: 12 34;", "In: what color is the left block?\nOut:",
         "yes no red green blue corner Open The Top Drawer turn on stove"]
IMAGE = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
ACTION = np.array([0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 1.0], dtype=np.float32)


@pytest.fixture(scope="session")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tiny_tokenizer(TEXTS, ["reach"], folder, 1024)
    return Processor.from_folder(folder)


def test_action_sample_equals_tokenising_the_whole_text(processor):
    """RLDSBatchTransform writes the action ids as characters and tokenises everything at once."""
    sample = Sample(IMAGE, "Push the RED block", ACTION)
    got = prompts.encode(sample, processor)
    characters = processor.tokenizer.decode(processor.action_tokenizer.encode(ACTION))
    text = f"In: What action should the robot take to push the red block?\nOut: {characters}</s>"
    assert got["input_ids"].tolist() == processor.tokenizer(text)["input_ids"]
    assert got["labels"][:-8].eq(IGNORE_INDEX).all() and torch.equal(got["labels"][-8:], got["input_ids"][-8:])
    assert got["labels"][-1] == processor.tokenizer.eos_token_id
    assert torch.equal(got["pixel_values"], processor.image_processor([IMAGE])[0])


def test_question_sample_equals_tokenising_the_whole_text(processor):
    sample = Sample(IMAGE, " what color is the left block? ", answer="red", question=True)
    ids, labels = prompts.encode_text(sample, processor)
    assert ids == processor.tokenizer("In: what color is the left block?\nOut: red</s>")["input_ids"]
    assert processor.tokenizer.decode([i for i in labels if i != IGNORE_INDEX]) == "red</s>"


@pytest.mark.parametrize("sample", [
    Sample(IMAGE, "push the red block", ACTION), Sample(IMAGE, "", ACTION), Sample(IMAGE, "Überprüfe 42 –", ACTION),
    Sample(IMAGE, "what color is the left block?", answer="yes no", question=True)])
def test_training_continues_the_evaluated_prompt(processor, sample):
    """The first labelled position follows exactly the ids that encode_prompts shows."""
    ids, labels = prompts.encode_text(sample, processor)
    prompt = prompts.encode_prompts([sample], processor)
    assert prompt.input_ids[0].tolist() == ids[:labels.count(IGNORE_INDEX)]
    assert prompt.labels.eq(IGNORE_INDEX).all()
    assert (prompt.input_ids[0, -1] == processor.empty_token_id) == (not sample.question)


def test_image_tag_is_deleted_in_training_only(processor):
    sample = Sample(IMAGE, "look at <image> the block", ACTION)
    assert prompts.training_text(sample) == "In: What action should the robot take to look at  the block?\nOut:"
    assert "<image>" in prompts.prompt_text(sample)


def test_batch_equals_collated_samples_and_pads_right(processor):
    samples = [Sample(IMAGE, "push the red block to the corner", ACTION, dataset="a"),
               Sample(IMAGE[::-1].copy(), "reach", -ACTION, dataset="b")]
    one = prompts.collate([prompts.encode(s, processor) for s in samples], processor.pad_token_id)
    two = prompts.encode_batch(samples, processor)
    for name in ("input_ids", "attention_mask", "labels", "pixel_values"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert one.dataset_names == two.dataset_names == ["a", "b"] and two.size == 2
    assert torch.equal(two.attention_mask, two.input_ids != processor.pad_token_id)
    assert two.input_ids.dtype == two.labels.dtype == torch.int64 and two.attention_mask.dtype == torch.bool
    assert (two.labels[1, two.attention_mask[1].sum():] == IGNORE_INDEX).all()


@pytest.mark.parametrize("sample,match", [
    (Sample(IMAGE, "x"), "no action"), (Sample(IMAGE, "x", question=True), "no answer"),
    (Sample(IMAGE, "x", np.array([0, np.nan] + [0] * 5, dtype=np.float32)), "not finite"),
    (Sample(IMAGE, "red " * 3000, ACTION), "longer than the model"),
])
def test_samples_that_cannot_be_learned_are_refused(processor, sample, match):
    with pytest.raises(ValueError, match=match):
        prompts.encode_batch([sample], processor)


@pytest.mark.parametrize("text,inside", [
    (prompts.action_prompt("push it to the ?\nOut: corner"), "push it to the ?\nout: corner"), (prompts.action_prompt(""), ""),
    (prompts.question_prompt("what is left?"), "what is left?"), ("Task: pick up, now, State: 12 34;\nAction:", "pick up, now"),
])
def test_instruction_span(text, inside):
    start, end = prompts.instruction_span(text)
    assert text[start:end] == inside
    with pytest.raises(ValueError, match="template"):
        prompts.instruction_span("USER: " + text)


def test_row_with_nan_fails():
    assert Row("x", 0.1, 0.1).ok and not Row("x", float("nan"), 1.0).ok


@pytest.mark.skipif("VLAKEEP_GOLDEN" not in os.environ, reason="VLAKEEP_GOLDEN names no folder with the golden data")
def test_golden_text():
    """Prompts, ids, labels and the collated batch of the official code."""
    folder = Path(os.environ["VLAKEEP_GOLDEN"]) / "text"
    official = json.loads((folder / "text_golden.json").read_text())["llama2"]
    for prompt in official["prompts"]:
        assert prompts.action_prompt(prompt["instruction"]) == prompt["eval_prompt"]
        assert prompts.training_text(Sample(IMAGE, prompt["instruction"])) == prompt["get_prompt_human_only"]

    class Recorded:  # the recorded prompt ids stand in for the tokenizer, whose file the golden data leave out
        eos_token_id = official["eos"]

        def __call__(self, text, add_special_tokens):
            return {"input_ids": {p["eval_prompt"]: p["eval_input_ids"] for p in official["prompts"]}[text]}

    from vlakeep.openvla.action_tokenizer import ActionTokenizer
    recorded = SimpleNamespace(tokenizer=Recorded(), empty_token_id=official["space_token_id"], pad_token_id=official["pad_id"],
                               action_tokenizer=ActionTokenizer(official["vocab_size"]),
                               image_processor=lambda images: torch.zeros(len(images), 6, 2, 2))
    rows = []
    for item in official["batch_transform"]:
        action = np.array([float(x) for x in official["actions"][item["action"] + "/float32"]["action"]], dtype=np.float32)
        rows.append(prompts.encode(Sample(IMAGE, item["instruction"], action), recorded))
        assert rows[-1]["input_ids"].tolist() == item["input_ids"] and rows[-1]["labels"].tolist() == item["labels"]
    batch = prompts.collate(rows, official["pad_id"])
    for name in ("input_ids", "attention_mask", "labels"):
        assert getattr(batch, name).tolist() == official["collated"][name]


