"""Which keys of the configuration a stage reads: those that config_reads.py finds in the functions that its `main` comes to.

A function is come to when a function that is come to names it; a method, when its class is named and anything of its name is. What a
module gives to a registry (`METHOD = Class`, MODEL) is named by whoever asks a module that is imported by name for it; a BENCHMARK only
by whoever makes one, since configurations are checked with them all. What only checks values (config.py, ranges.py) reads nothing.
"""

import ast
from pathlib import Path
from typing import Dict, Iterator, List, Set

from config_reads import Reads
from test_layout import PACKAGE, SOURCES

from vlakeep.core.options import Stage

CHECKING = {"vlakeep.core.config", "vlakeep.core.ranges", "vlakeep.core.options"}


def module_name(path: Path) -> str:
    return ".".join(("vlakeep", *path.relative_to(PACKAGE).with_suffix("").parts))


class Calls:
    """The sources as a graph of functions and classes."""

    def __init__(self):
        self.trees = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
        self.defined: Dict[str, Dict[str, ast.AST]] = {}
        self.imported: Dict[str, Dict[str, str]] = {}
        self.given: Dict[str, Dict[str, str]] = {}  # module -> name that stands for another of its names
        self.module: Dict[ast.AST, str] = {}
        for name, tree in self.trees.items():
            self.defined[name] = {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
            self.given[name] = {n.targets[0].id: n.value.id for n in tree.body if isinstance(n, ast.Assign)
                                and isinstance(n.targets[0], ast.Name) and isinstance(n.value, ast.Name)}
            self.imported[name] = {}
            for node in ast.walk(tree):
                self.module[node] = name
                if isinstance(node, ast.ImportFrom):
                    self.imported[name].update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
        self.reads = Reads(self.trees.values())
        self._within: Dict[str, List[Set[ast.AST]]] = {}
        for key, nodes in [*self.reads.nodes.items(), *self.reads.whole.items()]:
            self._within.setdefault(key, []).extend(self._above(node) for node in nodes)

    def _above(self, node: ast.AST) -> Set[ast.AST]:
        found = set()
        while node is not None:
            found.add(node)
            node = self.reads.parent.get(node)
        return found

    def keys(self, stage: Stage) -> Set[str]:
        """Every key that the stage reads."""
        come_to = self.come_to(self.defined[stage.module][stage.function])
        return {key for key, places in self._within.items() if any(place & come_to for place in places)}

    def _named(self, module: str, name: str) -> Iterator[ast.AST]:
        """What a name of a module stands for: a function, a class or another module."""
        full = self.imported[module].get(name, "")
        where, _, what = full.rpartition(".")
        found = self.defined[module].get(name) or self.trees.get(full) or self.defined.get(where, {}).get(what)
        if found is not None:
            yield found

    def come_to(self, start: ast.AST) -> Set[ast.AST]:
        """Every function that is come to from one."""
        functions, classes, made, attributes, todo = set(), set(), set(), set(), [start]

        def found(node):
            if isinstance(node, ast.FunctionDef):
                todo.append(node)
            elif isinstance(node, ast.ClassDef) and node not in classes:
                classes.add(node)
                for base in node.bases:
                    for name in (n.id for n in ast.walk(base) if isinstance(n, ast.Name)):
                        [found(one) for one in self._named(self.module[node], name)]
                todo.extend(m for m in node.body if isinstance(m, ast.FunctionDef) and m.name in attributes)

        def makes(cls):
            if isinstance(cls, ast.ClassDef) and cls not in made:
                made.add(cls)
                todo.extend(m for m in cls.body if isinstance(m, ast.FunctionDef) and m.name.startswith("__"))
                for base in cls.bases:
                    [makes(one) for n in ast.walk(base) if isinstance(n, ast.Name) for one in self._named(self.module[cls], n.id)]

        while todo:
            function = todo.pop()
            module = self.module[function]
            if function in functions or module in CHECKING:
                continue
            functions.add(function)
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    owner = self.reads.parent[function]
                    [makes(one) for one in ([owner] if node.func.id == "cls" else self._named(module, node.func.id))]
                if isinstance(node, ast.Call) and getattr(getattr(node.func, "func", None), "id", "") == "benchmark_class":
                    [call(one) for one in self._registered("BENCHMARK") for call in (found, makes)]
                if isinstance(node, ast.Name):
                    [found(one) for one in self._named(module, node.id)]
                elif isinstance(node, ast.Attribute):
                    self._attribute(module, node, attributes, classes, found)
        return functions

    def _registered(self, name: str) -> Iterator[ast.AST]:
        """What the modules give by this name."""
        for module in self.trees:
            if name in self.given[module]:
                yield from self._named(module, self.given[module][name])

    def _attribute(self, module: str, node: ast.Attribute, attributes: Set[str], classes: Set[ast.ClassDef], found) -> None:
        base: List[ast.AST] = list(self._named(module, node.value.id)) if isinstance(node.value, ast.Name) else []
        if base and isinstance(base[0], ast.Module):
            [found(one) for one in [self.defined[self.module[base[0]]].get(node.attr)] if one]
            return
        if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "import_module" and node.attr != "BENCHMARK":
            [found(one) for one in self._registered(node.attr)]
        if node.attr not in attributes and not node.attr.startswith("__"):
            attributes.add(node.attr)
            [found(m) for cls in classes for m in cls.body if isinstance(m, ast.FunctionDef) and m.name == node.attr]
