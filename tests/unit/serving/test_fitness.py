import logging

import pytest

from lightning_grpo.errors import ConfigError
from lightning_grpo.serving.fitness import DIALECTS, _check_routes, dialect_of, parse_version
from lightning_grpo.serving.wire import ServerInfo


@pytest.mark.parametrize(
    ("version", "spans", "session"),
    [
        ("0.5.17", False, False),
        ("0.5.18.post1", False, False),
        ("0.5.19", True, False),
        ("0.5.20", True, True),
        ("0.5.23", True, True),
    ],
)
def test_each_version_has_its_row(version, spans, session):
    dialect = dialect_of(version, "http://a")
    assert (dialect.reports_spans, dialect.update_session) == (spans, session)


def test_a_version_too_old_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"http://a runs SGLang 0\.5\.9; at least 0\.5\.17"):
        dialect_of("0.5.9", "http://a")


@pytest.mark.parametrize("version", ["0.6.0", "0.5.24", "0.0.0.dev1+g12", "nightly"])
def test_an_unknown_version_is_treated_like_the_newest_with_a_warning(version, caplog):
    with caplog.at_level(logging.WARNING):
        assert dialect_of(version, "http://a") is DIALECTS[-1]
    assert version in caplog.text


def test_versions_parse():
    assert parse_version("0.5.19.post2") == (0, 5, 19)
    assert parse_version("1.2") == (1, 2, 0)
    assert parse_version("main") is None


@pytest.mark.parametrize(
    ("version", "told", "refused"),
    [
        ("0.5.19", {"enable_return_routed_experts": True}, ""),
        ("0.5.19", {}, "Start it with `--enable-return-routed-experts`"),
        ("0.5.17", {"enable_return_routed_experts": True}, "0.5.19 or newer, http://a runs 0.5.17"),
        (
            "0.5.17",
            {"enable_return_routed_experts": True, "disable_overlap_schedule": True},
            "",
        ),
    ],
)
def test_a_server_that_can_t_tell_the_experts_of_tokens_is_refused(version, told, refused):
    info, dialect = ServerInfo(version, **told), dialect_of(version, "http://a")
    if not refused:
        _check_routes("http://a", info, dialect)
        return
    with pytest.raises(ConfigError, match=rf"`router_replay` needs .*{refused}"):
        _check_routes("http://a", info, dialect)
