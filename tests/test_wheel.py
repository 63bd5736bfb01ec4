"""Source distribution and wheel: what they hold, the commit they carry, and the package as it runs where no checkout is in sight.

`.ci/wheel` (make wheel) installs the wheel with its dependencies into an empty virtual environment and runs the demo there.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from test_layout import PACKAGE, REPO

import vlakeep

LIMIT_BYTES = 16 << 20
GIT = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]


def copy_of_the_sources(folder):
    shutil.copytree(PACKAGE, folder / "vlakeep", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore"):
        shutil.copy(REPO / name, folder)
    return folder


def commit_all(folder):
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m"]):
        subprocess.run([*GIT, "-C", folder, *arguments], check=True)
    return subprocess.run([*GIT, "-C", folder, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def build(kind, source, out):
    """The file that the build backend makes of a source folder."""
    code = f"import sys; from setuptools import build_meta; print('made', build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, out], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


def run(site, cwd, *argv):
    """`python argv` with the packages in `site` before the others; the working folder holds no vlakeep."""
    environ = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, *argv], cwd=cwd, env=environ, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(commit, sdist, wheel made of the sdist), from a clean checkout."""
    folder = tmp_path_factory.mktemp("build")
    (folder / "checkout").mkdir()
    commit = commit_all(copy_of_the_sources(folder / "checkout"))
    sdist = build("sdist", folder / "checkout", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked")
    return commit, sdist, build("wheel", folder / "unpacked" / sdist.name.removesuffix(".tar.gz"), folder)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """(commit, folder with the wheel's packages), inside the work tree of another project, as a virtual environment often is."""
    project = tmp_path_factory.mktemp("project")
    (project / "paper.tex").write_text("")
    other = commit_all(project)
    assert other != built[0]
    with zipfile.ZipFile(built[2]) as archive:
        archive.extractall(project / "site")
    return built[0], project / "site"


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(built):
    wheel = built[2]
    files = {str(p.relative_to(REPO)) for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == files | {"vlakeep/_commit.txt"}
    assert any(name.startswith("vlakeep/configs/") for name in held) and "vlakeep/assets/tabletop-base/model.safetensors" in held
    assert wheel.stat().st_size < LIMIT_BYTES


def test_the_source_distribution_leaves_the_tests_out(built):
    with tarfile.open(built[1]) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"vlakeep", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= tops and "tests" not in tops
    assert built[1].stat().st_size < LIMIT_BYTES


def test_the_installed_package_runs_elsewhere(installed, tmp_path):
    commit, site = installed
    code = "import vlakeep; from vlakeep.core.config import load_config; print(vlakeep.__file__, load_config('baseline_lora').method)"
    assert run(site, tmp_path, "-c", code).split() == [str(site / "vlakeep" / "__init__.py"), "baseline"]
    assert run(site, tmp_path, "-m", "vlakeep.cli", "--version") == f"vlakeep {vlakeep.__version__} (commit {commit[:7]})\n"
    assert "--hsw.site residual" in run(site, tmp_path, "-m", "vlakeep.cli", "train", "--help")


def test_provenance_of_an_installed_package_is_the_commit_it_was_built_from(installed, tmp_path):
    commit, site = installed
    code = "import json; from vlakeep.core.provenance import source_state; print(json.dumps(source_state()))"
    state = json.loads(run(site, tmp_path, "-c", code))
    assert state == {"commit": commit, "dirty": False, "diff": "", "diff_sha256": None, "untracked": []}


def test_uncommitted_changes_are_said_and_without_git_nothing_is(tmp_path):
    source = copy_of_the_sources(tmp_path)
    version = f"vlakeep {vlakeep.__version__}"
    assert run(source, source, "-m", "vlakeep.cli", "--version") == version + "\n"
    with zipfile.ZipFile(build("wheel", source, tmp_path / "dist")) as archive:
        assert "vlakeep/_commit.txt" not in archive.namelist()
    commit = commit_all(source)
    assert run(source, source, "-m", "vlakeep.cli", "--version") == f"{version} (commit {commit[:7]})\n"
    with open(source / "vlakeep" / "cli.py", "a") as file:
        file.write("\n")
    assert run(source, source, "-m", "vlakeep.cli", "--version") == f"{version} (commit {commit[:7]}, dirty)\n"
    with zipfile.ZipFile(build("wheel", source, tmp_path / "dist")) as archive:
        assert archive.read("vlakeep/_commit.txt").decode() == f"{commit} dirty\n"
    assert not (source / "vlakeep" / "_commit.txt").exists(), "the checkout is asked, and keeps no stamp"
    shutil.rmtree(source / ".git")
    with zipfile.ZipFile(build("wheel", source, tmp_path / "dist")) as archive:  # over what the earlier build has left
        assert "vlakeep/_commit.txt" not in archive.namelist()
