"""Which keys of the configuration the sources read: attributes of what holds a section, followed through names and arguments.

`config.train.lr` is a read of train.lr; so is `settings.lr` where settings is `config.train`, was assigned from it, or is the
parameter of a function that is called with it. A name that only looks alike, such as `optimizer.lr`, is none.
"""

import ast
import dataclasses
import typing
from typing import Dict, FrozenSet, Iterable, List, Optional, Set, Tuple

from vlakeep.core.config import Config

HINTS = typing.get_type_hints(Config)
SECTIONS = {name: hint for name, hint in HINTS.items() if dataclasses.is_dataclass(hint)}
CLASSES = {hint.__name__: name for name, hint in SECTIONS.items()} | {"Config": ""}
FIELDS = {name: {f.name for f in dataclasses.fields(hint)} for name, hint in SECTIONS.items()} | {"": set(HINTS) - set(SECTIONS)}
FUNCTIONS = (ast.FunctionDef, ast.Lambda)


class Reads:
    """nodes: key -> the attributes that read it; whole: key -> the calls `to_dict(config.icsm)` that take all of its section.

    A section is held by its name, the whole configuration by "".
    """

    def __init__(self, trees: Iterable[ast.Module]):
        self.parent: Dict[ast.AST, ast.AST] = {}
        self.held: Dict[Tuple[Optional[ast.AST], str], Set[str]] = {}  # (function, name in it) -> what it may hold
        self.functions: Dict[str, List[ast.FunctionDef]] = {}
        self._scopes: Dict[ast.AST, Optional[ast.AST]] = {}
        nodes = [node for tree in trees for node in ast.walk(tree)]
        for node in nodes:
            self.parent.update((child, node) for child in ast.iter_child_nodes(node))
        for node in nodes:
            if isinstance(node, ast.FunctionDef):
                self.functions.setdefault(self._called(node), []).append(node)
                for argument in node.args.args:
                    self._hold(node, argument.arg, self._annotated(argument.annotation))
        handing_on = [node for node in nodes if isinstance(node, (ast.Assign, ast.Call))]
        while any([self._follow(node) for node in handing_on]):
            pass
        self.nodes: Dict[str, List[ast.Attribute]] = {}
        self.whole: Dict[str, List[ast.Call]] = {}
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                for section in self._holds(node.value):
                    if node.attr in FIELDS[section]:
                        self.nodes.setdefault(f"{section}.{node.attr}" if section else node.attr, []).append(node)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "to_dict" and node.args:
                for section in self._holds(node.args[0]) - {""}:
                    for name in FIELDS[section]:
                        self.whole.setdefault(f"{section}.{name}", []).append(node)

    def _called(self, node: ast.FunctionDef) -> str:
        owner = self.parent[node]
        return owner.name if node.name == "__init__" and isinstance(owner, ast.ClassDef) else node.name

    @staticmethod
    def _annotated(annotation) -> FrozenSet[str]:
        name = CLASSES.get(getattr(annotation, "id", None))
        return frozenset() if name is None else frozenset({name})

    def _hold(self, scope: Optional[ast.AST], name: str, sections: FrozenSet[str]) -> bool:
        held = self.held.setdefault((scope, name), set()) if sections else set(sections)
        new = not sections <= held
        held |= sections
        return new

    def _scope(self, node: ast.AST) -> Optional[ast.AST]:
        """The function, or the module, that a node stands in."""
        if node not in self._scopes:
            above = self.parent.get(node)
            self._scopes[node] = above if above is None or isinstance(above, (*FUNCTIONS, ast.Module)) else self._scope(above)
        return self._scopes[node]

    def _holds(self, node: ast.AST) -> FrozenSet[str]:
        """What an expression may hold: names of sections, "" for the whole configuration; empty for anything else."""
        if isinstance(node, ast.Name):
            scope = self._scope(node)
            while scope is not None:
                if (scope, node.id) in self.held:
                    return frozenset(self.held[scope, node.id])
                scope = self._scope(scope)
            return frozenset()
        if isinstance(node, ast.Attribute):
            if "" in self._holds(node.value) and node.attr in SECTIONS:
                return frozenset({node.attr})
            return frozenset(self.held.get((None, node.attr), ())) if isinstance(node.value, ast.Name) else frozenset()
        if isinstance(node, ast.IfExp):
            return self._holds(node.body) | self._holds(node.orelse)
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            if name == "replace" and node.args:
                return self._holds(node.args[0])
            found = [self._annotated(function.returns) for function in self.functions.get(name, [])]
            return found[0] if found else frozenset({CLASSES[name]} if name in CLASSES else ())
        return frozenset()

    def _returned(self, node: ast.AST) -> List[FrozenSet[str]]:
        """What the parts of a tuple hold that a call returns, by the function's annotation."""
        functions = self.functions.get(getattr(node.func, "id", ""), []) if isinstance(node, ast.Call) else []
        returns = functions[0].returns if functions else None
        parts = returns.slice.elts if isinstance(returns, ast.Subscript) and isinstance(returns.slice, ast.Tuple) else []
        return [self._annotated(part) for part in parts]

    def _follow(self, node: ast.AST) -> bool:
        """Learn what an assignment or the arguments of a call hand on; True when that was new."""
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            if isinstance(target, ast.Tuple):
                values = [self._holds(one) for one in value.elts] if isinstance(value, ast.Tuple) else self._returned(value)
                return any([self._hold(*self._place(one), held) for one, held in zip(target.elts, values) if self._place(one)])
            return self._place(target) is not None and self._hold(*self._place(target), self._holds(value))
        if not isinstance(node, ast.Call):
            return False
        new, name = False, getattr(node.func, "id", getattr(node.func, "attr", None))
        for function in self.functions.get(name, []):
            names = [argument.arg for argument in function.args.args]
            names = names[1:] if names[:1] in (["self"], ["cls"]) else names
            given = [*zip(names, node.args), *((word.arg, word.value) for word in node.keywords if word.arg)]
            new |= any([self._hold(function, word, self._holds(value)) for word, value in given])
        return new

    def _place(self, target: ast.AST):
        if isinstance(target, ast.Name):
            return self._scope(target), target.id
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            return None, target.attr
        return None
