"""explain(), diagnostics() and the small public functions: what runs, on what, and why."""

import json
import os
import subprocess
import sys

import mlx.core as mx
import pytest
from problems import ON_GPU, OWN_ROUTE, cpu_kernels_only, mfa, needs_kernels, random_arrays


def qkv(Nq=33, Nk=65, dtype="float32", Hq=4, Hkv=2):
    return random_arrays(1, (1, Hq, Nq, 32), (1, Hkv, Nk, 32), (1, Hkv, Nk, 32), dtype=dtype)


def in_new_process(program, **env):
    """Runs a program that can import the package under test; returns the completed process."""
    paths = os.pathsep.join(p for p in [os.path.dirname(__file__), *sys.path] if p)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MFA_")} | {"PYTHONPATH": paths} | env
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)


@needs_kernels
@pytest.mark.parametrize(
    ("Nq", "kernel"), [(1, "few_rows" if ON_GPU else "decode"), (300, "forward" if ON_GPU else "tiled")]
)
def test_explain_describes_the_kernel(Nq, kernel):
    e = mfa.explain(*qkv(Nq=Nq, Nk=4096), causal=True)
    assert e["route"] == OWN_ROUTE
    assert kernel in e["kernel"]
    assert e["isa"] == ("" if ON_GPU else mfa.get_device_info()["isa"])
    assert len(e["tiles"]) == 2
    assert all(n > 0 for n in e["tiles"])
    assert e["splits"] >= 1
    assert e["tasks"] >= 1
    assert e["threads"] >= (0 if ON_GPU else 1)
    assert isinstance(e["native_bf16"], bool)
    assert e["refusals"] == []


def test_explain_says_why_a_route_was_not_taken():
    q, k, v = qkv()
    reasons = {
        "softcap": {"softcap": 1.0},
        "ALiBi": {"alibi_slopes": mx.zeros(4)},
        "window": {"window_size": (3, 3)},
        "lengths": {"kv_lengths": [40]},
        "dropout": {"dropout_p": 0.5},
        "mask": {"mask": mx.ones((1, 1, 1, 65), dtype=mx.bool_)},
        "log-sum-exp": {"return_lse": True},
        "probabilities": {"return_attn_weights": True},
    }
    for word, options in reasons.items():
        e = mfa.explain(q, k, v, backend="sdpa", **options)
        assert e["route"] == "composed"
        assert [r["route"] for r in e["refusals"]] == ["mlx_sdpa"]
        assert word in e["refusals"][0]["reason"]


def test_forced_routes_are_taken():
    q, k, v = qkv()
    assert mfa.explain(q, k, v, backend="sdpa")["route"] == "mlx_sdpa"
    assert mfa.explain(q, k, v, backend="composed")["route"] == "composed"
    more_queries = mfa.explain(*qkv(Nq=65, Nk=33), causal=True, backend="sdpa")
    assert more_queries["route"] == "composed"


def test_explain_is_plain_data():
    assert json.loads(json.dumps(mfa.explain(*qkv())))["route"]


def test_explain_runs_nothing():
    q, k, v = (x * 2 for x in qkv())
    before = mfa.diagnostics()["calls"]
    mfa.explain(q, k, v)
    assert mfa.diagnostics()["calls"] == before


@pytest.mark.parametrize(
    ("options", "route"), [({}, OWN_ROUTE), ({"backend": "sdpa"}, "mlx_sdpa"), ({"backend": "composed"}, "composed")]
)
def test_each_call_is_counted_under_its_route(options, route):
    if route == OWN_ROUTE and not mfa.is_mfa_available():
        pytest.skip("no kernel for this processor")
    before = mfa.diagnostics()["calls"]
    mx.eval(mfa.flash_attention(*qkv(), **options))
    after = mfa.diagnostics()["calls"]
    assert {r: after[r] - before[r] for r in after if after[r] != before[r]} == {route: 1}


def test_diagnostics_describe_the_installation():
    d = mfa.diagnostics()
    assert d["version"] == mfa.__version__
    assert d["mlx_version"] == mx.__version__
    assert d["gpu" if ON_GPU else "cpu"]["available"] == mfa.is_mfa_available()
    assert set(d["platform"]) == {"is_m3_plus", "has_nax"}
    assert set(d["calls"]) == {"mfa_cpu", "mfa_cuda", "mlx_sdpa", "composed"}
    json.dumps(d)


def test_environment_variables_are_shown_and_obeyed():
    program = (
        "import json, mlx_mfa as m; d = m.diagnostics(); print(json.dumps([d['active_env_vars'], d['cpu']['threads']]))"
    )
    run = in_new_process(program, MFA_NUM_THREADS="1")
    assert json.loads(run.stdout) == [{"MFA_NUM_THREADS": "1"}, 1]
    run = in_new_process(program)
    assert json.loads(run.stdout)[0] == {}


WRONG = {
    "MFA_CPU_ISA": ("mmx", "one of the instruction sets"),
    "MFA_NUM_THREADS": ("-3", "a whole number from 1 to 4096"),
    "MFA_PACKED_WEIGHTS_MB": ("abc", "a whole number from 0"),
}


@cpu_kernels_only
@needs_kernels
def test_instruction_set_can_be_chosen():
    program = (
        "import mlx.core as mx, mlx_mfa as m; x = mx.ones((1, 1, 40, 16));"
        "print(m.explain(x, x, x)['isa'], m.flash_attention(x, x, x).sum().item())"
    )
    for isa in mfa.get_device_info()["isas"]:
        run = in_new_process(program, MFA_CPU_ISA=isa)
        assert run.returncode == 0, run.stderr
        assert run.stdout.split() == [isa, "640.0"]


@cpu_kernels_only
@needs_kernels
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_variable_is_told_by_import_and_diagnostics_and_raised_by_the_first_use(name):
    value, words = WRONG[name]
    program = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mlx.core as mx, mlx_mfa as m
found = m.diagnostics()
told = {"warnings": [str(w.message) for w in caught], "reason": found["cpu"]["reason"], "raised": []}
told |= {"available": found["cpu"]["available"], "installed": found["auto_hooks"]["installed"]}
x = mx.ones((1, 1, 4, 8))
for use in (lambda: m.flash_attention(x, x, x), lambda: m.matmul(x, x[..., :4, :].T), m.enable):
    try:
        use()
    except ValueError as error:
        told["raised"].append(str(error))
print(json.dumps(told | {"mlx": mx.matmul(x[0, 0], x[0, 0].T).sum().item()}))
"""
    run = in_new_process(program, **{name: value})
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    message = told["reason"]
    assert message.startswith(f"[{name}] ")
    assert message.endswith(f" was expected; got {value}")
    assert words in message
    assert told["raised"] == [message] * 3
    assert [w.partition(";")[0] for w in told["warnings"]] == [message.partition(";")[0]]
    assert (told["available"], told["installed"], told["mlx"]) == (False, False, 128.0)


def test_device_info():
    info = mfa.get_device_info()
    keys = {
        "device_name",
        "gpu_family_gen",
        "is_m3_plus",
        "is_m5_plus",
        "chip_name",
        "gpu_cores",
        "extension_available",
    }
    assert keys <= set(info)
    assert info["extension_available"] is True
    assert info["isas"] == [] or info["isa"] in info["isas"]


def test_supported_configs():
    configs = mfa.get_supported_configs()
    assert {"head_dims", "dtypes", "extension_available", "features", "kernel_types"} <= set(configs)
    assert 1 in configs["head_dims"]
    assert 576 in configs["head_dims"]
    assert 577 not in configs["head_dims"]
    assert set(configs["dtypes"]) == {mx.float32, mx.float16, mx.bfloat16}
    for feature in ("causal", "gqa", "sliding_window", "softcap", "alibi", "attn_bias", "dropout", "flash_decode"):
        assert configs["features"][feature] is True
    for feature in ("rope", "paged_kv", "varlen", "kvcache_rope_append"):
        assert configs["features"][feature] is not ON_GPU


def test_supported_configs_are_those_of_the_default_device(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mfa.device._ext, "gpu_info", lambda: {"available": True, "reason": ""})
    configs = mfa.get_supported_configs()
    assert not any(configs["features"][name] for name in ("rope", "paged_kv", "varlen", "kvcache_rope_append"))
    assert configs["kernel_types"] == 3
    monkeypatch.setattr(mfa.device._ext, "gpu_info", lambda: {"available": False, "reason": "no card"})
    assert mfa.get_supported_configs()["kernel_types"] == 0


def test_warmup_returns_nothing_and_takes_its_arguments():
    assert mfa.warmup_kernels() is None
    assert mfa.warmup_kernels(head_dims=[16], dtypes=[mx.float32], causal=False) is None
    with pytest.raises(ValueError, match="head dimension"):
        mfa.warmup_kernels(head_dims=[10000])


def test_version_is_a_version():
    assert [int(n) for n in mfa.__version__.split(".")[:2]] >= [0, 1]


def test_all_public_names_are_documented():
    for name in mfa.__all__:
        if name != "__version__":
            assert getattr(mfa, name).__doc__.strip(), name
