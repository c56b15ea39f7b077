import pytest

from pdlab.core.types import UsageError
from pdlab.cost import aic
from pdlab.cost.aic import make_profile
from pdlab.cost.table import Table


def test_it_makes_a_profile_that_a_table_reads():
    pytest.importorskip("aiconfigurator_core", reason="needs the extra aic")
    profile = make_profile(
        "meta-llama/Meta-Llama-3.1-8B", "h100_sxm", tokens=(1, 1024), cached=(0, 1024), batches=(1, 64), contexts=(1, 1024)
    )
    cost = Table(profile)
    assert 0.01 < cost.prefill_s([(1024, 0)]) < 0.05
    assert 0.004 < cost.decode_s(1, 512) < 0.012 < cost.decode_s(64, 64 * 1024) * 2


def test_an_unknown_system_is_a_usage_error():
    pytest.importorskip("aiconfigurator_core", reason="needs the extra aic")
    with pytest.raises(UsageError, match=r"no answer for .* on 'h1000'"):
        make_profile("meta-llama/Meta-Llama-3.1-8B", "h1000")


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(aic, "import_module", missing)
    with pytest.raises(UsageError, match=r"pip install aiconfigurator-core=="):
        make_profile("x", "h100_sxm")
