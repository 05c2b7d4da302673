"""The word about threads that spin beside other processes."""

import logging
import os

import pytest
import torch

from sfpk_kernels import prune
from sfpk_kernels.utils import threads

from .settings import population


@pytest.fixture
def machine(monkeypatch):
    for name in threads._SAID:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_warned", False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    return monkeypatch


def said(mlp, vectors, caplog):
    with caplog.at_level(logging.WARNING, logger="sfpk_kernels"):
        prune(mlp, vectors, config=population(0.5, n_particles=2, n_steps=1))
    return [record.getMessage() for record in caplog.records if "spin" in record.getMessage()]


def test_it_is_said_once(machine, mlp, vectors, caplog):
    (words,) = said(mlp, vectors, caplog)
    assert words.startswith("99.0 processes share ")
    assert "GOMP_SPINCOUNT=1000" in words
    caplog.clear()
    assert said(mlp, vectors, caplog) == []


@pytest.mark.parametrize("name", threads._SAID)
def test_not_where_the_user_has_said_how_threads_wait(machine, mlp, vectors, caplog, name):
    machine.setenv(name, "1")
    assert said(mlp, vectors, caplog) == []


def test_not_where_nobody_waits(machine, mlp, vectors, caplog):
    machine.setattr(torch, "get_num_threads", lambda: 1)
    assert said(mlp, vectors, caplog) == []
    machine.setattr(torch, "get_num_threads", lambda: 2)
    machine.setattr(os, "getloadavg", lambda: (0.5, 0.0, 0.0))
    assert said(mlp, vectors, caplog) == []
