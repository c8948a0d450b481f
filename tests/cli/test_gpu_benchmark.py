"""The benchmark for a GPU measures in reduced form on the CPU, goes on after a kill, and counts rightly."""

from __future__ import annotations

import importlib
import json
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]

# In the place of gpu_measure.py: conditions, and what each line does.
STAND_IN = """
import json, subprocess, sys, time
from pathlib import Path
name, folder = sys.argv[1], Path(sys.argv[2])
with open(folder / "calls", "a") as file:
    file.write(name + "\\n")
if name == "conditions":
    rows = [{"device": "none", "torch": "2.0"}]
elif name == "peaks":
    rows = [{"what": "bf16 product", "TFLOP/s": 2.0}, {"what": "copy", "TB/s": 1.0}]
elif name == "train-8M":
    rows = [{"tokens/s": 123456, "TFLOP/s": 0.5, "GB": None}]
elif name == "train-35M":
    print("a traceback")
    sys.exit("out of memory")
else:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "pid").write_text(str(child.pid))
    time.sleep(60)
(folder / f"{name}.json").write_text(json.dumps(rows))
"""


@pytest.fixture(scope="module", autouse=True)
def _scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The script, with a stand-in for what each process measures."""
    module = importlib.import_module("gpu")
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in" / "gpu_measure.py").write_text(STAND_IN)
    monkeypatch.setattr(module, "HERE", tmp_path / "stand_in")
    return module


def calls(folder):
    return (folder / "calls").read_text().split()


def test_finished_lines_are_not_measured_again(gpu, tmp_path, capsys):
    out, work = tmp_path / "out.jsonl", tmp_path / "out.work"
    arguments = ["--reduced", "--out", str(out), "--lines", "peaks,train-8M,train-35M"]
    with pytest.raises(SystemExit, match="1"):
        gpu.main(arguments)
    assert calls(work) == ["conditions", "peaks", "train-8M", "train-35M"]
    printed = capsys.readouterr().out
    assert f"FAILED: out of memory ({work}/train-35M.log)" in printed
    assert "| train-8M | 123,456 | 0.5 |  | 25% |" in printed
    assert "train-35M: out of memory" in printed.splitlines()[-1]
    # As a kill leaves it: the last line is torn, and measured again like the one that failed.
    lines = out.read_text().splitlines(keepends=True)
    assert [json.loads(line)["line"] for line in lines] == ["conditions", "peaks", "train-8M", "train-35M"]
    out.write_text("".join(lines[:2]) + lines[2][:20])
    (work / "calls").unlink()
    with pytest.raises(SystemExit, match="1"):
        gpu.main(arguments)
    assert calls(work) == ["conditions", "train-8M", "train-35M"]
    assert "| train-8M | 123,456 |" in capsys.readouterr().out


def test_other_conditions_need_another_file(gpu, tmp_path):
    arguments = ["--reduced", "--out", str(tmp_path / "out.jsonl"), "--lines", "peaks"]
    gpu.main(arguments)
    script = gpu.HERE / "gpu_measure.py"
    script.write_text(script.read_text().replace('"2.0"', '"2.1"'))
    with pytest.raises(SystemExit, match="measured with torch 2.0, here it is 2.1: name another file"):
        gpu.main(arguments)


def test_a_line_that_hangs_is_ended_with_all_that_it_started(gpu, tmp_path):
    entry = gpu.measured("syncs-8M", 2, tmp_path, reduced=True, on_cpu=True)
    assert entry == {"line": "syncs-8M", "failed": "not finished after 2 s"}
    assert not (tmp_path / "syncs-8M.json").exists()
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child of the measured process lives on"
        time.sleep(0.05)


def test_no_line_begins_when_the_minutes_are_over(gpu, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        gpu.main(["--reduced", "--out", str(tmp_path / "out.jsonl"), "--lines", "peaks", "--minutes", "0"])
    assert calls(tmp_path / "out.work") == ["conditions"]
    assert "the time is over before peaks" in capsys.readouterr().out


@pytest.mark.parametrize("measured", [False, True])
def test_fp8_is_measured_where_there_is_some(gpu, tmp_path, capsys, monkeypatch, measured):
    here = {"device": "a GPU", "fp8": measured}
    rows = {"conditions": [here], "train-3B-fp8": [{"ms": 1}]}
    monkeypatch.setattr(gpu, "measured", lambda name, *_: {"line": name, "seconds": 1, "rows": rows[name]})
    gpu.main(["--out", str(tmp_path / "out.jsonl"), "--lines", "train-3B-fp8"])
    printed = capsys.readouterr().out
    assert ("left out: train-3B-fp8, which needs Transformer Engine and" in printed) != measured
    assert ("| train-3B-fp8 | 1 |" in printed) == measured


@pytest.mark.parametrize(
    ("layers", "capability", "found"), [("local", (9, 0), False), ("te", (8, 0), False), ("te", (8, 9), True)]
)
def test_fp8_needs_transformer_engine_and_its_card(monkeypatch, layers, capability, found):
    measure = importlib.import_module("gpu_measure")
    monkeypatch.setattr(measure, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(measure, "choose_layer_spec", lambda *_: layers)
    monkeypatch.setattr("esm2mega.model.kernels.fp8.is_te_min_version", lambda version: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert measure._has_fp8() == found


def test_no_gpu_and_unknown_lines_are_one_line_errors(gpu, tmp_path, capsys):
    with pytest.raises(SystemExit, match="^no CUDA device: run this where there is one, or --reduced"):
        gpu.main(["--out", str(tmp_path / "out.jsonl")])
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--lines", "trian"])
    assert stop.value.code == 2
    assert "no line begins with 'trian'" in capsys.readouterr().err


def test_a_line_runs_in_a_process_of_its_own(tmp_path):
    """The real script, once: the others are measured in this process."""
    entry = importlib.import_module("gpu").measured("peaks", 240, tmp_path, reduced=True, on_cpu=True)
    assert "failed" not in entry, entry
    assert [row["what"] for row in entry["rows"]][0] == "bf16 [128, 128] x [128, 128]"
    assert all(row.get("TFLOP/s", row.get("TB/s")) > 0 for row in entry["rows"])


@pytest.fixture(scope="module")
def measure():
    if torch.cuda.is_available():
        pytest.skip("with a GPU the reduced form needs a process that does not see it")
    measurements = importlib.import_module("gpu_measure").MEASUREMENTS
    lines = {line.name: line.reduced() for line in importlib.import_module("gpu_lines").LINES}
    return lambda name, folder: list(measurements[lines[name].measurement](lines[name], folder))


def test_steps_are_measured(measure, tmp_path):
    (ours,) = measure("train-650M", tmp_path)
    (theirs,) = measure("hf-650M", tmp_path)
    assert ours["tokens/step"] == theirs["tokens/step"] == 512
    assert (ours["attention"], ours["layers"], ours["fp8"]) == ("sdpa", "local", None)
    assert ours["micro-batches"] == 2
    assert theirs["computed/real"] >= 1 and not theirs["compiled"]
    for row in (ours, theirs):
        assert 0 < row["fastest"] <= row["ms/step"] <= row["slowest"]
        assert row["tokens/s"] == pytest.approx(1e3 * 512 / row["ms/step"], rel=0.01)
    # The products with weights alone are 2.48 GFLOP.
    assert ours["TFLOP/s"] >= 0.99 * 2.48e-3 / (ours["ms/step"] / 1e3)


@pytest.mark.slow
def test_a_compiled_peer_is_measured(measure, tmp_path):
    (row,) = measure("hf-650M-1024-compile", tmp_path)
    assert (row["tokens/step"], row["computed/real"], row["compiled"]) == (512, 1, True)


def test_a_profile_names_kernels(measure, tmp_path):
    total, *kernels = measure("profile-650M", tmp_path)
    assert "aten::mm" in {row["kernel"] for row in kernels}
    assert sum(row["ms"] for row in kernels) <= total["ms"] * 1.01
    assert [row["ms"] for row in kernels] == sorted((row["ms"] for row in kernels), reverse=True)


def test_a_cpu_waits_for_nothing(measure, tmp_path):
    assert measure("syncs-8M", tmp_path) == [{"place": "all, 2 micro-batches", "times/step": 0}]


@pytest.mark.parametrize("name", ["embed-650M-fp32", "embed-hf-650M-bf16"])
def test_embedding_is_measured(name, measure, tmp_path):
    (row,) = measure(name, tmp_path)
    assert (row["precision"], row["tokens"]) == (name[-4:], 512) and row["tokens/s"] > 0
    assert row["GB"] > 0 and (row["computed/real"] > 1) == ("hf" in name)


def test_the_same_steps_twice_have_the_same_bits(measure, tmp_path, monkeypatch):
    (row,) = measure("twice-fp32-sdpa", tmp_path)
    assert row["bits equal"] and not torch.are_deterministic_algorithms_enabled()
    parity = importlib.import_module("gpu_parity")
    monkeypatch.setattr(parity, "same_bits", lambda mine, theirs: False)
    with pytest.raises(SystemExit, match="the same steps twice have different bits"):
        measure("twice-fp32-sdpa", tmp_path)


def test_shares_are_those_of_the_product_of_their_precision(gpu, tmp_path):
    journal = gpu.Journal(tmp_path / "out.jsonl")
    products = [("bf16 a", 4.0), ("bf16 b", 8.0), ("fp32 a", 1.0)]
    rows = [{"what": what, "TFLOP/s": rate} for what, rate in products] + [{"what": "copy", "TB/s": 9.0}]
    assert gpu._share_of_peak({"TFLOP/s": 2.0}, "train", journal) == {}
    journal.add({"line": "peaks", "rows": rows})
    assert gpu._share_of_peak({"TFLOP/s": 2.0}, "train", journal) == {"of peak": "25%"}
    assert gpu._share_of_peak({"TFLOP/s": 0.5, "precision": "fp32"}, "embed", journal) == {"of peak": "50%"}
    assert gpu._share_of_peak({"TFLOP/s": 0.5}, "parity", journal) == {}


def test_parity_compares_what_lines_leave(measure, tmp_path):
    with pytest.raises(SystemExit, match="measure parity-cpu-fp32-sdpa first"):
        measure("parity-bf16-sdpa", tmp_path)
    (reference,) = measure("parity-cpu-fp32-sdpa", tmp_path)
    (same,) = measure("parity-fp32-sdpa", tmp_path)
    (rounded,) = measure("parity-bf16-sdpa", tmp_path)
    assert same["losses"] == reference["losses"] and "bits equal" not in reference
    assert same["gradients differ"] == same["weights differ"] == "0.0e+00" and same["bits equal"]
    assert 1e-4 < float(rounded["gradients differ"]) < 0.1
    assert 1e-5 < float(rounded["weights differ"]) < 0.1 and not rounded["bits equal"]


def test_waits_are_counted_by_place():
    def work():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("of something else", stacklevel=1)

    places = importlib.import_module("gpu_steps").waits_of(work)
    line = work.__code__.co_firstlineno + 2
    assert places == {f"tests/cli/test_gpu_benchmark.py:{line}": 3}


def test_lines_are_measured_after_what_they_are_compared_with():
    lines = importlib.import_module("gpu_lines").LINES
    names = [line.name for line in lines]
    assert len(set(names)) == len(names)
    measurements = importlib.import_module("gpu_measure").MEASUREMENTS
    assert {line.measurement for line in lines} == set(measurements)
    for number, line in enumerate(lines):
        assert line.reference is None or line.reference in names[:number]
