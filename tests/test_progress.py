"""The line that says how far a cell is."""

import pytest

from c2f_utils.notebook import progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_display_a_line_appears_every_ten_seconds_and_at_the_end(clock, capsys):
    show = progress.Progress("reward model")
    for step in range(1, 41):
        show(step, 40)
        clock[0] += 1.0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "reward model: step 1 of 40",
        "reward model: step 11 of 40, about 29 s left",
        "reward model: step 21 of 40, about 19 s left",
        "reward model: step 31 of 40, about 9 s left",
        "reward model: step 40 of 40",
    ]


def test_what_is_left_is_reckoned_from_where_this_session_began(clock, capsys):
    show = progress.Progress("reward model")
    show(500, 600)  # continued from a checkpoint
    clock[0] += 60.0
    show(510, 600)
    assert capsys.readouterr().out.splitlines()[-1] == "reward model: step 510 of 600, about 9 min left"


def test_steps_of_several_parts_are_counted_together_and_the_last_line_is_right(clock, capsys):
    show = progress.Progress("judge", "verdict")
    show.step()  # outside of a block nothing is counted
    with show.counting(8):
        for _ in range(5):
            clock[0] += 6.0
            show.step(1, 2)
    assert capsys.readouterr().out.splitlines() == [
        "judge: verdict 1 of 8, about 42 s left",
        "judge: verdict 3 of 8, about 30 s left",
        "judge: verdict 5 of 8, about 18 s left",
        "judge: verdict 5 of 5",
    ]


def test_in_a_notebook_one_line_is_redrawn_and_its_text_escaped(clock, monkeypatch):
    shown = []

    class Handle:
        def update(self, what):
            shown.append(what)

    def display(what, display_id):
        shown.append(what)
        return Handle()

    monkeypatch.setattr(progress, "display_here", lambda: display)
    show = progress.Progress("<b>")
    show(1, 9)
    clock[0] += 3.0
    show(2, 9)
    assert [item.text for item in shown] == ["<b>: step 1 of 9", "<b>: step 2 of 9, about 21 s left"]
    assert "&lt;b&gt;: step 2 of 9, about 21 s left" in shown[1]._repr_html_()


@pytest.mark.parametrize(
    "seconds, words", ((0.2, "1 s"), (80, "80 s"), (700, "12 min"), (9e3, "2.5 h"), (2e5, "2.3 days"))
)
def test_durations_are_said_as_a_person_would(seconds, words):
    assert progress.in_words(seconds) == words
