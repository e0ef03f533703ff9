"""Programs that were compiled once and are taken from a folder after that."""

import contextlib
from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def kept_programs(compiled) -> Iterator[None]:
    """JAX takes compiled programs from the folder."""
    before = {name: getattr(jax.config, name) for name in compiled[1]}
    for name, value in compiled[1].items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def keeps_programs(compiled):
    """For a folder of tests that make the same programs again and again."""
    with kept_programs(compiled):
        yield
