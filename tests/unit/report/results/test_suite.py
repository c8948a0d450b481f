"""Results of a suite: read or refused in one line, and reduced to some of its models."""

import json

import pytest

from esm2mega.errors import UserError
from esm2mega.report.results.suite import read_suite
from tests.pages.demo import write_demo_results


def test_of_some_models_their_rows_and_differences_stay_and_the_baselines(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(write_demo_results(tmp_path)))
    suite = read_suite(tmp_path)
    assert suite.folder == tmp_path == read_suite(tmp_path / "results.json").folder
    two = {"run@step_500", "run@step_1000"}
    kept = suite.of_models(two).results
    assert {model["name"] for model in kept["models"]} == two and len(kept["tasks"]) == 4
    for task, before in zip(kept["tasks"], suite.results["tasks"], strict=True):
        assert {row["model"] for row in task["rows"] if row["row"] == "model"} == two
        others = [row for row in before["rows"] if row["row"] != "model"]
        assert [row for row in task["rows"] if row["row"] != "model"] == others
        assert [(each["a"]["model"], each["b"]["model"]) for each in task["differences"]] == [
            ("run@step_500", "run@step_1000")
        ]


@pytest.mark.parametrize("content", [None, "[", "[]", "{}", '{"models": [{"name": "a"}]}'])
def test_what_no_suite_wrote_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"^--results .*: holds no results of `esm2mega autoeval`.*it wrote"):
        read_suite(tmp_path)
