"""What a user meets before the first call."""

import importlib.metadata
import pathlib

import pytest

import jax_flashattn
from jax_flashattn import _native, _targets


def test_version_and_types():
    assert importlib.metadata.version("jax-flashattn") == jax_flashattn.__version__
    assert (pathlib.Path(jax_flashattn.__file__).parent / "py.typed").exists()


def test_import_starts_no_backend(run_python):
    run_python(
        """
        import jax_flashattn
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
        """
    )


def test_handlers_of_a_newer_ffi_are_refused(monkeypatch):
    monkeypatch.setattr(_native, "ffi_api_version", lambda: (0, 99))
    with pytest.raises(ImportError, match=r"built against XLA FFI 0\.99, but the installed jaxlib"):
        _targets._check_ffi_version()
