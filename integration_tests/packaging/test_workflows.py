"""The GitHub workflows: their schema, a security audit, and rules of ours.

actionlint cannot be had from a package index without downloading its binary, so it runs in test.yml.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("check_jsonschema")

REPOSITORY = Path(__file__).resolve().parents[2]
GITHUB = REPOSITORY / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
NAMES = [path.stem for path in WORKFLOWS]


def load(name: str) -> dict[str, Any]:
    text = (GITHUB / "workflows" / f"{name}.yml").read_text(encoding="utf-8")
    workflow: dict[str, Any] = yaml.safe_load(text)
    workflow["on"] = workflow.pop(True)  # YAML 1.1 reads `on` as true
    return workflow


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_schema() -> None:
    assert NAMES == ["test", "wheels"]
    schema = ("--builtin-schema", "vendor.github-workflows")
    run(sys.executable, "-m", "check_jsonschema", *schema, *WORKFLOWS)


def test_audit() -> None:
    binary = Path(sys.executable).with_name("zizmor")
    if not binary.exists():
        pytest.skip("zizmor is not installed")
    run(binary, "--offline", "--no-progress", "--quiet", "--strict-collection", GITHUB)


@pytest.mark.parametrize("name", NAMES)
def test_rules(name: str) -> None:
    workflow = load(name)
    assert workflow["permissions"] == {}, "each job says what it may do"
    assert workflow["concurrency"]["group"]
    for job in workflow["jobs"].values():
        assert set(job["permissions"]) <= {"contents", "id-token"}
        assert job["permissions"].get("contents", "read") == "read"
        assert 0 < job["timeout-minutes"] <= 90
    for step in steps(workflow):
        used = step.get("uses", "@v0")
        assert re.search(r"[@:]v?\d+(\.\d+)*$", used), f"{used} is not pinned by a version"
        if used.startswith("actions/checkout@"):
            assert step["with"] == {"persist-credentials": False}


@pytest.mark.parametrize("name", NAMES)
def test_commands_refer_to_what_exists(name: str) -> None:
    for step in steps(load(name)):
        script = step.get("run", "")
        run("bash", "-n", "-c", re.sub(r"\$\{\{.*?\}\}", "x", script))
        for word in shlex.split(script, comments=True):
            if word.endswith(".py"):
                assert (REPOSITORY / word).is_file(), word
            if script.startswith("make "):
                targets = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
                assert re.search(rf"^{script.split()[1]}:", targets, re.MULTILINE)


def test_wheels_are_for_every_system_and_tried_there() -> None:
    workflow = load("wheels")
    wheel = workflow["jobs"]["wheel"]
    systems = {entry["name"]: entry for entry in wheel["strategy"]["matrix"]["include"]}
    assert set(systems) == {
        "linux-x86_64",
        "linux-aarch64",
        "macos-x86_64",
        "macos-arm64",
        "windows-x86_64",
    }
    for job in ("wheel", "sdist"):
        order = [step.get("uses", step.get("run", "")) for step in workflow["jobs"][job]["steps"]]
        built, tried, kept = (
            next(i for i, what in enumerate(order) if word in what)
            for word in ("maturin-action@", "smoke.py", "upload-artifact@")
        )
        assert built < tried < kept, "what is kept has been tried"


def test_only_a_tag_publishes() -> None:
    workflow = load("wheels")
    assert workflow["on"]["push"] == {"tags": ["v*"]}
    with_identity = [
        name for name, job in workflow["jobs"].items() if "id-token" in job["permissions"]
    ]
    assert with_identity == ["publish"]
    publish = workflow["jobs"]["publish"]
    assert set(publish["needs"]) == {"wheel", "sdist"}
    assert "startsWith(github.ref, 'refs/tags/v')" in publish["if"]
    assert "github.event_name == 'push'" in publish["if"]
    text = (GITHUB / "workflows" / "wheels.yml").read_text(encoding="utf-8")
    assert "secrets." not in text and "password" not in str(publish)


def test_the_version_in_the_tag_check_is_found() -> None:
    (script,) = (
        step["run"] for step in steps(load("wheels")) if "GITHUB_REF_NAME" in step.get("run", "")
    )
    tagged = f"cd {shlex.quote(str(REPOSITORY))}; GITHUB_REF_NAME=$1; set -e; {script}"
    version = re.search(
        r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text("utf-8"), re.MULTILINE
    )
    assert version is not None
    run("bash", "-c", tagged, "_", f"v{version[1]}")
    wrong = subprocess.run(["bash", "-c", tagged, "_", "v0.0.0"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "::error::the tag is v0.0.0" in wrong.stdout
