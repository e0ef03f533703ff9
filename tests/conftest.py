"""Eight fake CPU devices, strict shapes, a cache of their own; `gpu` tests wait for a GPU."""

import os
import signal

import pytest

DEVICES = 8
FLAGS = (
    f"--xla_force_host_platform_device_count={DEVICES}",
    # Tiny programs: compiling them is what takes time. (A newer XLA may lack the second: no harm.)
    "--xla_backend_optimization_level=0",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)


def pytest_configure(config):
    before = os.environ.get("XLA_FLAGS")
    if not config.getoption("markexpr").startswith("gpu"):  # pytest -m gpu
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        given = (before or "").split()
        names = {flag.partition("=")[0] for flag in given}
        added = [flag for flag in FLAGS if flag.partition("=")[0] not in names]
        os.environ["XLA_FLAGS"] = " ".join((*given, *added))

    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.devices()
    # Commands that tests start see what a user's shell has, not the fake devices.
    if before is None:
        os.environ.pop("XLA_FLAGS", None)
    else:
        os.environ["XLA_FLAGS"] = before


def pytest_collection_modifyitems(items):
    import jax

    if jax.default_backend() != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """What the session caches; MESHLM_CACHE."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESHLM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder of compiled programs, and the settings by which JAX keeps them there: kept.py."""
    folder = tmp_path_factory.mktemp("compiled")
    values = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    return folder, values


@pytest.fixture
def heeds_ctrl_c():
    """A shell has its background commands ignore it, and a test run may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
