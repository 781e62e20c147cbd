"""test_demo_compare.py: what the demo measures and prints is what happened, and its progress bar cleans up."""

import io
import time
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_mfa.demo import DemoError
from mlx_mfa.demo.chat import Reply, agreement
from mlx_mfa.demo.progress import Progress
from mlx_mfa.demo.report import blas_name, milliseconds, table, total_agreement

TOKENS = [5, 6, 7, 1]


@pytest.fixture
def compare():
    pytest.importorskip("mlx_lm", reason="needs mlx-lm")
    from mlx_mfa.demo import compare

    return compare


class CountingModel:
    """Calls the attention function of mlx-lm's llama module once a layer, as a model does."""

    def __init__(self, layers):
        self.layers = [None] * layers
        self.calls = 0

    def __call__(self):
        from mlx_lm.models import llama

        x = mx.ones((1, 2, 4, 8))
        for _ in self.layers:
            self.calls += 1
            x = llama.scaled_dot_product_attention(x, x, x, cache=None, scale=0.3, mask="causal")
        return x


def test_timed_attention_times_each_call_and_restores_the_function(compare):
    before, model = compare.attention_function(), CountingModel(3)
    with compare.timed_attention() as seconds:
        out = model()
    assert len(seconds) == 3
    assert min(seconds) > 0
    assert mx.array_equal(out, model()).item()
    assert len(seconds) == 3
    assert compare.attention_function() is before


def test_timed_attention_interrupts_the_model_after_enough_calls(compare):
    before, model = compare.attention_function(), CountingModel(9)
    with compare.timed_attention(max_calls=4) as seconds:
        model()
    assert (len(seconds), model.calls) == (4, 4)
    assert compare.attention_function() is before


def test_columns_run_what_they_say_and_leave_no_trace(compare):
    from mlx_mfa import hooks_status
    from mlx_mfa.integrations.mlx_lm import is_patched

    before = hooks_status()["installed"]
    expected = {
        "stock MLX": (False, False),
        "mlx-mfa attention": (True, False),
        "mlx-mfa attention, linear": (True, True),
    }
    assert [column.name for column in compare.columns()] == list(expected)
    for column in compare.columns():
        with column.context():
            assert (is_patched(), hooks_status()["installed"]) == expected[column.name]
        assert (is_patched(), hooks_status()["installed"]) == (False, before)


def test_no_row_is_begun_after_the_deadline(compare):
    class Tokenizer:
        def encode(self, text):
            return [1, 2, 3]

    shape = compare.AttentionShape(2, 2, 4, 4, 8, "float32", False)
    sizes = compare.Sizes(1, 1, (4,), (4,), 1, (shape,))
    model = SimpleNamespace(make_cache=list)
    result = compare.compare(model, Tokenizer(), sizes, deadline=time.monotonic() - 1)
    assert (result.model, result.attention) == ([], [])
    assert result.skipped == ["prefill 4", "decode at 4", str(shape)]


def test_a_model_with_other_caches_is_refused_by_name(compare):
    model = SimpleNamespace(make_cache=lambda: [{}])
    with pytest.raises(DemoError, match=r"has dict; .*--no-table"):
        compare.compare(model, None, compare.QUICK)


def test_attention_alone_agrees_with_stock(compare):
    row = compare.measure_attention(compare.AttentionShape(4, 2, 33, 65, 16, "bfloat16", True))
    assert row.stock_s > 0
    assert row.ours_s > 0
    assert row.ours_error <= 2 * row.stock_error + 1e-2


@pytest.mark.parametrize(
    ("other", "equal", "total", "margin"),
    [
        (TOKENS, 4, 4, None),
        ([5, 6, 9, 7], 2, 4, 0.3),
        ([5, 6], 2, 4, 0.3),
        ([5, 6, 7, 1, 8], 4, 5, None),
        ([9], 0, 4, 0.1),
    ],
)
def test_agreement_counts_the_tokens_up_to_the_first_difference(other, equal, total, margin):
    reference = Reply(tokens=TOKENS, margins=[0.1, 0.2, 0.3, 0.4])
    counted = agreement(reference, Reply(tokens=other))
    assert (counted.equal, counted.total, counted.margin) == (equal, total, margin)
    assert f"{equal} of {total}" in str(counted)


def test_agreement_adds_up_over_replies():
    replies = [{"agreement": {"ours": {"equal": 3, "total": 4}}}, {"agreement": {"ours": {"equal": 5, "total": 5}}}]
    assert total_agreement(replies) == {"ours": (8, 9)}


def test_table_aligns_its_columns():
    text = table(["work", "with ", "ms"], [["a", "stock", "1"], ["longer", "x", "1,000"]])
    assert text.splitlines() == [
        "work    with      ms",
        "--------------------",
        "a       stock      1",
        "longer  x      1,000",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.12e-5, "0.0812"), (0.00321, "3.21"), (0.0417, "41.7"), (1.234, "1,234")]
)
def test_milliseconds_keep_three_digits(seconds, text):
    assert milliseconds(seconds) == text


def test_a_preloaded_blas_is_named(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert blas_name() == "the BLAS of its wheel"
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc.so:/usr/lib/libopenblas.so.0")
    assert blas_name() == "libopenblas.so.0, preloaded"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_draws_a_bar_and_erases_it():
    screen = Terminal()
    with Progress("measuring", 4, screen) as progress:
        progress.advance(2, label="half")
        time.sleep(0.6)
    drawn = screen.getvalue()
    assert "[############............]" in drawn
    assert "half" in drawn
    assert drawn.endswith(" \r")
    assert "\n" not in drawn


def test_progress_elsewhere_is_one_line_for_each_label():
    log = io.StringIO()
    with Progress("measuring", 4, log) as progress:
        progress.advance(2)
        progress.advance(0, label="half")
    assert log.getvalue() == "measuring ...\n  half ...\n"


def test_progress_is_erased_when_the_step_fails():
    screen = Terminal()

    def fail():
        with Progress("measuring", 4, screen):
            time.sleep(0.4)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert screen.getvalue().endswith(" \r")
