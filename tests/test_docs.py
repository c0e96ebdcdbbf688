"""The documentation: links, paths, quoted messages, generated pages, and the commands it shows.

The first line of a code block says how it is tested, for example ```sh dry-run:

- make: the target exists.
- dry-run: each `launch.py` line is resolved and planned for real, with --dry-run.
- parse: the script's own parser accepts each line.
- pytest: the named test files exist.
- skip: REASON: the block is not run.
- (yaml blocks) the settings are loaded, and paths are expanded; of `yaml profile` the script is compared.
- python run: the block runs as it is (see test_extending.py).
- python use: the block runs on a tiny run (see tools/test_sample.py).
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import launch
from pipeline.config.load import flatten, load
from pipeline.config.paths import absolute_paths
from pipeline.config.schema import RunConfig
from slurm.resources import stage_resources
from tests.conftest import ROOT
from tests.e2e.test_chain import TINY

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
MODES = ("make", "dry-run", "parse", "pytest", "skip:")
LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```([^\s`]*) ?([^\n]*)\n(.*?)^```$", re.M | re.S)
TOP = ("cvae", "pipeline", "slurm", "tools", "tests", "configs", "docs", "launch.py")
TO_MAKE = ("configs/cluster/mine.yaml",)  # the reader writes these files
LOGS = ("CHANGELOG.md", "decisions.md")  # they also name files that are gone
MOST_FILES = 12


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def tracked() -> set[str]:
    """Files that git knows or would know, and their folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    files = [file for file in files if (ROOT / file).is_file()]
    folders = {str(parent) for file in files for parent in Path(file).parents}
    return set(files) | folders


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return names


def blocks(language: str, mode: str) -> list:
    """All code blocks of a language and a mode, as parameters of a test."""
    found = []
    for page in PAGES:
        for number, (its_language, its_mode, text) in enumerate(FENCE.findall(page.read_text())):
            if its_language == language and its_mode == mode:
                found.append(pytest.param(text, id=f"{name_of(page)}-{number}"))
    return found


def lines(block: str) -> list[list[str]]:
    """The words of each command in a block, without comments."""
    joined = block.replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [line for line in words if line]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    known = tracked()
    for pair in LINK.findall(prose(page)):
        target = pair[0] or pair[1]
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert name_of(there) in known, f"{name_of(page)}: {target} does not exist"
        assert not anchor or anchor in anchors(there), f"{name_of(page)}: {target} has no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in LOGS], ids=name_of)
def test_paths_and_tests_that_are_named_exist(page):
    known = tracked()
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if re.fullmatch(rf"({'|'.join(map(re.escape, TOP))})(/[\w./-]*)?", code) and "." in code:
            assert code in TO_MAKE or code.rstrip("/") in known, f"{name_of(page)}: `{code}` does not exist"
        if re.fullmatch(r"test_\w+", code):
            assert f"def {code}(" in tests, f"{name_of(page)}: `{code}` does not exist"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_functions_are_where_the_text_says(page):
    """`name` in `path`: the file defines the name."""
    text = " ".join(prose(page).split())
    for names, file in re.findall(r"((?:`[\w.]+`(?:, | and )?)+) in `([\w/]+\.py)`", text):
        source = (ROOT / file).read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            last = name.rpartition(".")[2]
            defined = re.search(rf"^\s*(def|class) {last}\b|^{last}\b.*=", source, re.M)
            assert defined, f"{name_of(page)}: `{name}` is not in {file}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_shell_block_says_how_it_is_tested(page):
    for language, mode, text in FENCE.findall(page.read_text()):
        assert language, f"{name_of(page)}: a block without a language: {text[:60]}"
        if language == "sh":
            assert mode.startswith(MODES), f"{name_of(page)}: ```sh {mode}: expected one of {MODES}"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder that looks like the checkout, with runs of the names that the documentation uses."""
    for name in ("configs", "tools", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for config in ("sigma_cvae", "sigma_cvae_nf"):
        run_dir = tmp_path / "runs" / config
        run_dir.mkdir(parents=True)
        (run_dir / "config.yaml").write_text((ROOT / "configs" / f"{config}.yaml").read_text())
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("block", blocks("sh", "dry-run"))
def test_launch_lines_can_be_planned(block, workplace, capsys):
    for words in lines(block):
        assert words[:2] == ["python", "launch.py"], words
        launch.main([*words[2:], "--dry-run"])
        assert "name:" in capsys.readouterr().out


@pytest.mark.parametrize("block", blocks("yaml", ""))
def test_settings_are_accepted(block, tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    file = tmp_path / "shown.yaml"
    file.write_text(block)
    config = absolute_paths(load([file]))
    assert flatten(config) != flatten(RunConfig()) and "$" not in config.runs_dir
    for stage in config.cluster.stages:
        stage_resources(config, stage)


PROFILE = re.compile(r"^```yaml profile\n(.*?)^```$.*?^```text train\n(.*?)^```$", re.M | re.S)
PROFILES = PROFILE.findall((ROOT / "docs/operations/clusters.md").read_text())


@pytest.mark.parametrize(("profile", "shown"), PROFILES, ids=["conda", "container", "no-gpu"])
def test_profiles_of_clusters_give_the_scripts_that_the_page_shows(profile, shown, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(profile)
    launch.main(["--cluster", str(tmp_path / "mine.yaml"), "--config", "sigma_cvae_nf", "--dry-run"])
    out = capsys.readouterr().out
    script = out.partition("# job sigma_cvae_nf-train\n")[2].partition("# job ")[0]
    assert script, out
    for line in shown.splitlines():
        assert line in script.splitlines(), f"{line} is not in the script:\n{script}"
    python = absolute_paths(load([tmp_path / "mine.yaml"])).cluster.python
    assert (python or sys.executable) in script


class Parsed(Exception):
    """The parser accepted the command line."""


@pytest.mark.parametrize("block", blocks("sh", "parse"))
def test_scripts_accept_the_lines(block, workplace, monkeypatch):
    parse = argparse.ArgumentParser.parse_args
    parse_intermixed = argparse.ArgumentParser.parse_intermixed_args
    for words in lines(block):
        assert words[0] == "python", words
        script = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        arguments = words[2:]

        def stop(parser, argv=None, namespace=None, arguments=arguments):
            parse(parser, arguments)
            raise Parsed

        def stop_intermixed(parser, argv=None, namespace=None, arguments=arguments):
            parse_intermixed(parser, arguments)
            raise Parsed

        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", stop_intermixed)
            with pytest.raises(Parsed):
                script.main()


@pytest.mark.slow
def test_lines_about_runs_work_on_tiny_runs(tmp_path):
    """Two runs of tiny size, made by `launch.py`; then each line about runs, as it is printed."""
    runs = tmp_path / "runs"
    for name in ("configs", "tools", "launch.py"):
        (tmp_path / name).symlink_to(ROOT / name)

    def execute(words: list[str]) -> None:
        command = [sys.executable, *words[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"

    Image.new("RGB", (712, 872), "brown").save(tmp_path / "photo.jpg")
    (tmp_path / "batch.csv").write_text("Male,n\n1,2\n")
    execute(["python", "launch.py", "--config", "sigma_cvae", "sigma_cvae_nf", f"runs_dir={runs}", *TINY])
    execute(["python", "launch.py", "--run-dir", f"{runs}/sigma_cvae_nf", "--stages", "eval"])  # number 2
    shown = [words for block in blocks("sh", "parse") for words in lines(block.values[0])]
    endless = {"-f", "tools/explore.py"}
    about_runs = [words for words in shown if "runs/sigma_cvae_nf" in words and not endless & set(words)]
    assert len(about_runs) >= 4
    for words in about_runs:
        execute(words)


@pytest.mark.parametrize("block", blocks("sh", "make"))
def test_make_targets_exist(block):
    makefile = (ROOT / "Makefile").read_text()
    for words in lines(block):
        assert words[0] == "make"
        assert re.search(rf"^{words[1]}:", makefile, re.M), words


@pytest.mark.parametrize("block", blocks("sh", "pytest"))
def test_test_files_exist(block):
    known = tracked()
    for words in lines(block):
        assert "pytest" in words
        for word in words:
            assert not word.startswith("tests") or word.rstrip("/") in known, words


def test_the_page_of_keys_is_current():
    from tools.dev import config_reference

    assert config_reference.PAGE.read_text() == config_reference.page(), (
        "docs/configuration.md is old; run: python tools/dev/config_reference.py"
    )


def test_the_page_of_keys_has_every_key_and_a_meaning_for_each():
    from tools.dev import config_reference

    text = config_reference.page()
    for key in flatten(RunConfig()):
        (row,) = re.findall(rf"^\| `{re.escape(key)}` \|.*$", text, re.M)
        assert not row.endswith("|  |"), f"{key} has no comment in the source"


def test_the_annotated_tree_is_the_tree():
    text = (ROOT / "docs/architecture.md").read_text()
    tree = next(block for _, _, block in FENCE.findall(text) if block.startswith("launch.py"))
    known = tracked()
    listed: list[str] = []
    parents: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        path = "/".join([*parents[:depth], line.split()[0].rstrip("/")])
        parents = [*parents[:depth], line.split()[0].rstrip("/")]
        listed.append(path)
        assert path in known, f"docs/architecture.md lists {path}, which does not exist"
    code = [file for file in known if file.endswith(".py") and not file.startswith("tests/")]
    folders = {str(Path(file).parent) for file in code} - {"."}
    assert not folders - set(listed), "docs/architecture.md does not list these folders"


def test_quoted_messages_are_printed_by_the_code():
    """The longest fixed part of each message in docs/operations/troubleshooting.md is in a source file."""
    sources = [ROOT / "launch.py"]
    for top in ("cvae", "pipeline", "slurm", "tools"):
        sources += (ROOT / top).rglob("*.py")
    code = " ".join(re.sub(r'"\s*\n\s*f?"', "", file.read_text()) for file in sources)
    rows = re.findall(r"^\| `([^`]+)`", (ROOT / "docs/operations/troubleshooting.md").read_text(), re.M)
    assert len(rows) > 20
    for message in rows:
        parts = re.split(r"\.\.\.|\w+ \d+|'[^']*'|manifest\.json", message)
        longest = max(parts, key=len).strip(" ;,()")
        assert longest in code, f"no source file prints {longest!r} (of {message!r})"


def test_no_folder_of_the_documentation_is_crowded():
    counts = Counter(str(file.parent) for file in (ROOT / "docs").rglob("*") if file.is_file())
    assert max(counts.values()) <= MOST_FILES, counts
