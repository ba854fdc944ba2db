"""Linters are tests: "all green" means the style, the types, the shell scripts, the manuals and the sample file too."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shifterwrap import cli, errors, request, sitefile

ROOT = Path(__file__).resolve().parent.parent
MANUALS = sorted((ROOT / "shifterwrap" / "man").glob("*.rst"))
SETTINGS_MANUAL = ROOT / "shifterwrap" / "man" / "shifterwrap.yaml.5.rst"
LAUNCH_MANUAL = ROOT / "shifterwrap" / "man" / "wrapped-run.1.rst"
ADMIN_MANUAL = ROOT / "shifterwrap" / "man" / "shifterwrap.1.rst"
PAGES = [ROOT / "README.rst", *sorted((ROOT / "docs").glob("*.rst"))]


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run a tool in the checkout; a missing one skips the test, or fails it where everything must be there."""
    beside = Path(sys.executable).parent / argv[0]
    program = str(beside) if beside.exists() else shutil.which(argv[0])
    if program is None and os.environ.get("SHIFTERWRAP_TESTS_REQUIRE_ALL") != "1":
        pytest.skip(f"{argv[0]} is not installed")
    assert program is not None, f"{argv[0]} is not installed"
    return subprocess.run([program, *argv[1:]], cwd=ROOT, capture_output=True, text=True, check=False)


def clean(*argv: str) -> None:
    """Assert that a tool has nothing to say against the checkout."""
    done = run(*argv)
    assert done.returncode == 0, done.stdout + done.stderr


def shell_scripts() -> list[str]:
    """Every script that a shell runs."""
    found = sorted(ROOT.glob("tests/**/*.sh")) + sorted(ROOT.glob("docs/examples/*.sh")) + [ROOT / ".ci" / "run"]
    return [str(path.relative_to(ROOT)) for path in found]


def test_ruff_has_no_complaint() -> None:
    clean("ruff", "check", "--no-cache", ".")


def test_mypy_has_no_complaint(tmp_path: Path) -> None:
    clean("mypy", "--cache-dir", str(tmp_path), "shifterwrap")


def test_words_are_spelled_right() -> None:
    places = ["README.rst", "docs", "etc", "shifterwrap", "tests"]
    clean("codespell", "--skip", "*.pyc,*.sqsh", "--ignore-words-list", "caf,nd", *places)


def test_shell_scripts_have_no_complaint() -> None:
    clean("shellcheck", *shell_scripts())


@pytest.mark.parametrize("name", ["wrapped-run", "shifterwrap"])
def test_the_shell_part_of_a_command_has_no_complaint(name: str, tmp_path: Path) -> None:
    text = (ROOT / "bin" / name).read_text()
    part = tmp_path / f"{name}.sh"
    part.write_text(text.split("'''\n")[0] if text.startswith("'''") else text.partition("\n'''\n")[0] + "\n")
    clean("shellcheck", "-s", "sh", "-e", "SC1007,SC2289", str(part))


@pytest.mark.parametrize("manual", MANUALS, ids=lambda path: path.name)
def test_manuals_become_man_pages(manual: Path, tmp_path: Path) -> None:
    clean("rst2man", "--strict", str(manual), str(tmp_path / "page"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_are_valid(page: Path, tmp_path: Path) -> None:
    clean("rst2html", "--strict", str(page), str(tmp_path / "page"))


def test_there_is_a_manual_for_each_command_and_the_file() -> None:
    assert {path.name for path in MANUALS} == {"wrapped-run.1.rst", "shifterwrap.1.rst", "shifterwrap.yaml.5.rst"}


@pytest.mark.parametrize("row", sitefile.SETTINGS, ids=lambda row: row.key)
def test_every_setting_is_in_the_manual_with_its_default(row: sitefile.Setting) -> None:
    text = SETTINGS_MANUAL.read_text()
    assert row.key in text
    assert sitefile.show(row).strip('"') in text


@pytest.mark.parametrize("name", [name for option in request.OPTIONS for name in option.names])
def test_every_option_is_in_the_manual(name: str) -> None:
    assert name in LAUNCH_MANUAL.read_text()


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """The parsers of shifterwrap's subcommands by name."""
    (commands,) = [action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(commands.choices)


@pytest.mark.parametrize("name", subcommands())
def test_every_subcommand_and_its_options_are_in_the_manual(name: str) -> None:
    text = ADMIN_MANUAL.read_text()
    options = {word for action in subcommands()[name]._actions for word in action.option_strings} - {"-h", "--help"}
    assert [word for word in (name, *sorted(options)) if word not in text] == []


@pytest.mark.parametrize(("manual", "attribute"), [(LAUNCH_MANUAL, "launch_code"), (ADMIN_MANUAL, "admin_code")])
def test_every_exit_code_is_in_the_manual(manual: Path, attribute: str) -> None:
    codes = {getattr(kind, attribute) for kind in errors.classes().values()}
    told = set(re.findall(r"^ *[*`]*(\d+)[*`]*\b", manual.read_text(), re.MULTILINE))  # where a line begins with it
    assert {str(code) for code in codes} <= told


def test_every_error_is_in_a_manual() -> None:
    text = LAUNCH_MANUAL.read_text() + ADMIN_MANUAL.read_text()
    assert [name for name in errors.classes() if name not in text] == []


def test_the_sample_file_is_what_the_settings_say() -> None:
    assert (ROOT / "etc" / "shifterwrap.yaml").read_text() == sitefile.sample()


def test_settings_and_configuration_name_the_same_keys() -> None:
    from shifterwrap.config import Config

    assert [row.key for row in sitefile.SETTINGS] == list(Config._fields)


def test_help_fits_a_screen() -> None:
    lines = request.help_text().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
