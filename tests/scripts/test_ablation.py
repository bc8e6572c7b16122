"""The script that trains the rows of a table: records, table, and what it refuses."""

import argparse
import json
import os
import subprocess
import sys

import pytest

from fpt_jax.configs.ablations import ABLATIONS, Row, Table
from fpt_jax.run.command_line import check_field, load_config
from scripts import ablation, ablation_page
from tests.runs import QUICK, ROOT

FLAGS = (
  "--config.steps=2",
  "--config.data.builder.train_size=16",
  "--config.data.builder.val_size=4",
)


def run(*arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, ROOT / "scripts" / "ablation.py", *arguments]
  environment = os.environ | QUICK | {"JAX_PLATFORMS": "cpu"}
  return subprocess.run(
    command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment
  )


@pytest.mark.slow
def test_a_run_is_recorded_and_not_run_again(tmp_path):
  arguments = (
    "table4",
    "--only=UFP",
    "--seeds=3",
    f"--out={tmp_path}/results",
    f"--runs={tmp_path}/runs",
  )
  arguments += (f"--data_dir={tmp_path}/data", "--", *FLAGS)
  first = run(*arguments)
  assert first.returncode == 0, first.stderr
  results = tmp_path / "results"
  (line,) = (results / "table4.jsonl").read_text().splitlines()
  record = json.loads(line)
  assert (record["row"], record["seed"], record["shared"]) == ("UFP", 3, " ".join(FLAGS))
  assert record["command"].startswith(
    "python -m fpt_jax.main --config=configs/cityscapes.py:demo,fpt=none "
  )
  assert record["figures"]["step"] == 2 and 0 <= record["figures"]["mIoU"] <= 100
  assert [step for step, _ in record["losses"]] == [2] and str(tmp_path) not in line
  page = (tmp_path / "results.md").read_text()
  assert f"| UFP | {record['figures']['mIoU']:.1f} | 79.1 | 1 |" in page
  assert "](results/table4.png)" in page and (results / "table4.png").stat().st_size > 0

  (tmp_path / "runs").rename(tmp_path / "elsewhere")
  second = run(*arguments)
  assert second.returncode == 0, second.stderr
  assert (results / "table4.jsonl").read_text().splitlines() == [line]
  assert (tmp_path / "results.md").read_text() == page
  assert not (tmp_path / "runs").exists()


def test_a_run_of_another_table_is_copied(tmp_path):
  flags = ("--config.steps=2",)
  (row,) = (row for row in ABLATIONS["table1"].rows if row.name == "BFP+ST+GT+RT")
  figures = {"step": 2, "segm/AP": 12.5, "bbox/AP": 20.0}
  line = ablation.Run(row, 3, flags).recorded | {"figures": figures, "losses": [[2, 1.0]]}
  line |= {"minutes": 1.0, "machine": "one core", "date": "2026-01-01"}
  (tmp_path / "table1.jsonl").write_text(json.dumps(line) + "\n")
  folders = (f"--out={tmp_path}", f"--runs={tmp_path}/runs", f"--data_dir={tmp_path}/data")
  found = run("necks", "--only=BFP+FPT", "--seeds=3", *folders, "--", *flags)
  assert found.returncode == 0, found.stderr
  assert json.loads((tmp_path / "necks.jsonl").read_text()) == line | {"row": "BFP+FPT"}
  assert not (tmp_path / "runs").exists() and not (tmp_path / "data").exists()


def test_a_failed_run_is_reported_and_not_recorded(tmp_path):
  folders = (f"--out={tmp_path}", f"--runs={tmp_path}/runs", f"--data_dir={tmp_path}/data")
  found = run("table4", "--only=UFP", *folders, "--", *FLAGS[1:], "--config.steps=-1")
  assert found.returncode == 1 and "Traceback" not in found.stderr
  assert found.stderr.splitlines()[-1].startswith("error: ")
  assert not (tmp_path / "table4.jsonl").exists()


def test_table_and_curves_of_recorded_runs():
  table = Table(
    "Two rows", ("segm/AP", "context/accuracy"), (Row("A", "a.py", paper=30.0), Row("B", "b.py"))
  )

  def recorded(seed, ap, loss):
    figures = {"step": 40, "segm/AP": ap} | ({"context/accuracy": 50.0} if seed else {})
    losses = [[20, loss], [40, loss / 2]]
    common = {"minutes": 2.0 + seed, "machine": "one core", "date": f"2026-01-0{seed + 1}"}
    return {"seed": seed, "figures": figures, "losses": losses} | common

  rows = {
    table.rows[0]: [recorded(0, 10.0, 4.0), recorded(1, 20.0, 2.0)],
    table.rows[1]: [recorded(0, 5.0, 1.0)],
  }
  one = {table.rows[0]: rows[table.rows[0]]}
  shared = "--config.steps=40"
  page = ablation_page.markdown("two", table, one, shared, picture="two.png")
  assert "two --seeds=0,1 '--only=A' -- --config.steps=40\n" in page
  page = ablation_page.markdown("two", table, rows, shared, picture="two.png")
  assert "python scripts/ablation.py two --seeds=0,1 -- --config.steps=40\n" in page
  # the deviation of 10 and 20 from 15 is 5; with one degree of freedom less, the square root of 50
  assert "| A | 15.0 ± 7.1 | 50.0 | 30.0 | 2 | 2 |\n" in page
  assert "| B | 5.0 | - | - | 1 | 2 |\n" in page
  assert "one core; 2026-01-01 to 2026-01-02" in page
  curves, bars = ablation_page.draw(table, rows).axes
  assert [line.get_ydata().tolist() for line in curves.lines[:2]] == [[3.0, 1.5], [1.0, 0.5]]
  assert [patch.get_width() for patch in bars.patches] == [15.0, 5.0]


def test_other_flags_have_another_folder():
  row = Row("BFP+ST", "a.py:fpt=st")
  runs = [
    ablation.Run(row, 0, ()),
    ablation.Run(row, 1, ()),
    ablation.Run(row, 0, ("--config.steps=900",)),
    ablation.Run(row, 0, (), initialised=True),
    ablation.Run(row, 0, (), devices=8),
    ablation.Run(Row("BFP+ST", "a.py:fpt=st", ("--config.model.fpt.scale=1.0",)), 0, ()),
  ]
  folders = {run.folder for run in runs}
  assert len(folders) == 6 and all(folder.startswith("bfp_st_") for folder in folders)


def test_runs_of_other_commands_are_not_reported():
  table = ABLATIONS["camvid"]
  options = argparse.Namespace(flags=(), init_from="")
  row = table.rows[0]
  now = ablation.run_of(row, table, 1, options).recorded | {"figures": {}}
  before = now | {"command": now["command"].replace(" --config.init_from=...", "")}
  assert "--config.init_from=..." in now["command"]
  assert ablation.runs_of(row, table, [before, now, {"row": row.name}], options) == [now]


def test_records_that_are_not_json_are_reported(tmp_path):
  (tmp_path / "table1.jsonl").write_text('{"row": "BFP"}\n{"row": "BF')
  with pytest.raises(SystemExit, match=r"table1\.jsonl: a line is not JSON"):
    ablation.read(tmp_path / "table1.jsonl")


def test_every_row_is_a_config():
  for name, table in ABLATIONS.items():
    names = [row.name for row in table.rows]
    assert len(set(names)) == len(names), name
    assert not any("," in row for row in names), name  # --only separates them by commas
    for row in table.rows:
      config = load_config(row.config)
      for flag in row.flags:
        path, _, value = flag.removeprefix("--config.").partition("=")
        check_field(config, path, value)
      sizes = [
        int(dict(f.split("=") for f in row.flags).get(f"--config.{group}batch_size", default))
        for group, default in (("", config.batch_size), ("eval.", config.eval.batch_size))
      ]
      assert all(size % table.devices == 0 for size in sizes), row


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("table9",), "invalid choice: 'table9'"),
    (("table1", "--only=BFB"), "table1 has no row 'BFB'; choose from BFP, "),
    (("table1", "--seeds=a"), "--seeds=a must be numbers"),
    (("table1", "--processes=0"), "--processes=0 must be 1 to "),
    (("camvid",), "camvid needs --source, such as --source=/data/camvid"),
    (("camvid", "--source=a"), "camvid needs --init_from, such as --init_from=/runs/"),
    (("table1", "--report", "--", "--config.steps=7"), "no run with the flags '--config.steps=7'"),
  ],
)
def test_errors(arguments, message, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["ablation.py", f"--out={tmp_path}", *arguments])
  with pytest.raises(SystemExit) as error:
    ablation.main()
  assert message in capsys.readouterr().err + str(error.value)


@pytest.mark.parametrize(
  ("machine", "arguments", "message"),
  [
    (("gpu", "NVIDIA X"), ("table2",), "set JAX_PLATFORMS=cpu"),
    (("tpu", "TPU v5"), ("table1", "--processes=2"), "a TPU belongs to one process"),
  ],
)
def test_accelerators_have_limits(machine, arguments, message, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(ablation, "this_machine", lambda: ablation.Machine(*machine))
  monkeypatch.setattr(ablation, "allowed_cores", lambda: [0, 1])
  monkeypatch.setattr(sys, "argv", ["ablation.py", f"--out={tmp_path}", *arguments])
  with pytest.raises(SystemExit):
    ablation.main()
  assert message in capsys.readouterr().err


def test_runs_on_a_gpu_share_it_and_are_deterministic(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/a")
  gpu, cpu = ablation.Machine("gpu", "NVIDIA X"), ablation.Machine("cpu", "AMD Y")
  assert gpu.environment["XLA_FLAGS"] == "--xla_dump_to=/tmp/a --xla_gpu_deterministic_ops=true"
  assert gpu.environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false" and not cpu.environment
  assert gpu.share_of(1) == "NVIDIA X" and gpu.share_of(8) == "NVIDIA X, shared by up to 8 runs"
  assert cpu.share_of(2) == "one core of AMD Y"
  assert ablation.this_machine().platform == "cpu"
