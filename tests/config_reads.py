"""Which keys of the configuration the sources read: attributes of what holds a section, followed through names and arguments.

`config.train.lr` is a read of train.lr; so is `settings.lr` where settings is `config.train`, was assigned from it, or is the
parameter of a function that is called with it. A name that only looks alike, such as `optimizer.lr`, is none.
"""

import ast
import dataclasses
import typing
from typing import Dict, Iterable, List, Optional, Tuple

from vlakeep.core.config import Config

HINTS = typing.get_type_hints(Config)
SECTIONS = {name: hint for name, hint in HINTS.items() if dataclasses.is_dataclass(hint)}
CLASSES = {hint.__name__: name for name, hint in SECTIONS.items()} | {"Config": ""}
FIELDS = {name: {f.name for f in dataclasses.fields(hint)} for name, hint in SECTIONS.items()} | {"": set(HINTS) - set(SECTIONS)}
FUNCTIONS = (ast.FunctionDef, ast.Lambda)


class Reads:
    """nodes: key -> the attributes that read it. A section is held by its name, the whole configuration by ""."""

    def __init__(self, trees: Iterable[ast.Module]):
        self.parent: Dict[ast.AST, ast.AST] = {}
        self.held: Dict[Tuple[ast.AST, str], str] = {}  # (function, name in it) -> what it holds
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
        for node in nodes:
            if isinstance(node, ast.Attribute) and (key := self._key(node)):
                self.nodes.setdefault(key, []).append(node)

    def _called(self, node: ast.FunctionDef) -> str:
        owner = self.parent[node]
        return owner.name if node.name == "__init__" and isinstance(owner, ast.ClassDef) else node.name

    @staticmethod
    def _annotated(annotation) -> Optional[str]:
        return CLASSES.get(getattr(annotation, "id", None))

    def _hold(self, scope: ast.AST, name: str, section: Optional[str]) -> bool:
        if section is None or self.held.get((scope, name)) == section:
            return False
        self.held[scope, name] = section
        return True

    def _scope(self, node: ast.AST) -> Optional[ast.AST]:
        """The function, or the module, that a node stands in."""
        if node not in self._scopes:
            above = self.parent.get(node)
            self._scopes[node] = above if above is None or isinstance(above, (*FUNCTIONS, ast.Module)) else self._scope(above)
        return self._scopes[node]

    def _holds(self, node: ast.AST) -> Optional[str]:
        """What an expression holds: the name of a section, "" for the whole configuration, None for anything else."""
        if isinstance(node, ast.Name):
            scope = self._scope(node)
            while scope is not None:
                if (scope, node.id) in self.held:
                    return self.held[scope, node.id]
                scope = self._scope(scope)
            return None
        if isinstance(node, ast.Attribute):
            if self._holds(node.value) == "" and node.attr in SECTIONS:
                return node.attr
            return self.held.get((None, node.attr)) if isinstance(node.value, ast.Name) and node.value.id == "self" else None
        if isinstance(node, ast.IfExp):
            return self._holds(node.body) if self._holds(node.body) is not None else self._holds(node.orelse)
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            if name == "replace" and node.args:
                return self._holds(node.args[0])
            found = [self._annotated(function.returns) for function in self.functions.get(name, [])]
            return found[0] if found else CLASSES.get(name)
        return None

    def _follow(self, node: ast.AST) -> bool:
        """Learn what an assignment or the arguments of a call hand on; True when that was new."""
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            pairs = zip(target.elts, value.elts) if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else [(target, value)]
            return any([self._hold(*self._place(one), self._holds(other)) for one, other in pairs if self._place(one)])
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

    def _key(self, node: ast.Attribute) -> Optional[str]:
        section = self._holds(node.value) if isinstance(node.ctx, ast.Load) else None
        if section is None or node.attr not in FIELDS[section]:
            return None
        return f"{section}.{node.attr}" if section else node.attr
