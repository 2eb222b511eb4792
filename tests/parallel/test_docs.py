"""The examples of docs/planner.md run, and its configuration loads."""

import re
from pathlib import Path

from torchrec_sid.parallel.planner_file import load_planner_config

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "planner.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [example] = blocks("python")
    exec(compile(example, "docs/planner.md", "exec"), {"__name__": "example"})
    assert "t_history" in capsys.readouterr().out


def test_the_yaml_example_loads(tmp_path):
    [example] = blocks("yaml")
    (tmp_path / "planner.yaml").write_text(example)
    config = load_planner_config(tmp_path / "planner.yaml")
    assert config.tables["t_item_prefix"].cache_load_factor == 0.2
    assert config.topology.value("inter_node_gbps") == 25
