"""Names of saved steps: one plain part, another for each step; what is wrong is found at the start."""

from __future__ import annotations

from typing import Any

import pytest

from ckpt_convert.checkpointer.run.naming import MAX_NAME_BYTES, DirectoryTemplate
from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.errors import UsageError

SOME = Progress(step=40, epoch=2, tokens=5000, samples=320, evals=3, seconds=12.5)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("step_{step}", "step_40"),
        ("{step:06d}", "000040"),
        ("{step:_}", "40"),
        ("{run_name}-e{epoch}-s{step:>4}", "alpaca-e2-s  40"),
        ("t{tokens:x}_n{samples}_v{evals:02}_{step}", "t1388_n320_v03_40"),
        ("{{{step}}}", "{40}"),
        ("{step}{step}", "4040"),
        ("schritt_{step}_ü", "schritt_40_ü"),
    ],
)
def test_variables_and_format_specifications(text: str, name: str) -> None:
    assert DirectoryTemplate(text).format(SOME, "alpaca") == name


def test_the_usual_name() -> None:
    assert DirectoryTemplate().format(SOME) == "step_40"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("checkpoint", r"expected \{step\}"),
        ("", r"expected \{step\}"),
        ("{epoch}", r"expected \{step\}"),
        ("{{step}}", r"expected \{step\}"),
        ("{step}_{loss}", r"no variable \{loss\}"),
        ("{}", r"no variable \{\}"),
        ("{0}_{step}", r"no variable \{0\}"),
        ("{step.real}", r"no variable \{step.real\}"),
        ("{step[0]}", "no variable"),
        ("{step!r}", "no variable"),
        ("{step:{epoch}}", "no variable"),
        ("{seconds}_{step}", r"no variable \{seconds\}"),
        ("step_{step", "is no template"),
        ("step_}{step}", "is no template"),
        ("{step:zz}", "does not fit its variable"),
        ("{step:.3d}", "does not fit its variable"),
        ("{run_name:d}_{step}", "does not fit its variable"),
        ("{step:.2e}", "two steps the same name"),
        ("{step:g}", "two steps the same name"),
        ("run/step_{step}", "direct subdirectories"),
        ("/step_{step}", "no plain name"),
        ("../step_{step}", "no plain name"),
        ("step_{step}/", "no plain name"),
        ("a\\{step}", "no plain name"),
        ("C:{step}", "no plain name"),
        ("a\n{step}", "no plain name"),
        (".step_{step}", "dot in front"),
        ("x" * MAX_NAME_BYTES + "{step}", "expected at most"),
    ],
)
def test_what_gives_no_name_is_refused_at_once(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        DirectoryTemplate(text)
    assert repr(text) in str(caught.value)
    assert "variables are {step}, {epoch}, {tokens}, {samples}, {evals}, {run_name}" in str(caught.value)


@pytest.mark.parametrize("run_name", ["a/b", "..", "a\\b", "a\0b", "x" * MAX_NAME_BYTES])
def test_a_run_name_does_not_lead_elsewhere(run_name: str) -> None:
    with pytest.raises(UsageError, match=r"^the directory name '\{run_name\}\{step\}': gives"):
        DirectoryTemplate("{run_name}{step}").format(SOME, run_name)


def test_a_run_name_that_is_asked_for_and_not_given() -> None:
    with pytest.raises(UsageError, match="pass run_name="):
        DirectoryTemplate("{run_name}_{step}").format(SOME)


def test_the_name_of_the_pointer_is_taken() -> None:
    with pytest.raises(UsageError, match="name of the pointer"):
        DirectoryTemplate("step_{step}", latest_name="step_40")
    with pytest.raises(UsageError, match="name of the pointer"):
        DirectoryTemplate("{run_name}_{step}", latest_name="best_40").format(SOME, "best")
    DirectoryTemplate("step_{step}", latest_name=None)
    DirectoryTemplate("step_{step:04d}", latest_name="step_40")


def test_names_of_steps_have_room_for_the_endings_of_what_is_unfinished() -> None:
    text = "x" * (MAX_NAME_BYTES - 16) + "{step}"
    name = DirectoryTemplate(text).format(Progress(step=10**15))
    assert len(name) == MAX_NAME_BYTES
    assert len(f".{name}.deleted.partial") <= 255


def test_equal_templates_are_equal() -> None:
    first: Any = DirectoryTemplate("a{step}")
    assert first == DirectoryTemplate("a{step}")
    assert first != DirectoryTemplate("b{step}")
