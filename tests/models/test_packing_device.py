"""Packed batches on accelerators: by stand-ins on the CPU, and with `pytest -m gpu` on a device."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from moebert_kernels.models import Pack, packed, packed_attention
from moebert_kernels.models import pack as pack_module
from moebert_kernels.models.pack import pack_if_worthwhile
from tests.tiny import build_family, quartered

LENGTHS = (9, 3, 5, 1)
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "bincount")


def batch() -> dict[str, torch.Tensor]:
    mask = (torch.arange(9) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    input_ids = torch.randint(2, 100, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": input_ids, "attention_mask": mask}


def attend_by_sequence(q, k, v, begin_q, begin_k, longest_q, longest_k, *, scale=None):
    """What `varlen_attn` computes, sequence by sequence; rows of none would stay NaN."""
    assert begin_q is begin_k
    assert longest_q == longest_k
    assert begin_q.dtype == torch.int32
    context = torch.full_like(q, torch.nan)
    for begin, end in zip(begin_q.tolist(), begin_q.tolist()[1:], strict=False):
        assert end - begin <= longest_q
        if begin < end:
            one = (x[begin:end].transpose(0, 1) for x in (q, k, v))
            attended = torch.nn.functional.scaled_dot_product_attention(*one, scale=scale)
            context[begin:end] = attended.transpose(0, 1)
    return context


@pytest.fixture(autouse=True)
def small_batches_are_worthwhile(monkeypatch):
    monkeypatch.setattr(pack_module, "_LEAST_ON_DEVICE", 1)


@pytest.fixture
def as_on_a_device(monkeypatch):
    """CPU tensors are treated as those of an accelerator, and attention is by sequence."""
    monkeypatch.setattr(pack_module, "_on_host", lambda mask: False)


@pytest.fixture
def by_varlen(monkeypatch):
    monkeypatch.setattr(packed_attention, "_has_varlen", lambda *args: True)
    monkeypatch.setattr(packed_attention, "varlen_attn", attend_by_sequence)


class Waits(TorchDispatchMode):
    """Counts the operators that hand a tensor's values to the host, or whose sizes depend on them."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if name in WAITS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("as_on_a_device")
def test_a_pack_made_on_a_device_computes_the_same():
    model, inputs = quartered(build_family("Bert")), batch()
    real = inputs["attention_mask"] != 0
    pack = pack_if_worthwhile(inputs["attention_mask"]).pack
    assert pack.windows is None
    assert pack.cu_seqlens.tolist() == [0, 9, 12, 17, 18]
    assert pack.place_N.tolist() == real.flatten().nonzero().flatten().tolist()
    with torch.no_grad():
        expected, actual = model(**inputs, pack=False)[0], model(**inputs)[0]
    torch.testing.assert_close(actual[real], expected[real], atol=1e-4, rtol=1e-4)
    assert not actual[~real].any()


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize(
    ("mask", "full"),
    [
        (torch.ones(3, 5), True),
        (torch.tensor([[0, 1, 1], [1, 1, 1]]), False),
        (torch.tensor([[0, 0, 0], [1, 1, 1]]), False),
    ],
)
def test_a_device_is_asked_whether_packing_is_worthwhile(mask, full):
    verdict = pack_if_worthwhile(mask.long())
    assert verdict.pack is None
    assert verdict.full == full


@pytest.mark.usefixtures("as_on_a_device")
def test_places_that_are_read_are_asked_for_in_the_same_question():
    mask = batch()["attention_mask"]
    read = torch.zeros(mask.shape, dtype=torch.bool)
    assert pack_if_worthwhile(mask, read).pack is not None
    read[3, 1] = True
    assert pack_if_worthwhile(mask, read).pack is None


@pytest.mark.usefixtures("by_varlen", "as_on_a_device")
@pytest.mark.parametrize("max_tokens", [None, 18, 23, 36])
@pytest.mark.parametrize("routing", ["hash-random", "gate-sentence"])
def test_attention_is_told_where_sequences_begin(routing, max_tokens):
    """Rows that no token has are sequences, too: no row may be left as memory was."""
    model, inputs = quartered(build_family("Bert", "ForSequenceClassification"), routing), batch()
    pack = Pack.from_mask(inputs["attention_mask"], max_tokens=max_tokens)
    with torch.no_grad():
        expected = model(**inputs, pack=False, output_hidden_states=True)
        actual = model(**inputs, pack=pack.with_rows_kept(), output_hidden_states=True)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert all(bool(state.isfinite().all()) for state in actual.hidden_states)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("max_tokens", [None, 20])
def test_nothing_is_asked_once_the_pack_is_made(max_tokens):
    """With a bound, not even then: CUDA graphs can be captured."""
    model, inputs = build_family("Bert", "ForSequenceClassification"), batch()
    with torch.no_grad(), packed(model):
        with Waits() as waits:
            pack = Pack.from_mask(inputs["attention_mask"], max_tokens=max_tokens)
            model(**inputs, pack=pack)
        assert waits.seen == []


def test_varlen_takes_what_it_is_given():
    """PyTorch's own shapes and dtypes, by its operator's fake."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    pack = Pack.from_mask(batch()["attention_mask"], max_tokens=20)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(1, 4, 20, 64, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        context = packed_attention.attend_by_varlen(q[0], k[0], v[0], pack, 64**-0.5)
    assert context.shape == (20, 4, 64)
    assert context.dtype == torch.bfloat16


def test_a_batch_that_takes_the_host_longer_than_the_device_stays_as_it_is(monkeypatch, as_on_a_device):
    """Stops packing from slowing small batches, and from asking the device anything."""
    mask = batch()["attention_mask"]
    monkeypatch.setattr(pack_module, "_LEAST_ON_DEVICE", mask.numel() + 1)
    with Waits() as waits:
        assert pack_if_worthwhile(mask) == (None, False)
    assert not waits.seen
    monkeypatch.setattr(pack_module, "_LEAST_ON_DEVICE", mask.numel())
    assert pack_if_worthwhile(mask).pack is not None


def test_transformers_flash_attention_is_told_where_sequences_begin(monkeypatch):
    """A model that was loaded with "flash_attention_2" keeps it: its kernels attend to rows, too."""

    def flash(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        assert attention_mask is None
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        begin, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
        assert kwargs["cu_seq_lens_k"] is begin
        return attend_by_sequence(q, k, v, begin, begin, longest, longest, scale=scaling).unsqueeze(0), None

    model, inputs = quartered(build_family("Bert")), batch()
    expected = model(**inputs, pack=False)[0]
    monkeypatch.setattr(pack_module, "_on_host", lambda mask: False)
    before = AttentionInterface()["flash_attention_2"]
    model.config._attn_implementation = "flash_attention_2"
    real = inputs["attention_mask"] != 0
    AttentionInterface.register("flash_attention_2", flash)
    try:
        actual = model(**inputs)[0]
    finally:
        AttentionInterface.register("flash_attention_2", before)
    torch.testing.assert_close(actual[real], expected[real], atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation == "flash_attention_2"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_real_tokens_get_what_they_get_in_the_padded_form(dtype):
    inputs = {name: value.cuda() for name, value in batch().items()}
    model = quartered(build_family("Bert", "ForSequenceClassification")).to("cuda", dtype)
    with torch.no_grad():
        expected, actual = model(**inputs, pack=False).logits, model(**inputs).logits
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
def test_on_cuda_a_bound_waits_for_nothing_and_can_be_captured():
    inputs = {name: value.cuda() for name, value in batch().items()}
    model = quartered(build_family("Bert", "ForSequenceClassification")).to("cuda", torch.bfloat16)

    def run() -> torch.Tensor:
        return model(**inputs, pack=Pack.from_mask(inputs["attention_mask"], max_tokens=24)).logits

    with torch.no_grad():
        expected = model(**inputs, pack=False).logits
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        graph.replay()
        torch.testing.assert_close(captured, expected, atol=0.1, rtol=0.1)
        inputs["attention_mask"][0, 4:] = 0  # another batch in the same memory
        graph.replay()
        torch.testing.assert_close(captured, model(**inputs, pack=False).logits, atol=0.1, rtol=0.1)
