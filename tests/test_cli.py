"""The console command, and how every command starts and ends: help, errors, Ctrl-C, closed and full streams."""

import importlib
import os
import signal
import subprocess
import sys

import pytest
from programs import (
    QUICK,
    cache,  # noqa: F401
    command,
    environment,
    error_line,
    run_here,
    started,
    steps_of,
    write_text,
)

from llm_numba import __main__ as program
from llm_numba.util import cli

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")


def python(code, *arguments, redirect="", **changes):
    """Run Python code in a subprocess, with a redirection of the shell."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(**changes),
        timeout=120,
    )


def run_program(monkeypatch, capfd, *arguments):
    """(exit status, output, errors) of `llm-numba ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["llm-numba", *arguments])
    with pytest.raises(SystemExit) as finished:
        program.main()
    return finished.value.code, *capfd.readouterr()


# ---------------------------------------------------------------------------------------------------------------------
# The console command


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_every_command(monkeypatch, capfd, arguments):
    status, out, err = run_program(monkeypatch, capfd, *arguments)
    assert (status, err) == (0, "")
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert listed == list(program.COMMANDS)


def test_an_unknown_command_suggests_the_nearest(monkeypatch, capfd):
    status, out, err = run_program(monkeypatch, capfd, "trian")
    assert (status, out, err) == (2, "", "error: trian: no such command; did you mean train?\n")
    status, out, err = run_program(monkeypatch, capfd, "xyzzy")
    assert status == 2 and all(name in err for name in program.COMMANDS)


@pytest.mark.parametrize("name", program.COMMANDS)
def test_the_help_of_a_command_has_its_name(monkeypatch, capfd, name):
    status, out, err = run_program(monkeypatch, capfd, name, "--help")
    assert (status, err) == (0, "") and out.startswith(f"usage: llm-numba {name} ")


def test_three_ways_to_run_a_command(tmp_path):
    console = [sys.executable, "-c", "from llm_numba.__main__ import main; main()", "plot"]
    ways = [command("plot"), [sys.executable, "-m", "llm_numba.plot"], console]
    results = [
        subprocess.run([*way, "absent"], capture_output=True, text=True, env=environment(), cwd=tmp_path)
        for way in ways
    ]
    assert {(done.returncode, done.stdout) for done in results} == {(2, "")}
    assert {done.stderr for done in results} == {"error: absent: cannot be read (No such file or directory)\n"}


def test_help_loads_no_library():
    code = (
        "import sys; from llm_numba import __main__; __main__.usage(); assert not {'numba', 'numpy'} & {*sys.modules}"
    )
    assert python(code).returncode == 0


def test_a_command_is_quoted_for_the_shell():
    assert cli.command("train", "--resume", "my run", "--steps", 4) == "llm-numba train --resume 'my run' --steps 4"


# ---------------------------------------------------------------------------------------------------------------------
# Missing packages


@pytest.mark.parametrize(
    "module, hint",
    [
        ("numba.cuda.np", 'numba-cuda is not installed: pip install -e ".[cuda]"'),
        ("cuda.bindings", 'cuda-bindings is not installed: pip install -e ".[cuda]"'),
        ("tiktoken", "tiktoken is not installed: pip install -e ."),
        ("wandb", 'wandb is not installed: pip install -e ".[wandb]"'),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(capfd, module, hint):
    def main():
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    with pytest.raises(SystemExit) as stopped:
        cli.exit_with(main)
    assert error_line(stopped.value.code, capfd.readouterr().err) == f"error: {hint}\n"


def test_an_unknown_missing_module_is_a_traceback():
    def main():
        importlib.import_module("llm_numba.no_such_module")

    with pytest.raises(ModuleNotFoundError):
        cli.exit_with(main)


def test_every_hint_names_an_extra_of_pyproject():
    import tomllib

    with open(program.__file__.replace("llm_numba/__main__.py", "pyproject.toml"), "rb") as file:
        project = tomllib.load(file)["project"]
    assert set(cli.EXTRAS) - {""} <= set(project["optional-dependencies"])
    required = {name.split(">")[0].split("[")[0] for name in project["dependencies"]}
    assert set(cli.EXTRAS[""]) == required


# ---------------------------------------------------------------------------------------------------------------------
# Standard streams

PRINT = "import sys; from llm_numba.util import cli; cli.exit_with(lambda: print('text'))"
FAIL = "from llm_numba.util import cli; cli.exit_with(lambda: print(open('absent')))"


@posix
@pytest.mark.parametrize("unbuffered", [None, "1"])
@pytest.mark.parametrize(
    "redirect, status, out, err",
    [
        ("", 0, "text\n", ""),
        (">&-", 2, "", "error: standard output cannot be written (Bad file descriptor)\n"),
        (">/dev/full", 2, "", "error: standard output cannot be written (No space left on device)\n"),
        ("2>&-", 0, "text\n", ""),
        ("2>/dev/full", 0, "text\n", ""),
        ("<&- >&- 2>&-", 2, "", ""),
        (">/dev/full 2>/dev/full", 2, "", ""),
        ("| true", 141, "", ""),
    ],
)
def test_an_output_that_cannot_be_written(redirect, status, out, err, unbuffered):
    code = PRINT
    if redirect == "| true":  # a pipe whose reader has gone, without a race
        redirect, code = "", "import os; r, w = os.pipe(); os.dup2(w, 1); os.close(r); " + PRINT
    done = python(code, redirect=redirect, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


@posix
def test_an_error_of_another_file_is_not_blamed_on_the_output():
    done = python(FAIL)
    assert done.returncode == 1 and "FileNotFoundError" in done.stderr
    without_name = "from llm_numba.util import cli\ndef main(): raise OSError(28, 'No space left')\ncli.exit_with(main)"
    done = python(without_name)
    assert done.returncode == 1 and "OSError" in done.stderr


@posix
def test_a_file_does_not_get_the_number_of_a_closed_stream(tmp_path):
    """Else what a library prints would be written into it."""
    code = "import os, sys; from llm_numba.util import cli\n"
    code += "cli.exit_with(lambda: open(sys.argv[1], 'w').fileno() <= 2)"
    assert python(code, tmp_path / "file", redirect="<&- >&- 2>&-").returncode == 0


def test_characters_that_the_encoding_lacks_are_escaped():
    code = "from llm_numba.util import cli; cli.exit_with(lambda: print('caf\\u00e9'))"
    done = python(code, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING=None)
    assert (done.returncode, done.stdout) == (0, "caf\\xe9\n")


@posix
@pytest.mark.faults
@pytest.mark.compiled
@pytest.mark.parametrize("redirect, status, steps", [(">&-", 0, [2]), (">/dev/full", 2, [0]), ("2>&-", 0, [2])])
def test_training_without_a_stream_leaves_a_checkpoint(tmp_path, redirect, status, steps):
    text, folder = write_text(tmp_path / "text.txt"), tmp_path / "run"
    arguments = command("train", *QUICK, "--data", text, "--steps", 2, "--out", folder)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", *arguments], capture_output=True, text=True, env=environment()
    )
    full = "error: standard output cannot be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == (status, full if status else "")
    assert steps_of(folder) == steps
    if status:
        assert run_here("--resume", folder) == 0 and steps_of(folder) == [0, 2]


@posix
@pytest.mark.faults
@pytest.mark.compiled
@pytest.mark.parametrize(
    "arguments", [("train", *QUICK, "--plan-memory"), ("inspect", "nano", "--batch-size", 1)], ids=["plan", "inspect"]
)
def test_a_command_with_a_full_output(arguments):
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >/dev/full', "sh", *command(*arguments)], stderr=subprocess.PIPE, env=environment()
    )
    assert "standard output cannot be written" in error_line(done.returncode, done.stderr.decode())


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C

WAITING = """
import sys, time
from llm_numba.util import cli, ctrl_c
ctrl_c.exit_at_once()
def main():
    try:
        print("ready", flush=True)
        time.sleep(100)
    finally:
        {finally}
cli.exit_with(main)
"""


def interrupted(tmp_path, code, times):
    """(exit status, rest of the output, errors) of Python code that gets Ctrl-C once it has printed a line."""
    with started([sys.executable, "-c", code], tmp_path, text=True) as process:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        for _ in range(times):
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err


@posix
@pytest.mark.parametrize("times", [1, 2, 3, 20])
def test_ctrl_c_prints_one_line_however_often(tmp_path, times):
    status, _, err = interrupted(tmp_path, WAITING.replace("{finally}", "pass"), times)
    assert (status, err) == (130, "stopped by Ctrl-C\n")


@posix
def test_ctrl_c_lets_a_command_clean_up(tmp_path):
    clean = WAITING.replace("{finally}", "print('cleaned', flush=True)")
    assert interrupted(tmp_path, clean, 1) == (130, "cleaned\n", "stopped by Ctrl-C\n")


@posix
def test_a_second_ctrl_c_does_not_wait(tmp_path):
    slow = WAITING.replace("{finally}", "print('cleaning', flush=True); time.sleep(100)")
    with started([sys.executable, "-c", slow], tmp_path, text=True) as process:
        for line in "ready\n", "cleaning\n":
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGINT)
        assert (process.wait(timeout=60), process.stderr.read()) == (130, "stopped by Ctrl-C\n")


@posix
def test_ctrl_c_in_a_callback_of_the_compiler(tmp_path):
    """Python prints and drops an exception there; the process exits instead."""
    callback = """
import ctypes, os, signal, sys
from llm_numba.util import cli, ctrl_c
signal.signal(signal.SIGINT, signal.default_int_handler)
ctrl_c.exit_at_once()
compiler = {"__name__": "numba.core.codegen", "ctypes": ctypes}
exec("def compile(callback): ctypes.CFUNCTYPE(None)(callback)()", compiler)
print("ready", flush=True)
def main():
    compiler["compile"](lambda: os.kill(os.getpid(), signal.SIGINT))
    return 0
cli.exit_with(main)
"""
    done = subprocess.run([sys.executable, "-c", callback], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (130, "stopped by Ctrl-C\n")


@posix
def test_a_background_job_ignores_ctrl_c():
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from llm_numba.util import cli, ctrl_c\n"
    code += "ctrl_c.exit_at_once(); cli.exit_with(lambda: signal.raise_signal(signal.SIGINT) or 7)"
    assert python(code).returncode == 7


@posix
@pytest.mark.faults
@pytest.mark.compiled
@pytest.mark.parametrize("name", ["sample", "train"])
def test_ctrl_c_while_modules_are_loaded(tmp_path, name):
    """From the end of llm_numba's first module on, whichever module is being loaded."""
    whole = command(name, "--help")
    arguments = [*whole[:1], "-X", "importtime", *whole[1:]]
    for awaited in b" llm_numba\n", b" numpy\n", b" tiktoken\n":
        with started(arguments, tmp_path) as process:
            lines = iter(process.stderr.readline, b"")
            assert any(line.endswith(awaited) for line in lines), awaited
            process.send_signal(signal.SIGINT)
            said = [line for line in process.stderr if not line.startswith(b"import time:")]
            assert (process.wait(), said) == (130, [b"stopped by Ctrl-C\n"]), awaited
