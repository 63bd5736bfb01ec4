"""The pages of vlakeep.protect: their examples run, their patches fit their own line counts, and what they name exists."""

import re
from pathlib import Path

import pytest
import torch
from test_protect import HELD, NEW, OLD, base_model, lora, optimizer_of

import vlakeep.protect

REPO = Path(__file__).resolve().parents[1]
PAGES = REPO / "docs" / "library"


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (PAGES / page).read_text(), re.M | re.S)


@pytest.mark.parametrize("page, number", [("index.md", 0), ("index.md", 1), ("index.md", 2), ("trainers.md", 0), ("trainers.md", 1)])
def test_examples_run(page, number, tmp_path, monkeypatch, capsys):
    from transformers import TrainingArguments

    monkeypatch.chdir(tmp_path)
    model = lora()
    given = {name: getattr(vlakeep.protect, name) for name in ("Bases", "Probe", "measure", "protect")}
    given.update(torch=torch, base=base_model(), model=model, old=OLD, held_out=HELD, loader=NEW, optimizer=optimizer_of(model))
    given["data"] = [{name: value[0] for name, value in batch.items()} for batch in NEW]
    given["args"] = TrainingArguments(output_dir="out", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    if (page, number) == ("index.md", 2):
        given["bases"] = vlakeep.protect.measure(model, OLD)
    exec(compile(blocks(page)[number], page, "exec"), given)
    if (page, number) in (("index.md", 0), ("index.md", 2), ("trainers.md", 0)):
        assert list(tmp_path.glob("adapter*/adapter_model.safetensors"))
    if number == 1 and page == "index.md":
        given["probe"].prepare(model)
        assert given["probe"].measure(model) == 0.0
    assert len(blocks("index.md")) == 3 and len(blocks("trainers.md")) == 2
    assert len([line for line in blocks("index.md")[0].splitlines() if line.strip()]) <= 20, "the loop is promised in twenty lines"


def test_every_public_name_has_its_reference():
    documented = set(re.findall(r"^::: vlakeep\.protection\.\w+\.(\w+)$", "\n".join(p.read_text() for p in PAGES.rglob("*.md")), re.M))
    assert documented == set(vlakeep.protect.__all__)
    for name in documented:
        assert getattr(vlakeep.protect, name).__doc__


def test_patches_add_lines_and_hold_no_others():
    table = (PAGES / "trainers.md").read_text()
    for path in sorted((REPO / "examples" / "patches").glob("*.diff")):
        added, at = 0, []
        head, *parts = re.split(r"^@@ -(\d+),0 \+(\d+)(?:,(\d+))? @@\n", path.read_text(), flags=re.M)
        assert len(head.splitlines()) == 2 and len(parts) in (16, 20)  # four parts a hunk
        for old, new, count, body in zip(*[iter(parts)] * 4):
            lines = body.splitlines()
            assert all(line.startswith("+") for line in lines) and len(lines) == int(count or 1) and int(new) == int(old) + added + 1
            added, at = added + len(lines), [*at, old]
        row = next(line for line in table.splitlines() if path.name in line)
        assert f"| {added} |" in row and all(re.search(rf"\b{old}\b", row) for old in at)


def test_pins_of_the_pages_are_within_the_bounds_of_the_extra():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    extra = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    pins = dict(line.split("==") for line in (REPO / "constraints-docs.txt").read_text().splitlines() if "==" in line)
    for one in extra:
        name, low = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", one).groups()
        pin = [int(part) for part in pins[next(key for key in pins if key.split("[")[0] == name)].split(".")]
        assert [int(part) for part in low.split(".")] <= pin
