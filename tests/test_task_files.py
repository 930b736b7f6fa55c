"""Task files of a user's: what is understood, and what is refused with file and line."""

import json

import pytest

from c2f_utils.domain import task_files
from c2f_utils.errors import C2FError
from c2f_utils.settings.load import load_settings

GOOD = {"question": "What is 1 + 1?", "answer": "2"}


def place(folder, name: str, *rows, encoding: str = "utf-8"):
    """A .jsonl file of these rows; a row that is text already stands as it is."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding=encoding)
    return path


def test_three_shapes_of_rows_are_understood(tmp_path):
    place(tmp_path, "sums/small.jsonl", GOOD | {"answer": "one and one is two\n#### 2", "id": 1}, "")
    place(tmp_path, "pick.jsonl", {"question": "Which?", "choices": ["this", "that"], "answer": "that", "id": "a"},
          {"question": "Which?", "choices": ["this", "that"], "answer": 0, "id": "b"})  # fmt: skip
    (tmp_path / "say.json").write_text(json.dumps({"canary": "x", "examples": [{"input": "Say A", "target": 7}]}))
    (tmp_path / "list.json").write_text(json.dumps([GOOD]), encoding="utf-8-sig")
    (tmp_path / "README.md").write_text("not a task")
    found = {task.name: task for task in task_files.read(tmp_path)}
    assert {name: task.shape for name, task in found.items()} == {
        "local_list": "text", "local_pick": "choice", "local_say": "text", "local_sums_small": "number",
    }  # fmt: skip
    assert [row["right"] for row in found["local_pick"].rows] == [1, 0]
    assert found["local_say"].rows == [{"question": "Say A", "answer": "7"}]


CHOICE = {"question": "Which?", "choices": ["this", "that"], "answer": "that"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"question": "cut', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("3", "is a int; expected question and answer"),
        ({"prompt": "?", "answer": "2"}, "lacks question"),
        ({"input": "What?"}, "lacks target"),
        (GOOD | {"question": "  "}, "question is empty"),
        (GOOD | {"question": 4}, "question is 4; expected text"),
        (GOOD | {"answer": ""}, "answer is empty"),
        (GOOD | {"answer": None}, "answer is None; expected text"),
        (GOOD | {"answer": True}, "answer is True; expected text"),
        (GOOD | {"id": "first"}, "the id 'first' is that of line 1, too"),
        (CHOICE, "of shape 'choice' in a file of shape 'text'"),
        (CHOICE | {"answer": "neither"}, "answer 'neither' is none of the choices"),
        (CHOICE | {"answer": 2}, "answer 2 is none of the choices"),
        (CHOICE | {"choices": ["that"]}, "expected at least two, all different"),
        (CHOICE | {"choices": ["that", "that "]}, "expected at least two, all different"),
        (CHOICE | {"choices": ["that", ""]}, "a list of texts, none of them empty"),
        (CHOICE | {"choices": "that"}, "a list of texts, none of them empty"),
        ('{"question": "\\ud800?", "answer": "2"}', "half of a surrogate pair"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 60 else None,
)
def test_a_row_that_cannot_be_asked_is_refused_with_file_and_line(tmp_path, row, said):
    path = place(tmp_path, "mine.jsonl", GOOD | {"id": "first"}, "", row)
    with pytest.raises(C2FError) as error:
        task_files.read(tmp_path)
    assert f"{path}, line 3: " in str(error.value) and said in str(error.value)


def test_a_wrong_encoding_is_refused_with_its_line(tmp_path):
    path = place(tmp_path, "mine.jsonl", GOOD, '{"question": "Où ?", "answer": "là"}', encoding="latin-1")
    with pytest.raises(C2FError, match="line 2: not UTF-8 text"):
        task_files.read(tmp_path)
    path.write_text(json.dumps(GOOD), encoding="utf-16")
    with pytest.raises(C2FError, match="line 1: not UTF-8 text"):
        task_files.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not valid JSON"),
        ("{}", "expected a list of objects"),
        ("[]", "holds no row"),
        ('[{"question": "?"}]', "entry 1: lacks answer"),
    ],
)
def test_a_json_file_that_holds_no_rows_is_refused(tmp_path, content, said):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(C2FError, match=said):
        task_files.read(tmp_path)


def test_all_that_is_wrong_is_said_at_once_but_not_without_end(tmp_path):
    place(tmp_path, "a.jsonl", *["{"] * 3)
    place(tmp_path, "b.jsonl", *["{"] * 30)
    with pytest.raises(C2FError) as error:
        task_files.read(tmp_path)
    assert "a.jsonl, line 3" in str(error.value) and "b.jsonl, line 1:" in str(error.value)
    assert "and 21 more" in str(error.value)


def test_an_empty_folder_none_at_all_and_two_files_of_one_name_are_refused(tmp_path):
    with pytest.raises(C2FError, match="holds no .jsonl or .json file"):
        task_files.files(tmp_path)
    with pytest.raises(C2FError, match="is no folder"):
        task_files.files(tmp_path / "nowhere")
    place(tmp_path, "a/b.jsonl", GOOD)
    place(tmp_path, "a_b.jsonl", GOOD)
    with pytest.raises(C2FError, match="would both be the task local_a_b"):
        task_files.files(tmp_path)


def test_settings_refuse_them_before_any_work(tmp_path):
    place(tmp_path, "mine.jsonl", GOOD, "{")
    given = {"tasks.suites": ["local"], "tasks.folder": str(tmp_path)}
    with pytest.raises(C2FError, match="mine.jsonl, line 2: not valid JSON"):
        load_settings("smoke", overrides=given)
    assert load_settings("smoke", overrides=given | {"tasks.suites": ["embedded"]})


def test_published_files_are_understood(real_data, tmp_path):
    for name in ("gsm8k", "bbh"):
        (tmp_path / name).symlink_to(real_data / name)
    found = {task.name: (task.shape, len(task.rows)) for task in task_files.read(tmp_path)}
    assert found.pop("local_gsm8k_test") == ("number", 300)
    assert len(found) == 3 and set(found.values()) == {("text", 250)}
