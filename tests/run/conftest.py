"""Fixtures: the tiny model and data of the training tests."""

from tests.training.conftest import make_run as make_run
from tests.training.conftest import tiny_data as tiny_data
from tests.training.conftest import tiny_llava as tiny_llava
