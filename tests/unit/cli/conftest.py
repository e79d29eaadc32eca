"""Each test of the command line gets an environment of its own."""

from tests.fakes.own_environment import own_environment  # noqa: F401 - a fixture
