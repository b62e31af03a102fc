"""A stand-in for hypothesis on a machine that has only what the package itself needs.

A module with property tests imports there, its other tests run, and the property tests are skipped
with the reason. On any machine with hypothesis nothing here is used.
"""

import importlib.machinery
import inspect
import sys
import types

import pytest


class _Anything:
    """What strategies are made of: every attribute, call and operator gives it again."""

    def __getattr__(self, name):
        return _attribute(name)

    def __call__(self, *args, **kwargs):
        return self

    def __or__(self, other):
        return self


def given(*strategies, **named):
    def decorate(test):
        parameters = inspect.signature(test).parameters
        # Positional strategies fill the rightmost parameters, as hypothesis does it.
        kept = [p for name, p in parameters.items() if name not in named]
        kept = kept[: len(kept) - len(strategies)]

        def skipped(**kwargs):
            pytest.skip("needs hypothesis, which is not installed on this machine")

        skipped.__name__, skipped.__doc__ = test.__name__, test.__doc__
        skipped.__module__ = test.__module__
        skipped.__signature__ = inspect.Signature(kept)
        skipped.pytestmark = getattr(test, "pytestmark", [])
        return skipped

    return decorate


def settings(*args, **kwargs):
    return lambda test: test


def _attribute(name):
    if name.startswith("__"):  # __file__, __path__: what the import system asks for
        raise AttributeError(name)
    return _Anything()


def install() -> None:
    hypothesis = types.ModuleType("hypothesis")
    strategies = types.ModuleType("hypothesis.strategies")
    for module in (hypothesis, strategies):  # torch.compile asks find_spec for it by name
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    hypothesis.given, hypothesis.settings, hypothesis.example = given, settings, settings
    hypothesis.strategies = strategies
    for module in (hypothesis, strategies):
        module.__getattr__ = _attribute
        sys.modules[module.__name__] = module
