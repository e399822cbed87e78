"""What surrounds the code: workflows call make's targets, versions agree, forms can be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import fssa_fast

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / ".github").is_dir(), reason="not in this copy of the sources")


def steps() -> list[dict[str, str]]:
    files = sorted((ROOT / ".github/workflows").glob("*.yml"))
    jobs = [job for path in files for job in yaml.safe_load(path.read_text())["jobs"].values()]
    return [step for job in jobs for step in job["steps"]]


def test_workflows_call_targets_of_make():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {step["run"].removeprefix("make ") for step in steps() if "run" in step}
    assert called <= targets and {"lint", "test", "proof", "docs"} <= called


def test_actions_are_pinned_to_a_version():
    used = [step["uses"] for step in steps() if "uses" in step]
    assert used and not [action for action in used if not re.search(r"@v\d+\.\d+\.\d+$", action)]


def test_every_make_target_is_explained():
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    assert [target for target in phony if target not in ("help", "clean") and f"make {target}" not in text] == []


def test_the_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fssa_fast.__version__ and citation["license"] == "Apache-2.0"


def test_the_forms_ask_for_the_report():
    bug = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    assert any("python -m fssa_fast" in part["attributes"].get("description", "") for part in bug["body"])
