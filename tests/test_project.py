"""Files that hosts and tools read, and the layout of ``scripts/``: each means what it says."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = sorted(path.name for path in (ROOT / "scripts").iterdir() if path.is_file())
PACKAGES = sorted(path for path in (ROOT / "scripts" / "lib").iterdir() if path.name[0] not in "._")
GITHUB = ROOT / ".github"
YAML_FILES = sorted([*GITHUB.rglob("*.yml"), ROOT / ".pre-commit-config.yaml"])


def load(path: Path) -> Any:
    """The content of a YAML file."""
    return importlib.import_module("yaml").safe_load(path.read_text(encoding="utf-8"))


def steps_of_the_test_command() -> dict[str, list[str]]:
    """The checks of scripts/test, by name, each as the words of its command."""
    text = (ROOT / "scripts" / "test").read_text()
    steps = [shlex.split(line) for line in re.findall(r"^step (.+)$", text, re.MULTILINE)]
    return {name: command for name, *command in steps}


# --- scripts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_an_executable_file(name: str) -> None:
    """A command to type is a program with a shebang and no ending."""
    path = ROOT / "scripts" / name
    assert "." not in name
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env ")


def test_nothing_else_lies_among_the_commands() -> None:
    """No folder but that of their parts, where a module could be imported under its bare name."""
    folders = {path.name for path in (ROOT / "scripts").iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} == {"lib"}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_belongs_to_a_command(package: Path) -> None:
    """Each folder of scripts/lib has a program, which runs it, and nothing else has its name."""
    assert (package / "__main__.py").is_file()
    command = package.name.replace("_", "-")
    assert command in COMMANDS
    assert f"-m scripts.lib.{package.name}" in (ROOT / "scripts" / command).read_text()


def test_no_folder_of_scripts_is_on_a_path() -> None:
    """Neither pytest nor mypy finds a part of a command under its bare name."""
    text = (ROOT / "pyproject.toml").read_text()
    assert 'pythonpath = ["."]' in text
    assert "mypy_path" not in text


@pytest.mark.parametrize("name", COMMANDS)
def test_tools_read_every_command(name: str) -> None:
    """A command in Python is linted and type-checked, though it has no ending."""
    if "python" in (ROOT / "scripts" / name).read_text().partition("\n")[0]:
        assert (ROOT / "pyproject.toml").read_text().count(f'"scripts/{name}"') == 2


# --- pre-commit -----------------------------------------------------------------------------------


def test_hooks_are_the_checks_of_the_test_command() -> None:
    """Every check but the tests is a hook of the same name, with the same command."""
    (repository,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    hooks = {hook["name"]: hook["entry"] for hook in repository["hooks"]}
    steps = steps_of_the_test_command()
    assert len(steps) >= 5
    del steps["tests (pytest)"]
    assert sorted(hooks) == sorted(steps)
    commands = {name: shlex.join(words) for name, words in steps.items() if len(words) > 1}
    assert {name: entry for name, entry in hooks.items() if name in commands} == commands


# --- workflows and forms --------------------------------------------------------------------------


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_yaml_is_read(path: Path) -> None:
    """Every file is a mapping; a form and a workflow have a name."""
    content = load(path)
    assert isinstance(content, dict)
    if path.parent.name == "workflows" or path.name in ("problem.yml", "validation.yml"):
        assert content["name"]


def workflow(name: str) -> Any:
    """A workflow; YAML 1.1 reads its key `on` as true."""
    return load(GITHUB / "workflows" / name)


@pytest.mark.parametrize("name", ["ci.yml", "release.yml"])
def test_workflows_run_files_that_are_there(name: str) -> None:
    """The programs of the repository that a workflow runs exist and can be run."""
    jobs = workflow(name)["jobs"].values()
    steps = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    programs = {word for run in steps for word in run.split() if word.startswith((".ci/", "scr"))}
    assert programs
    assert [program for program in programs if not os.access(ROOT / program, os.X_OK)] == []


def test_continuous_integration_runs_on_every_python() -> None:
    """The versions are those of the package's metadata."""
    metadata = (ROOT / "setup.cfg").read_text()
    classified = re.findall(r"Programming Language :: Python :: (3\.\d+)", metadata)
    (job,) = workflow("ci.yml")["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == classified
    assert ".ci/run" in [step.get("run") for step in job["steps"]]


def test_a_tag_is_built_and_checked() -> None:
    """The workflow for tags runs the program that checks both packages, with the tag's name."""
    content = workflow("release.yml")
    assert content[True] == {"push": {"tags": ["v*"]}}
    (job,) = content["jobs"].values()
    assert '.ci/packages "$GITHUB_REF_NAME"' in [step.get("run") for step in job["steps"]]


@pytest.mark.parametrize("name", ["problem.yml", "validation.yml"])
def test_a_form_asks_for_the_doctors_json(name: str) -> None:
    """It is required, and the form says which command prints it."""
    fields = {
        field["id"]: field
        for field in load(GITHUB / "ISSUE_TEMPLATE" / name)["body"][-5:]
        if "id" in field
    }
    doctor = fields["doctor"]
    assert doctor["validations"] == {"required": True}
    assert "`sglang-musa-ext doctor --json`" in doctor["attributes"]["description"]


def test_security_goes_through_the_host() -> None:
    """SECURITY.md names the host's private reporting, and no address."""
    text = (ROOT / "SECURITY.md").read_text()
    assert "Report a vulnerability" in text
    assert "@" not in text


# --- safety ---------------------------------------------------------------------------------------

UNSAFE = {
    "eval(text)": "S307",
    "exec(text)": "S102",
    "import pickle": "TID251",
    "from pickle import loads": "TID251",
    "torch.load(text)": "TID251",
    "yaml.load(text)": "S506",
    "os.system(text)": "S605",
    "os.popen(text)": "S605",
    "subprocess.run(text, shell=True)": "S602",
    "subprocess.run(['pip'])": "S607",
    "import urllib.request": "TID251",
    "from urllib import request": "TID251",
    "import requests": "TID251",
    "from huggingface_hub import snapshot_download": "TID251",
    "torch.hub.load(text)": "TID251",
}
"""Lines that must not be in the package, and the rule that says so."""


def test_the_linter_finds_what_is_unsafe() -> None:
    """Where the package's modules are, it refuses code that fetches, or runs what it is given."""
    imports = ("import os", "import subprocess", "import torch", "import yaml")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format=json",
         "--stdin-filename=sglang_musa_ext/unsafe.py"],
        input="\n".join([*imports, *UNSAFE]), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = {(each["location"]["row"], each["code"]) for each in json.loads(done.stdout)}
    expected = set(enumerate(UNSAFE.values(), len(imports) + 1))
    assert expected - found == set()


def test_no_module_is_left_out_of_these_rules() -> None:
    """No line of the package, and no exception for its files, turns one of them off."""
    rules = set(UNSAFE.values())
    config = (ROOT / "pyproject.toml").read_text()
    excepted = re.findall(r'^"sglang_musa_ext[^\]]*\]', config, re.MULTILINE)
    lines = [
        line
        for path in (ROOT / "sglang_musa_ext").rglob("*.py")
        for line in path.read_text().splitlines()
        if "noqa" in line
    ]
    assert excepted
    text = "\n".join([*excepted, *lines])
    assert [rule for rule in rules if rule in text] == []
