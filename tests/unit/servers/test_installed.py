import sys

import pytest

from lightning_grpo.errors import ConfigError, ServerError
from lightning_grpo.servers.sglang import (
    NOT_ON_CPU,
    ServerPython,
    install_server,
    needs_on_cpu,
    remember_python,
    remembered_python,
    resolve_python,
)


@pytest.fixture(autouse=True)
def own_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def test_the_servers_python_is_remembered_until_it_is_gone(tmp_path):
    with pytest.raises(ConfigError, match="install-server"):
        resolve_python("auto")
    python = tmp_path / "python"
    python.touch()
    installed = ServerPython(str(python), "0.5.19", "cpu")
    file = remember_python(installed)
    assert resolve_python("auto") == installed
    assert resolve_python(str(python)) == installed
    assert resolve_python(sys.executable) == ServerPython(sys.executable)
    python.unlink()
    assert remembered_python() is None
    python.touch()
    file.write_text("{")
    assert remembered_python() is None


def test_an_interpreter_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="nowhere"):
        resolve_python("/nowhere/python")


def test_torch_comes_first_and_stays_and_nothing_for_gpus_comes_on_a_cpu():
    listed = (
        "aiohttp\taiohttp\ntorch\ttorch==2.13.0\nsglang-kernel\tsglang-kernel==0.4.6\n"
        "xgrammar\txgrammar==0.2.1\nflashinfer-python\tflashinfer_python[cu13]==0.6.18\n"
    )
    assert needs_on_cpu(listed) == [
        ["torch==2.13.0"],
        ["torch==2.13.0", "aiohttp", "triton"],
        ["--no-deps", "xgrammar==0.2.1"],
    ]
    assert not {"torch", "aiohttp"} & NOT_ON_CPU


def test_a_package_that_cannot_be_had_is_named(tmp_path):
    said = []
    with pytest.raises(ServerError, match=r"sglang==0\.0\.0"):
        install_server(
            tmp_path / "environment",
            version="0.0.0",
            pip_arguments=["--no-index", "--disable-pip-version-check"],
            say=said.append,
        )
    assert said == [f"making {tmp_path / 'environment'}", "installing sglang==0.0.0"]
