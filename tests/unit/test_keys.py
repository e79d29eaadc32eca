"""Where keys come from, and where they never go."""

from __future__ import annotations

import pytest

from lightning_grpo.cli.sources import ConfigProblem, collect
from lightning_grpo.cli.trainer_cli import _without_secrets
from lightning_grpo.errors import ConfigError
from lightning_grpo.hparams import loggable, to_plain
from lightning_grpo.keys import API_KEY_VARIABLE, is_secret, masked, read_key
from lightning_grpo.rewards.judge import Judge
from lightning_grpo.servers.base import RunningServers


def test_a_key_is_taken_from_the_environment_a_file_or_as_it_is(tmp_path, monkeypatch):
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert read_key(None) is None
    monkeypatch.setenv(API_KEY_VARIABLE, "usual")
    monkeypatch.setenv("OTHER", "other")
    (tmp_path / "key").write_text("filed\n")
    (tmp_path / "key").chmod(0o600)
    found = [read_key(k) for k in (None, "env:OTHER", f"file:{tmp_path}/key", "itself")]
    assert found == ["usual", "other", "filed", "itself"]
    assert RunningServers(["http://a:1"]).api_key == "usual"
    assert Judge("http://a/v1", "m", api_key="env:OTHER")._headers == {
        "Authorization": "Bearer other"
    }


def test_a_key_that_is_not_there_or_that_others_can_read_is_refused(tmp_path):
    (tmp_path / "key").write_text("filed")
    (tmp_path / "key").chmod(0o644)
    (tmp_path / "empty").touch(0o600)
    for given, words in {
        "env:NOWHERE_AT_ALL": "is not set",
        "file:/no/such/file": "can't be read",
        f"file:{tmp_path}/key": "chmod 600",
        f"file:{tmp_path}/empty": "printable ASCII",
        "two words": "printable ASCII",
        "line\r\nInjected: yes": "printable ASCII",
    }.items():
        with pytest.raises(ConfigError, match=words) as refusal:
            read_key(given)
        assert "Injected" not in str(refusal.value)


@pytest.mark.parametrize("name", ["api_key", "apikey", "api-key", "wandb_api_key", "token",
                                  "hf_token", "client_secret", "password"])  # fmt: skip
def test_what_is_secret_is_known_by_its_name(name):
    assert is_secret(name, "s3cret")
    assert not is_secret(name, "env:NAME")
    assert not is_secret(name, None)


@pytest.mark.parametrize("name", ["eos_token", "pad_token", "extra_key", "max_tokens", "key"])
def test_what_only_sounds_like_it_is_kept(name):
    assert not is_secret(name, "value")


def test_keys_and_tokens_are_left_out_of_hyper_parameters():
    plain = to_plain({"model_kwargs": {"token": "hf_secret", "revision": "main"}})
    assert plain["model_kwargs"] == {"token": None, "revision": "main"}
    assert "secret" not in str(to_plain({"loss": Keeper("a secret")}))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:s3cret@host:1/list?at=a@b", "https://me:***@host:1/list?at=a@b"),
        ("can't reach http://:a:b@c@host, sorry", "can't reach http://:***@host, sorry"),
        ("http://host:30000/a@b", "http://host:30000/a@b"),
        ("https://me@host/", "https://me@host/"),
        ("https://hf_a1b2c3d4e5f6g7h8@host/", "https://***@host/"),
        ("mail me: a@b", "mail me: a@b"),
    ],
)
def test_passwords_of_urls_are_neither_shown_nor_recorded(text, shown):
    assert masked(text) == shown
    assert _without_secrets({"source": [text]}) == {"source": [shown]}
    assert loggable({"source": text}) == {"source": shown}


def test_keys_and_tokens_are_left_out_of_the_config_that_a_run_keeps():
    from jsonargparse import Namespace

    config = Namespace(
        servers=Namespace(init_args=Namespace(api_key="secret", urls=["a"])),
        model_kwargs={"token": "secret"},
        rewards=[Namespace(api_key="secret"), {"password": "secret", "api_key": "env:JUDGE"}],
    )
    written = _without_secrets(config)
    assert "secret" not in str(written)
    assert "env:JUDGE" in str(written)
    assert written.servers.init_args.urls == ["a"]
    assert config.servers.init_args.api_key == "secret"
    assert config.rewards[0].api_key == "secret"


def test_a_key_on_the_command_line_is_refused_without_being_repeated():
    for words in (
        ["--data.servers.init_args.api_key", "s3cret"],
        ["--data.servers.api_key=s3cret"],
        ["--data.servers", "{class_path: RunningServers, init_args: {api_key: s3cret}}"],
        ["--data.workflow.reward+", "[{init_args: {api_key: s3cret}}]"],
        ["--model.model_kwargs.token", "s3cret"],
        ["--data.servers.api_key", "12345"],
        ["--model.model_kwargs", "{hf_token: s3cret}"],
    ):
        with pytest.raises(ConfigProblem, match="must not stand on the command line") as refusal:
            collect([], words)
        assert "s3cret" not in str(refusal.value)
        assert "12345" not in str(refusal.value)
    collect([], ["--data.servers.api_key", "env:NAME", "--data.servers.api_key=null"])


class Keeper:
    """Keeps a key."""

    def __init__(self, api_key: str) -> None:
        self.api_key = api_key
