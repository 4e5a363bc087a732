"""When tools/bootstrap.py installs, and what it then runs; nothing is really installed here."""

import ast
import json
import sys

import pytest

from tools import bootstrap


class Recorder:
    """Stands for `bootstrap.run`: keeps the commands, and lets `venv` leave a Python behind as the real one does."""

    def __init__(self, environment):
        self.environment = environment
        self.commands = []
        self.variables = []
        self.statuses = {}

    def __call__(self, command, *, env=None, show=None):
        self.commands.append([str(word) for word in command])
        self.variables.append(env)
        if "venv" in command:
            self.environment.python.parent.mkdir(parents=True, exist_ok=True)
            self.environment.python.symlink_to(sys.executable)
        return next((status for word, status in self.statuses.items() if word in command), 0)

    def count(self, word):
        return sum(word in command for command in self.commands)


@pytest.fixture
def environment(tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    for name in bootstrap.TO_DEVELOP:
        (tmp_path / name).write_text(f"package-of-{name}\n", encoding="utf-8")
    return bootstrap.Environment(tmp_path / ".venv")


@pytest.fixture
def ran(environment, monkeypatch):
    recorder = Recorder(environment)
    monkeypatch.setattr(bootstrap, "run", recorder)
    return recorder


def test_only_the_standard_library_is_imported():
    tree = ast.parse(bootstrap.Path(bootstrap.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def test_the_first_call_creates_and_installs_and_the_second_does_nothing(environment, ran):
    environment.prepare(bootstrap.TO_RUN)
    assert (ran.count("venv"), ran.count("pip")) == (1, 1)
    assert "requirements.txt" in ran.commands[-1]
    assert "requirements-dev.txt" not in ran.commands[-1]
    environment.prepare(bootstrap.TO_RUN)
    assert (ran.count("venv"), ran.count("pip")) == (1, 1)


def test_developing_adds_to_what_running_installed_and_running_then_needs_nothing(environment, ran):
    environment.prepare(bootstrap.TO_RUN)
    environment.prepare(bootstrap.TO_DEVELOP)
    assert (ran.count("venv"), ran.count("pip")) == (1, 2)
    environment.prepare(bootstrap.TO_RUN)
    assert ran.count("pip") == 2


def test_a_changed_requirements_file_is_installed_into_the_same_environment(environment, ran, tmp_path):
    environment.prepare(bootstrap.TO_RUN)
    (tmp_path / "requirements.txt").write_text("another\n", encoding="utf-8")
    environment.prepare(bootstrap.TO_RUN)
    assert (ran.count("venv"), ran.count("pip")) == (1, 2)


@pytest.mark.parametrize("status", [1, 130], ids=["failed", "interrupted"])
def test_an_unfinished_installation_is_done_again(environment, ran, status):
    ran.statuses = {"pip": status}
    with pytest.raises(bootstrap.SetupError) as failure:
        environment.prepare(bootstrap.TO_RUN)
    assert failure.value.status == status
    ran.statuses = {}
    environment.prepare(bootstrap.TO_RUN)
    assert (ran.count("venv"), ran.count("pip")) == (1, 2)


def test_an_unfinished_update_is_done_again(environment, ran, tmp_path):
    environment.prepare(bootstrap.TO_RUN)
    (tmp_path / "requirements.txt").write_text("another\n", encoding="utf-8")
    ran.statuses = {"pip": 1}
    with pytest.raises(bootstrap.SetupError):
        environment.prepare(bootstrap.TO_RUN)
    (tmp_path / "requirements.txt").write_text("package-of-requirements.txt\n", encoding="utf-8")
    ran.statuses = {}
    environment.prepare(bootstrap.TO_RUN)
    assert ran.count("pip") == 3


def test_another_python_makes_another_environment(environment, ran):
    environment.prepare(bootstrap.TO_RUN)
    stamp = json.loads(environment.stamp.read_text(encoding="utf-8"))
    stamp["identity"] = f"Python 3.7 in {environment.folder}"
    environment.stamp.write_text(json.dumps(stamp), encoding="utf-8")
    environment.python.unlink()
    environment.prepare(bootstrap.TO_RUN)
    assert (ran.count("venv"), ran.count("pip")) == (2, 2)


def test_an_environment_of_another_place_is_not_cleared_through_a_link(environment, ran, tmp_path):
    environment.prepare(bootstrap.TO_RUN)
    linked = bootstrap.Environment(tmp_path / "clone" / ".venv")
    linked.folder.parent.mkdir()
    linked.folder.symlink_to(environment.folder, target_is_directory=True)
    with pytest.raises(bootstrap.SetupError, match=r"is a link to an environment of another place .* delete the link"):
        linked.prepare(bootstrap.TO_RUN)
    assert ran.count("venv") == 1
    assert environment.python.exists()


def test_an_environment_made_by_hand_is_kept(environment, ran):
    environment.python.parent.mkdir(parents=True)
    environment.python.symlink_to(sys.executable)
    environment.prepare(bootstrap.TO_RUN)
    assert (ran.count("venv"), ran.count("pip")) == (0, 1)


def test_a_python_without_ensurepip_is_told_the_package(environment, ran, monkeypatch):
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(bootstrap.SetupError, match="install the package python3-venv"):
        environment.prepare(bootstrap.TO_RUN)


def test_the_whole_suite_runs_in_processes_of_one_thread_and_a_selection_in_one(environment, ran, monkeypatch):
    monkeypatch.setattr(bootstrap.os, "cpu_count", lambda: 2)
    bootstrap.test(environment, [])
    assert ran.commands[-1][2:] == ["pytest", "-n", "2", "--dist", "worksteal"]
    assert ran.variables[-1]["OMP_NUM_THREADS"] == "1"
    assert ran.variables[-1]["HF_HUB_OFFLINE"] == "1"
    bootstrap.test(environment, ["-k", "merge"])
    assert ran.commands[-1][2:] == ["pytest", "-k", "merge"]


def test_check_runs_every_tool_and_reports_the_first_failure(environment, ran):
    ran.statuses = {"format": 1, "mypy": 2}
    assert bootstrap.check(environment, []) == 1
    assert [command[3] if len(command) > 3 else command[2] for command in ran.commands[-3:]] == ["check", "format", "mypy"]


def test_the_demo_gets_its_arguments_and_its_status_is_passed_on(environment, ran):
    ran.statuses = {"tools.demo.run": 3}
    assert bootstrap.demo(environment, ["--output", "x"]) == 3
    assert ran.commands[-1][1:] == ["-m", "tools.demo.run", "--output", "x"]


def test_the_scripts_of_the_environment_come_first(environment):
    variables = environment.variables()
    assert variables["PATH"].startswith(str(environment.scripts) + bootstrap.os.pathsep)
    assert variables["VIRTUAL_ENV"] == str(environment.folder)


def test_an_unknown_job_is_answered_with_the_known_ones(capsys):
    assert bootstrap.main(["tset"]) == 2
    assert "there is no job tset; known are install, demo, test, check and help" in capsys.readouterr().err


def test_an_old_python_is_refused_in_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 18))
    assert bootstrap.main(["test"]) == 2
    assert capsys.readouterr().err == (
        "bootstrap: Python 3.11 or later is needed, and this is 3.9.18; run it with a newer one\n"
    )


def test_ctrl_c_says_nothing(capsys, monkeypatch):
    def interrupted(environment, arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(bootstrap.JOBS, "test", interrupted)
    assert bootstrap.main(["test"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "news"),
    [
        (
            "  Downloading torch-2.13.0-cp311-manylinux_2_28_x86_64.whl (526.1 MB)\n",
            "torch-2.13.0-cp311-manylinux_2_28_x86_64.whl (526.1 MB)",
        ),
        ("  Downloading https://files.example/a/ruff-0.17.5.whl (10.6 MB)\n", "ruff-0.17.5.whl (10.6 MB)"),
        ("  Downloading diffusers-0.42.1-py3-none-any.whl.metadata (20 kB)\n", ""),
        ("Requirement already satisfied: torch\n", ""),
        ("Installing collected packages: mpmath, torch\n", "unpacking"),
        ("\n", ""),
    ],
)
def test_of_pip_only_the_large_files_are_shown(line, news):
    assert bootstrap.news_of_pip(line) == news


def test_a_command_is_printed_and_its_status_and_chosen_lines_passed_on(capfd, environment):
    script = "print('keep this'); print('drop that'); raise SystemExit(7)"
    assert bootstrap.run([sys.executable, "-c", script], show=lambda line: line.strip() if "keep" in line else "") == 7
    out = capfd.readouterr().out
    assert out.startswith("$ ")
    assert out.splitlines()[1:] == ["  keep this"]
