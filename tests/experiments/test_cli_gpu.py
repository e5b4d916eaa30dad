"""The commands about a GPU, on a machine that may have none."""

import json

import pytest

from expertslice.experiments.cli import run
from expertslice.runtime import doctor
from expertslice.runtime.doctor import Finding


@pytest.fixture
def found(monkeypatch):
    findings = [Finding(subject="driver", found="none", advice="install one"), Finding(subject="torch", found="2.13")]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    return findings


def test_the_doctor_prints_findings_with_advice_below(found, capsys):
    assert run(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines() == ["driver  none", "        -> install one", "torch   2.13"]


def test_the_doctor_prints_json(found, capsys):
    assert run(["doctor", "--json"]) == 0
    assert [one["subject"] for one in json.loads(capsys.readouterr().out)] == ["driver", "torch"]
