"""tools/dev/readability.py counts what it says."""

import pytest

from tools.dev import readability

SOURCE = '''"""Of a module."""
# a comment line is not a code line, however long: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
a, b = 1, 2
c, d = divmod(7, 2)


def f():
    """Return a list."""
    return [x for x in range(3)]
'''


def test_counts_of_a_source():
    counts = readability.Counts()
    readability.count_source(SOURCE + f"y = '{'z' * 100}'\n", counts)
    assert (counts.lines, counts.long_lines) == (7, 1)
    assert (counts.comprehensions, counts.tuple_assignments) == (1, 1)
    assert (counts.docstrings, counts.stiff_docstrings) == (2, 1)


def test_sentences_are_those_of_the_prose():
    text = "# A heading of four words\n\nTwo words. And three [more](x.md) words.\n\n"
    text += "```sh\nno prose here.\n```\n\n| a | table |\n\n- One item.\n- Another item here.\n"
    assert readability.sentences(text) == [2, 4, 2, 3]


def test_one_column_for_each_tree(tmp_path, capsys):
    for name in ("old", "new"):
        (tmp_path / name / "docs").mkdir(parents=True)
        (tmp_path / name / "code.py").write_text(SOURCE)
    (tmp_path / "new" / "README.md").write_text("Two words.\n")
    readability.main([f"before={tmp_path}/old", f"{tmp_path}/new"])
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| | before | new |"
    assert "| words per sentence in README and docs | - | 2.0 |" in table


def test_a_folder_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        readability.main([str(tmp_path / "none")])
    assert ended.value.code == 2 and "no such folder" in capsys.readouterr().err
