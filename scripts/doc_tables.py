"""Tables of the documents that follow from code and records: the file map, the rooms, the stages, results of the demo and of studies.

    python scripts/doc_tables.py                    # writes those that are stale
    python scripts/doc_tables.py --check            # names them; exit status 1 when there are any
    python scripts/doc_tables.py --demo FOLDER      # takes the report of `vlakeep demo` (ROOT/report/demo) into docs/img first

Words stand where they belong: a file's in the first line of its docstring, a stage's in its help text, a room's here, since its
__init__.py is empty. tests/test_docs.py says when a table is stale.
"""

import argparse
import ast
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Callable, Dict, List

REPO = Path(__file__).resolve().parents[1]
sys.path.append(str(REPO / "scripts"))  # where this is loaded by its path
PACKAGE = REPO / "vlakeep"
RESULTS = REPO / "docs" / "img" / "demo.json"  # summary.json of the report whose figure is demo.png

# In the order of the layers: each room imports only from those above it.
ROOMS = {
    "core": ("configuration, storage root, run folders, checkpoints, processes, registries",
             "配置、存储根目录、运行目录、检查点、多进程、注册表"),
    "data": ("demonstrations of every format as samples: readers, statistics, augmentation, a resumable order",
             "各种格式的示范数据变成样本：读取、统计量、增强、可续训的顺序"),
    "probe": ("what shall be kept: sets of prompts with pictures, instruction masks, pooling",
              "要保住的内容：带图像的提示词集、指令掩码、池化"),
    "models": ("what is asked of any model: loading by kind, LoRA adapters, merging, alarms",
               "对任何模型的要求：按种类加载、LoRA 适配器、合并、警报"),
    "openvla": ("OpenVLA in PyTorch; the official checkpoint format in and out",
                "OpenVLA 的 PyTorch 实现；读写官方检查点格式"),
    "pi0_fast": ("pi0-FAST in PyTorch: several cameras, state as text, chunks as FAST tokens; lerobot's format in and out",
                 "pi0-FAST 的 PyTorch 实现：多相机、文本状态、FAST 动作块；读写 lerobot 格式"),
    "teacher": ("what is known of the frozen base: spectra, subspaces, answers, and the artefacts that hold them",
                "对冻结基座的了解：谱、子空间、回答，以及保存它们的产物"),
    "hsw": ("gradient surgery: the transform, and the two places where it acts",
            "梯度手术：变换本身，以及它作用的两个位置"),
    "thermostat": ("the control loop: sensors of drift and divergence, control laws",
                   "控制回路：漂移与散度的传感器、控制律"),
    "protection": ("gains and loop for PEFT models in other people's training loops",
                   "用于他人训练循环中 PEFT 模型的增益与控制回路"),
    "methods": ("the arms, one file each",
                "各实验臂，每个一个文件"),
    "benchmarks": ("trial records with intervals, and what all benchmarks share",
                   "带区间的试验记录，以及各基准共用的部分"),
    "planning": ("memory and time of every stage before it runs, and how to make it fit a card",
                 "在运行之前预测各阶段的显存与时间，以及如何放进一张卡"),
    "language": ("questions about texts: what a model still knows as a language model",
                 "关于文本的问题：模型作为语言模型还保留了什么"),
    "tabletop": ("the simulated table: world, camera, expert, questions, and its stages",
                 "仿真桌面：世界、相机、专家、问题，以及它的各阶段"),
    "libero": ("LIBERO: simulator, expert, questions, and its stages",
               "LIBERO：仿真器、专家、问题，以及它的各阶段"),
    "parity": ("comparison with the official code and with numbers recorded from it",
               "与官方代码及其记录数值的比较"),
    "reporting": ("comparison of arms: statistics, tables, figures, the page",
                  "各臂的比较：统计、表格、图、网页"),
    "studies": ("what a study shows: records of its cells, the rule, statistics, tables",
                "一项研究说明了什么：各单元的记录、规则、统计、表格"),
}
ARMS = {
    "base": ("base (before training)",
             "基座（训练前）"),
    "baseline": ("plain LoRA",
                 "普通 LoRA"),
    "method": ("authors' form (residual)",
               "作者的形式（残差流）"),
    "graded": ("**graded gains, set-point .002**",
               "**逐方向增益，设定点 .002**"),
}
FOLDERS = {"scripts": "Run scripts with `--gpus`, and helpers.", "speed": "Timing; each prints the floor beside its figure.",
           "studies": "Experiments over arms, seeds and skills."}
LANGUAGES = {"README.md": 0, "README.zh-CN.md": 1}


def first_line(path: Path) -> str:
    """What a source says it is: the first line of its docstring, or of a shell script's comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return next(line[1:].strip() for line in text.splitlines() if line.startswith("#") and not line.startswith("#!"))
    said = ast.get_docstring(ast.parse(text))
    if not said:
        raise ValueError(f"{path.relative_to(REPO)} has no docstring: its first line stands in docs/file-map.md")
    return said.splitlines()[0]


def table(head: List[str], rows: List[List[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def sources(folder: Path) -> List[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".py", ".sh") and path.name != "__init__.py")


def listed(files: List[Path]) -> str:
    """Name and first line of each file; angle brackets outside of code would be taken for HTML."""
    parts = [first_line(path).replace("|", "\\|").split("`") for path in files]
    words = ["`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(line)) for line in parts]
    return table(["file", "what it is"], [[f"`{path.name}`", said] for path, said in zip(files, words)])


def file_map() -> str:
    parts = ["# File map",
             "Written by `python scripts/doc_tables.py` from the first line of every file. Rooms stand in the order of their layers: each "
             "imports only from those above it ([the picture](OVERVIEW.md#the-rooms)).",
             "## vlakeep/ (stages)", listed(sources(PACKAGE))]
    for room, (said, _) in ROOMS.items():
        parts += [f"## vlakeep/{room}/", said[0].upper() + said[1:] + ".", listed(sources(PACKAGE / room))]
    for folder, said in FOLDERS.items():
        parts += [f"## {folder}/", said, listed(sources(REPO / folder))]
    return "\n\n".join(parts) + "\n"


def rooms(language: int) -> str:
    head = [["room", "what it holds"], ["模块", "内容"]][language]
    return table(head, [[f"`{room}/`", said[language]] for room, said in ROOMS.items()])


def stages() -> str:
    from vlakeep.cli import STAGES

    return table(["stage", "what it does", "where"],
                 [[f"`vlakeep {name}`", stage.help, f"`{stage.module.replace('vlakeep.', '', 1).replace('.', '/')}.py`"]
                  for name, stage in STAGES.items()])


def demo_table(language: int, results: dict) -> str:
    """The arms of the demo's report; rates with their intervals as the report has them."""
    from vlakeep.tabletop.questions import QUESTION_KINDS

    def rate(value: dict) -> str:
        return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"

    def mean(values: List[dict]) -> str:
        return f"{sum(value['mean'] for value in values) / len(values):.3f}"

    rows = []
    for arm, names in ARMS.items():
        found = results["arms"][arm]
        old = {name: value for name, value in found["abilities"].items() if name not in QUESTION_KINDS}
        asked = [value for name, value in found["abilities"].items() if name in QUESTION_KINDS]
        if len(old) != 6 or len(asked) != len(QUESTION_KINDS):
            raise ValueError(f"{RESULTS.name}: arm {arm} has {len(old)} old skills and {len(asked)} kinds of questions: not a whole demo")
        rows.append([names[language], rate(found["new_skill"]), mean(list(old.values())), rate(old["pick"]), rate(old["place"]),
                     mean(asked)])
    head = [["arm", "new skill (corner)", "six old skills, mean", "pick", "place", "six question kinds, mean"],
            ["实验臂", "新技能（corner）", "六项旧技能均值", "pick", "place", "六类问题均值"]][language]
    return table(head, rows)


def filled(text: str, name: str, content: str) -> str:
    """`text` with what stands between <!-- name --> and <!-- /name --> replaced. ValueError when it has no such place."""
    new, count = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda found: f"{found[1]}{content}\n{found[2]}", text, flags=re.S)
    if count != 1:
        raise ValueError(f"{count} places <!-- {name} --> ... <!-- /{name} -->, there must be one")
    return new


def documents() -> Dict[Path, str]:
    """Every document with such tables, as it should be."""
    import fail_tables  # these two import vlakeep, from the checkout
    import result_tables

    found = {REPO / "docs" / "file-map.md": file_map()}
    for document, tables in (("results.md", result_tables.all_tables()), ("where-it-fails.md", fail_tables.all_tables()),
                             ("libero.md", {"midsize": result_tables.midsize().rstrip("\n")})):
        page = REPO / "docs" / document
        found[page] = page.read_text(encoding="utf-8")
        for name, content in tables.items():
            found[page] = filled(found[page], name, content)
    overview = REPO / "docs" / "OVERVIEW.md"
    found[overview] = filled(overview.read_text(encoding="utf-8"), "stages", stages())
    for name, language in LANGUAGES.items():
        text = filled((REPO / name).read_text(encoding="utf-8"), "rooms", rooms(language))
        if RESULTS.is_file():
            text = filled(text, "demo-table", demo_table(language, json.loads(RESULTS.read_text(encoding="utf-8"))))
        found[REPO / name] = text
    return found


def stale(make: Callable[[], Dict[Path, str]] = documents) -> Dict[Path, str]:
    """Those that are not as they should be."""
    return {path: text for path, text in make().items() if not path.is_file() or path.read_text(encoding="utf-8") != text}


def main(argv: List[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--demo", type=Path)
    args = parser.parse_args(argv)
    if args.demo:
        shutil.copyfile(args.demo / "summary.json", RESULTS)
        shutil.copyfile(args.demo / "figures" / "success_retention.png", RESULTS.with_suffix(".png"))
    found = stale()
    for path, text in found.items():
        print(f"{path.relative_to(REPO)} {'is stale: python scripts/doc_tables.py' if args.check else 'written'}")
        if not args.check:
            path.write_text(text, encoding="utf-8")
    return int(bool(found) and args.check)


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))  # the checkout that the script lies in, not an installed one
    sys.exit(main(sys.argv[1:]))
