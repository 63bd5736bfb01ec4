"""Build hook: a wheel and a source distribution carry the commit that they were built from. All else stands in pyproject.toml."""

import importlib.util
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist


def provenance():
    """By its file and not from the package, whose directory need not be on the path of an isolated build."""
    spec = importlib.util.spec_from_file_location("provenance", Path(__file__).parent / "vlakeep" / "core" / "provenance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_stamp(package: Path, text: str) -> None:
    file = package / provenance().STAMP
    file.unlink(missing_ok=True)  # of an earlier build, or linked to the file that an unpacked distribution came with
    if text:
        file.write_text(text, encoding="utf-8")


class BuildPy(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # there the package is the checkout, which git can be asked about
            write_stamp(Path(self.build_lib) / "vlakeep", provenance().stamp_text())


class Sdist(sdist):
    def make_release_tree(self, base_dir, files):
        text = provenance().stamp_text()  # before the tree is made, which lies in the checkout and would count as a change
        super().make_release_tree(base_dir, files)
        write_stamp(Path(base_dir) / "vlakeep", text)


setup(cmdclass={"build_py": BuildPy, "sdist": Sdist})
